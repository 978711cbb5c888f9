# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""
A Diffusion Transformer (DiT) of diffusers → the configuration and weights of a detector's backbone.

adaLN-Zero computes each block's shift, scale and gate from the timestep and the class alone. With both fixed they are
constants, and fold without error: `1 + scale` and `shift` into a LayerNorm's weight and bias, the gate into a layer
scale. Every key of the source is used or dropped by name; anything else is an error.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor
from torch.nn import functional as F

from .configuration_dit_detection import DiTDetectionConfig

_ACTIVATIONS = {"gelu-approximate": "gelu_pytorch_tanh", "gelu": "gelu"}
# What the encoder half needs of an autoencoder's config; `latent_encoder.py` reads exactly these.
_ENCODER_FIELDS = {
    "AutoencoderKL": (
        *("in_channels", "latent_channels", "block_out_channels", "down_block_types", "layers_per_block", "act_fn"),
        *("norm_num_groups", "mid_block_add_attention", "use_quant_conv", "scaling_factor", "shift_factor"),
    ),
    "AutoencoderTiny": (
        *("in_channels", "latent_channels", "encoder_block_out_channels", "num_encoder_blocks", "act_fn"),
        *("scaling_factor", "shift_factor"),
    ),
}

# Fields that no caller can set.
_OF_THE_DIT = {
    *("in_channels", "patch_size", "pretrained_grid", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "hidden_act", "qkv_bias", "attention_norm_eps", "mlp_norm_eps", "latent_encoder"),
}


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """
    Refuse what a caller cannot set. (transformers keeps any name in a configuration: a misspelt one changes nothing.)

    Raises:
        ValueError: A name is no field of [`DiTDetectionConfig`], or is one that follows from the DiT.
    """
    known = {name for name in dir(DiTDetectionConfig) if not name.startswith("_")}
    known |= {field.name for field in fields(DiTDetectionConfig)} | {"attn_implementation"}
    known -= _OF_THE_DIT | {"torch_dtype"}  # the old name of dtype
    for name in overrides:
        if name in _OF_THE_DIT:
            raise ValueError(f"{name} is that of the DiT, and cannot be set.")
        if name not in known:
            alike = get_close_matches(name, known, n=1)
            hint = f" Is {alike[0]!r} meant?" if alike else ""
            raise ValueError(f"DiTDetectionConfig has no field {name!r}.{hint}")


