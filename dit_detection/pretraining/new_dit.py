"""A new Diffusion Transformer, initialised as DiT says, and the scheduler that tells what it learns."""

from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import nn

from ..small_dit import SIZES as SMALL_SIZES

# Two for a CPU, and those of the paper.
SIZES: dict[str, dict[str, int]] = {
    **SMALL_SIZES,
    "S": {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12, "patch_size": 16},
    "B": {"num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 12, "patch_size": 16},
    "L": {"num_attention_heads": 16, "attention_head_dim": 64, "num_layers": 24, "patch_size": 16},
    "XL": {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "patch_size": 16},
}
OBJECTIVES = ("sample", "epsilon", "v_prediction", "flow")


def new_dit(size: str, sample_size: int, in_channels: int = 3, downsampling: int = 1) -> DiTTransformer2DModel:
    """
    A DiT with random weights, from the global random state.

    Every block begins as the identity and the output as 0 (adaLN-Zero), which diffusers' own initialisation leaves
    out.

    Args:
        size (`str`): A key of `SIZES`.
        sample_size (`int`): Side of its inputs, in pixels or latent cells.
        in_channels (`int`): 3 for pixels.
        downsampling (`int`): Pixels per latent cell: a token is as many pixels wide with an autoencoder as without.

    Raises:
        ValueError: If the input is not a whole number of tokens wide.

    Source: DiT (arXiv 2212.09748), `initialize_weights` of facebookresearch/DiT.
    """
    shape = SIZES[size]
    patch_size = max(1, shape["patch_size"] // downsampling)
    if sample_size % patch_size:
        raise ValueError(
            f"image_size={sample_size * downsampling} must be a multiple of {patch_size * downsampling}, the side of "
            f"a token of size {size!r} in pixels."
        )
    dit = DiTTransformer2DModel(
        in_channels=in_channels,
        sample_size=sample_size,
        num_embeds_ada_norm=1,
        norm_eps=1e-6,
        **(shape | {"patch_size": patch_size}),
    )
    blocks: Any = dit.transformer_blocks
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    projection: Any = dit.pos_embed.proj
    nn.init.xavier_uniform_(projection.weight.view(len(projection.weight), -1))  # as a linear map of a whole patch
    nn.init.zeros_(projection.bias)
    for block in blocks:
        embedder = block.norm1.emb
        nn.init.normal_(embedder.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedder.timestep_embedder.linear_2.weight, std=0.02)
        nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    nn.init.zeros_(dit.proj_out_1.weight)
    nn.init.zeros_(dit.proj_out_2.weight)
    # The paper has one embedder for all blocks; diffusers has one in each. They begin equal.
    first = blocks[0].norm1.emb.state_dict()
    with torch.no_grad():
        for block in blocks[1:]:
            block.norm1.emb.load_state_dict(first)
    return dit


def new_scheduler(objective: str, on_pixels: bool) -> Any:
    """
    The scheduler of a new DiT.

    Args:
        objective (`str`): "sample" (the clean image), "epsilon" (the noise) or "v_prediction" on DiT's schedule of
            1000 steps; or "flow".
        on_pixels (`bool`): Whether values end at -1 and 1, so that samples may be clipped there.
    """
    if objective == "flow":
        return FlowMatchEulerDiscreteScheduler()
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type=objective,
        clip_sample=on_pixels,
        timestep_spacing="trailing",  # begins with pure noise
    )
