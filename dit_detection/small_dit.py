"""A small Diffusion Transformer on pixels with random weights, for where no checkpoint is given."""

from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel


def write_small_dit(folder: str | Path, image_size: int, seed: int = 0) -> None:
    """
    Write a randomly initialised pixel-space DiT in diffusers' own format, 3.0 M parameters in the blocks.

    The gates of adaLN-Zero, which pretraining opens, are set to 1: at diffusers' random values next to 0 the blocks
    would hardly take part in the first epochs.

    Args:
        folder (`str` or `Path`): Where to; made if it does not exist.
        image_size (`int`): Side of the canvas it is meant for, in pixels.
        seed (`int`): Of the random weights. The caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dit = DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=48,
            in_channels=3,
            num_layers=6,
            sample_size=image_size,
            patch_size=16,
            num_embeds_ada_norm=1,
        )
    with torch.no_grad():
        for block in dit.transformer_blocks:
            # Six vectors in a row: shift, scale and gate of the attention, then of the MLP.
            vectors = block.norm1.linear.bias.view(6, -1)
            vectors[2].fill_(1.0)
            vectors[5].fill_(1.0)
    dit.save_pretrained(folder)