def dit_config(
    transformer: DiTTransformer2DModel | Transformer2DModel,
    autoencoder: AutoencoderKL | AutoencoderTiny | None,
    *,
    timestep: int,
    condition: int | None = None,
    out_indices: list[int] | tuple[int, ...] | None = None,
    **overrides: Any,
) -> DiTDetectionConfig:
    """
    The configuration of a detector on this DiT, cut after its deepest tap.

    Args:
        timestep (`int`): Diffusion timestep to fold at, 0 (clean) to 999 (noise).
        condition (`int`, *optional*): Class to fold at; `None` is the null class of classifier-free guidance.
        out_indices (`list[int]`, *optional*): Tapped blocks of the source; -1 is its last. By default those after
            10/28, 14/28 and 18/28 of its depth.
        overrides: Any other field of [`DiTDetectionConfig`]. `strides` default to half the token stride and up.
    """
    source: Any = transformer.config
    depth = source.num_layers
    if not 0 <= timestep <= 999:
        raise ValueError(f"timestep={timestep} must lie between 0 (clean) and 999 (noise).")
    if condition is not None and not 0 <= condition <= source.num_embeds_ada_norm:
        raise ValueError(
            f"condition={condition} must be one of the {source.num_embeds_ada_norm} classes 0 … "
            f"{source.num_embeds_ada_norm - 1}, or None for the null class."
        )
    if source.activation_fn not in _ACTIVATIONS:
        raise ValueError(
            f"activation_fn={source.activation_fn!r} of the DiT is not supported: use one of {list(_ACTIVATIONS)}."
        )
    if transformer.pos_embed.interpolation_scale != 1:
        raise ValueError(
            f"The DiT's positions are scaled by interpolation_scale={transformer.pos_embed.interpolation_scale}, as "
            f"only the legacy Transformer2DModel does: load it as a DiTTransformer2DModel."
        )
    if out_indices is None:
        taps = sorted({max(1, round(depth * blocks / 28)) - 1 for blocks in (10, 14, 18)})
    elif out_indices and all(isinstance(tap, int) and -depth <= tap < depth for tap in out_indices):
        taps = [tap % depth for tap in out_indices]
    else:
        raise ValueError(
            f"out_indices={out_indices!r} must name at least one of this DiT's blocks, {-depth} to {depth - 1}."
        )

    latent_encoder, downsampling = None, 1
    if autoencoder is not None:
        class_name = type(autoencoder).__name__
        values = {field: autoencoder.config[field] for field in _ENCODER_FIELDS[class_name]}
        latent_encoder = {"_class_name": class_name, **json.loads(json.dumps(values))}  # tuples become JSON's lists
        widths = latent_encoder.get("block_out_channels") or latent_encoder["encoder_block_out_channels"]
        downsampling = 2 ** (len(widths) - 1)
    if "strides" not in overrides:
        token_stride = source.patch_size * downsampling
        finest = token_stride // 2 if token_stride % 2 == 0 else token_stride
        has_neck = overrides.get("neck_channels", 1) is not None
        overrides["strides"] = [finest * 2**level for level in range(5)] if has_neck else [token_stride]

    hidden_size = source.num_attention_heads * source.attention_head_dim
    return DiTDetectionConfig(
        in_channels=source.in_channels,
        patch_size=source.patch_size,
        pretrained_grid=source.sample_size // source.patch_size,
        hidden_size=hidden_size,
        num_hidden_layers=max(taps) + 1,
        num_attention_heads=source.num_attention_heads,
        intermediate_size=4 * hidden_size,
        hidden_act=_ACTIVATIONS[source.activation_fn],
        qkv_bias=source.attention_bias,
        attention_norm_eps=1e-6,  # fixed in diffusers' AdaLayerNormZero; norm_eps is that of the norm before the MLP
        mlp_norm_eps=source.norm_eps,
        timestep=timestep,
        condition=condition,
        out_indices=taps,
        latent_encoder=latent_encoder,
        **overrides,
    )


