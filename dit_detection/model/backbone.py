# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""
The Diffusion Transformer as a plain ViT: latents → tapped feature maps.

At a fixed timestep and condition adaLN-Zero's shift, scale and gate are constants, so a DiT block *is* a pre-norm
transformer block with LayerNorm affines and layer scales; `convert_dit.py` folds them.

Shape letters: B images, N tokens, D width, h w token grid.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_dit_detection import DiTDetectionConfig


def make_positions(height: int, width: int, dim: int, pretrained_grid: int) -> Tensor:
    """
    2-D sine-cosine positions of a token grid of any shape, in the units of the pretraining grid.

    Coordinates are half-pixel centred with one pitch for both axes, so a coarse token's embedding is close to the mean
    of the fine ones that it covers, and nothing is squeezed on a rectangle. At the pretraining grid this is diffusers'
    own table; elsewhere diffusers aligns corners and stretches each axis by itself.

    Returns:
        `torch.Tensor` of shape `(height * width, dim)`, float32 as in every DiT, computed in float64: first half the
        column, second half the row.

    Source: DiT's `get_2d_sincos_pos_embed`, itself from MAE.
    """
    longer: Any = torch.sym_max(height, width)  # not `max`: it would fix which side is the longer
    pitch = pretrained_grid / longer
    frequencies = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def embed(length: int) -> Tensor:
        coordinates = (
            (torch.arange(length, dtype=torch.float64) + 0.5 - length / 2) * pitch + pretrained_grid / 2 - 0.5
        )
        angles = coordinates[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (length, dim / 2)

    columns = embed(width).expand(height, width, dim // 2)
    rows = embed(height)[:, None].expand(height, width, dim // 2)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()  # (N, dim)


class PatchEmbedding(nn.Module):
    """Latents → tokens, by one strided convolution, plus their positions."""

    def __init__(self, config: DiTDetectionConfig) -> None:
        super().__init__()
        self.pretrained_grid = config.pretrained_grid
        self.projection = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)
        # One table per grid, device and dtype, filled on first use. A dict of results, not a buffer: a non-persistent
        # buffer would be uninitialised memory after `from_pretrained`.
        self._positions: dict[tuple, Tensor] = {}

    def positions(self, height: int, width: int, like: Tensor) -> Tensor:
        """Positions of the grid as `(1, N, D)`, on the device and in the dtype of `like`."""
        # A compiled or exported graph has symbolic sizes, which cannot be keys.
        if torch.compiler.is_compiling():
            return self._make_table(height, width, like)
        key = (height, width, like.device, like.dtype)
        table = self._positions.get(key)  # looked up once: another thread may clear the tables at any time
        if table is None:
            if len(self._positions) >= 16:  # sets of many image shapes must not fill the memory
                self._positions.clear()
            with torch.inference_mode(False):  # a tensor made in inference mode could not be trained with later
                table = self._positions[key] = self._make_table(height, width, like)
        return table

    def _make_table(self, height: int, width: int, like: Tensor) -> Tensor:
        table = make_positions(height, width, self.projection.out_channels, self.pretrained_grid)
        return table[None].to(device=like.device, dtype=like.dtype)

    def forward(self, latents: Tensor) -> Tensor:
        """`(B, in_channels, h * patch_size, w * patch_size)` → `(B, N, D)`."""
        x = self.projection(latents)  # (B, D, h, w)
        height, width = x.shape[-2:]
        # Contiguous: the residual stream keeps these strides, and every norm of every block would copy it.
        x = x.flatten(2).transpose(1, 2).contiguous()  # (B, N, D)
        return x + self.positions(height, width, like=x)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[Tensor, Tensor]:
    """Attention with its weights returned, in the signature of `ALL_ATTENTION_FUNCTIONS`."""
    weights = torch.matmul(query * scaling, key.transpose(2, 3))  # fewer numbers to scale than the N x N weights
    weights = weights.softmax(dim=-1)
    output = torch.matmul(weights, value)
    return output.transpose(1, 2).contiguous(), weights


class DiTAttention(nn.Module):
    """Multi-head self-attention over all tokens."""

    is_causal = False

    def __init__(self, config: DiTDetectionConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, **kwargs: Unpack[TransformersKwargs]) -> tuple[Tensor, Tensor | None]:
        """`(B, N, D)` → `(B, N, D)`, and the attention weights `(B, heads, N, N)` where the backend gives them."""
        batch_size, num_tokens, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch_size, num_tokens, 3, -1, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, D/heads)
        implementation = self.config._attn_implementation
        # torch's fused attention has no bf16 kernels for CPUs: matrix products and a softmax take 0.7 of its time,
        # until the N x N weights no longer fit the caches. (Not in a compiled graph, whose N may be a symbol.)
        if (
            implementation == "sdpa"
            and query.dtype == torch.bfloat16
            and query.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and num_tokens <= 512
        ):
            implementation = "eager"
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attention(
            self, query, key, value, None, is_causal=False, scaling=self.head_dim**-0.5, dropout=0.0, **kwargs
        )
        return self.projection(output.reshape(batch_size, num_tokens, width)), weights


class DiTMLP(nn.Module):
    """The two-layer perceptron of a block."""

    def __init__(self, config: DiTDetectionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, N, D)` → `(B, N, D)`."""
        return self.fc2(self.activation(self.fc1(hidden_states)))


class LayerScale(nn.Module):
    """The folded gate of adaLN-Zero: a residual branch, scaled per channel and added."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def init_own_weights(self) -> None:
        """Called by the model's `_init_weights`."""
        init.ones_(self.weight)

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        """`(B, N, D)`, `(B, N, D)` → `(B, N, D)`."""
        # Cast: beside autocast's bf16 branches a float32 weight would make the residual, and all it meets, float32.
        return torch.addcmul(residual, branch, self.weight.to(branch.dtype))


class DiTLayer(GradientCheckpointingLayer):
    """A DiT block at a fixed timestep and condition."""

    def __init__(self, config: DiTDetectionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.attention_norm_eps)
        self.attention = DiTAttention(config)
        self.scale1 = LayerScale(config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.mlp_norm_eps)
        self.mlp = DiTMLP(config)
        self.scale2 = LayerScale(config.hidden_size)

    def forward(self, hidden_states: Tensor, **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        """`(B, N, D)` → `(B, N, D)`."""
        attention_output, _ = self.attention(self.norm1(hidden_states), **kwargs)
        hidden_states = self.scale1(hidden_states, attention_output)
        return self.scale2(hidden_states, self.mlp(self.norm2(hidden_states)))


class DiTBackbone(nn.Module):
    """Latents → last hidden state and one normalised feature map per tap."""

    def __init__(self, config: DiTDetectionConfig) -> None:
        super().__init__()
        self.out_indices = list(config.out_indices or ())
        self.patch_embedding = PatchEmbedding(config)
        self.layers = nn.ModuleList(DiTLayer(config) for _ in range(config.num_hidden_layers))
        # Each tap's norm starts as the folded adaLN of the block that follows it: it tames the few channels in which
        # a DiT is a hundred times louder than in the rest. A copy, because that block is often not kept.
        self.tap_norms = nn.ModuleList(
            nn.LayerNorm(config.hidden_size, eps=config.attention_norm_eps) for _ in self.out_indices
        )

    def num_frozen_layers(self) -> int:
        """How many leading blocks are frozen together with the patch embedding."""
        modules = [self.patch_embedding, *self.layers]
        trained = (any(parameter.requires_grad for parameter in module.parameters()) for module in modules)
        return max(0, next((index for index, trains in enumerate(trained) if trains), len(modules)) - 1)

    def encode_frozen(self, latents: Tensor, num_layers: int) -> Tensor:
        """
        What the first blocks pass on: `(B, in_channels, H, W)` latents → `(B, S, h, w, D)`.

        The S states are the outputs of the tapped blocks among them and, if that is not the last of these, of the last
        block.
        """
        height, width = self._token_grid(latents)
        x, tapped = self._run(self.patch_embedding(latents), [], 0, num_layers)
        if num_layers - 1 not in self.out_indices:
            tapped.append(x)
        return torch.stack(tapped, dim=1).unflatten(2, (height, width))

    def forward(
        self,
        latents: Tensor,
        num_frozen_layers: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """
        Args:
            latents (`torch.Tensor` of shape `(B, in_channels, h * patch_size, w * patch_size)`): Or, with
                `num_frozen_layers`, what `encode_frozen` made of them, `(B, S, h, w, D)`.
            num_frozen_layers (`int`): How many blocks have run already.

        Returns:
            The last hidden state `(B, N, D)` and the tapped maps, each `(B, D, h, w)`, shallow to deep.
        """
        if num_frozen_layers == 0:
            height, width = self._token_grid(latents)
            x, tapped = self.patch_embedding(latents), []
        else:
            height, width = latents.shape[2:4]
            states = latents.flatten(2, 3).unbind(1)  # each (B, N, D)
            x, tapped = states[-1], list(states[: sum(index < num_frozen_layers for index in self.out_indices)])
        x, tapped = self._run(x, tapped, num_frozen_layers, len(self.layers), **kwargs)
        feature_maps = tuple(
            norm(tap).transpose(1, 2).unflatten(2, (height, width))  # (B, D, h, w)
            for norm, tap in zip(self.tap_norms, tapped, strict=True)
        )
        return x, feature_maps

    def _token_grid(self, latents: Tensor) -> tuple[int, int]:
        patch_size = self.patch_embedding.projection.kernel_size[0]
        return latents.shape[-2] // patch_size, latents.shape[-1] // patch_size

    def _run(
        self, x: Tensor, tapped: list[Tensor], first: int, end: int, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[Tensor, list[Tensor]]:
        """Blocks `first` to `end - 1` on `(B, N, D)`; their tapped outputs come after those in `tapped`."""
        for index in range(first, end):
            layer = self.layers[index]
            if self._is_first_to_train(layer, x):
                # Reentrant checkpointing gives a block no gradients if its input wants none, as behind frozen blocks.
                x = x.detach().requires_grad_()
            x = layer(x, **kwargs)
            if index in self.out_indices:
                tapped.append(x)
        return x, tapped

    def _is_first_to_train(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether a checkpointed block is the first that trains: nothing before it made its input want gradients."""
        checkpoints = getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()
        return checkpoints and not x.requires_grad and any(weight.requires_grad for weight in layer.parameters())