def fold_dit(
    transformer: DiTTransformer2DModel | Transformer2DModel,
    autoencoder: AutoencoderKL | AutoencoderTiny | None,
    config: DiTDetectionConfig,
    *,
    dtype: torch.dtype | None = None,
    family: str | None = None,
) -> dict[str, Tensor]:
    """
    The weights of a `DiTDetectionModel`: the DiT folded at the timestep and condition of `config`, and the encoder.

    Args:
        config: From [`dit_config`] on the same models.
        dtype (`torch.dtype`, *optional*): Of the result, by default the transformer's. Folding is done in float64.
        family (`str`, *optional*): Of a transformer from [`load_original`], the one given there.

    Returns:
        `dict[str, torch.Tensor]`: On the CPU; unfolded weights share memory with the source where they can.

    Raises:
        `ValueError`: When a weight is absent, or one is left that this design has no place for.
    """
    dtype = transformer.dtype if dtype is None else dtype
    source: Any = transformer.config
    weights = transformer.state_dict()
    depth = source.num_layers
    taps = list(config.out_indices or ())
    condition = source.num_embeds_ada_norm if config.condition is None else config.condition
    sinusoid = sinusoid_at(config.timestep, family)
    folded: dict[str, Tensor] = {}

    def take(key: str) -> Tensor:
        if key not in weights:
            raise ValueError(
                f"The DiT has no weight {key!r}. Adapters must be fused and quantised weights restored before folding."
            )
        return weights.pop(key).detach().cpu()

    def linear(key: str, x: Tensor) -> Tensor:
        return F.linear(x, take(f"{key}.weight").double(), take(f"{key}.bias").double())

    def put(key: str, **parameters: Tensor) -> None:
        folded.update({f"{key}.{name}": value.to(dtype) for name, value in parameters.items()})

    def move(source: str, target: str) -> None:
        put(target, weight=take(f"{source}.weight"), bias=take(f"{source}.bias"))

    move("pos_embed.proj", "backbone.patch_embedding.projection")
    embeddings = []
    for index in range(min(config.num_hidden_layers + 1, depth)):  # one more: its first norm follows the deepest tap
        block, layer = f"transformer_blocks.{index}", f"backbone.layers.{index}"
        # Every block has timestep and class embedders of its own, and they need not be equal.
        hidden = F.silu(linear(f"{block}.norm1.emb.timestep_embedder.linear_1", sinusoid))
        label = take(f"{block}.norm1.emb.class_embedder.embedding_table.weight")[condition].double()
        embeddings.append(linear(f"{block}.norm1.emb.timestep_embedder.linear_2", hidden) + label)
        modulation = linear(f"{block}.norm1.linear", F.silu(embeddings[-1]))[0]  # (6D,)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6)
        if index - 1 in taps:
            put(f"backbone.tap_norms.{taps.index(index - 1)}", weight=1 + scale_msa, bias=shift_msa)
        if index == config.num_hidden_layers:
            break

        put(f"{layer}.norm1", weight=1 + scale_msa, bias=shift_msa)
        for name in ("weight", "bias") if config.qkv_bias else ("weight",):
            qkv = torch.cat([take(f"{block}.attn1.to_{part}.{name}") for part in "qkv"])
            put(f"{layer}.attention.qkv", **{name: qkv})
        move(f"{block}.attn1.to_out.0", f"{layer}.attention.projection")
        put(f"{layer}.scale1", weight=gate_msa)
        if source.norm_elementwise_affine:
            shift_mlp = shift_mlp + (1 + scale_mlp) * take(f"{block}.norm3.bias").double()
            scale_mlp = (1 + scale_mlp) * take(f"{block}.norm3.weight").double() - 1
        put(f"{layer}.norm2", weight=1 + scale_mlp, bias=shift_mlp)
        move(f"{block}.ff.net.0.proj", f"{layer}.mlp.fc1")
        move(f"{block}.ff.net.2", f"{layer}.mlp.fc2")
        put(f"{layer}.scale2", weight=gate_mlp)
    if depth - 1 in taps:
        # Nothing follows the last block but the output norm, which diffusers conditions on block 0's embedding.
        shift, scale = linear("proj_out_1", F.silu(embeddings[0]))[0].chunk(2)
        put(f"backbone.tap_norms.{len(taps) - 1}", weight=1 + scale, bias=shift)
    unused = tuple(f"transformer_blocks.{index}." for index in range(config.num_hidden_layers, depth))
    _check_all_used(weights, (*unused, "proj_out_1.", "proj_out_2.", "pos_embed.pos_embed"), "DiT")

    if autoencoder is not None:
        weights = autoencoder.state_dict()
        for key in [key for key in weights if key.startswith(("encoder.", "quant_conv."))]:
            folded[f"latent_encoder.{key}"] = take(key).to(dtype)
        _check_all_used(weights, ("decoder.", "post_quant_conv."), "autoencoder")
    return folded


def sinusoid_at(timestep: int, family: str | None) -> Tensor:
    """
    What the timestep embedder of a DiT was trained on, as `(1, 256)`, at a timestep from 0 (clean) to 1000 (noise).

    SiT and REPA count time in [0, 1] along a straight path, on which `timestep` thousandths of an image are noise: SiT
    from noise to image, REPA from image to noise. (On the path of DiT, timestep 50 is 15 % noise: there it is 150.)

    Args:
        family (`str`, *optional*): `"dit"`, `"sit"` or `"repa"` of the original code; `None` for diffusers, whatever
            its scheduler. Beside the time, the spacing of the 128 frequencies differs: they end before 1 / 10000 in
            the original code, and there in diffusers.
    """
    time = {"sit": 1 - timestep / 1000, "repa": timestep / 1000}.get(family or "", timestep)
    sinusoid = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1 if family is None else 0)
    # All of them compute it in float32 whatever the model's dtype; at timestep 999 the exact one differs by 5e-5.
    return sinusoid(torch.tensor([time])).double()


def _check_all_used(weights: dict[str, Tensor], dropped: tuple[str, ...], owner: str) -> None:
    left = sorted(key for key in weights if not key.startswith(dropped))
    if left:
        raise ValueError(
            f"The {owner} has weights that a detector has no place for: {', '.join(left)}. Leaving them out would "
            f"change its outputs; fuse adapters into the model before converting it."
        )
