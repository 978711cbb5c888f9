"""Small Diffusion Transformers: the pretrained one of the package, on latents, and random weights, on pixels."""

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from .model.load_dit import pipeline_folder, read_json

# Folder of the pretrained DiT of size "small" with its autoencoder, for `from_diffusers` and --model. How
# `dit-detect pretrain` made it: model_cards/small-dit/README.md.
SMALL_DIT = Path(__file__).parent / "small-dit"

# On pixels; on latents tokens are as many pixels wide. "tiny" is for tests; "small" learns a few hundred photographs
# on a CPU.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 4, "patch_size": 8},
    "small": {"num_attention_heads": 4, "attention_head_dim": 48, "num_layers": 6, "patch_size": 16},
}

# The detector on each: as slim as its DiT, one anchor per cell (with a pyramid and ATSS more bring little), and the
# first block tapped, whose features are closest to the pixels.
DETECTORS: dict[str, dict[str, Any]] = {
    "tiny": {
        "out_indices": [0, 3],
        "neck_channels": 64,
        "head_channels": [64, 64],
        "strides": [8, 16, 32],
        "anchor_sizes": [[20.0], [40.0], [80.0]],
        "aspect_ratios": [1.0],
    },
    "small": {
        "out_indices": [0, 2, 5],
        "neck_channels": 96,
        "head_channels": [96, 96],
        "strides": [8, 16, 32],
        "anchor_sizes": [[24.0], [56.0], [112.0]],
        "aspect_ratios": [1.0],
    },
}


def size_of(source: str | Path, vae: str | Path | None = "auto", revision: str | None = None) -> str | None:
    """
    Which of the small DiTs a source has the size of: `dit-detect pretrain` makes such, and goes on with them.

    Args:
        source (`str` or `Path`): Folder or Hub id of a pipeline of diffusers, or of a DiT alone.
        vae (`str` or `Path`, *optional*): Folder or Hub id of the autoencoder, by which a token counts in pixels;
            `"auto"` for that of the pipeline, `None` for a DiT on pixels.
        revision (`str`, *optional*): Branch, tag or commit of a source on the Hub.

    Returns:
        `str`, *optional*: A key of `SIZES`; `None` if it is of none, or no DiT of diffusers.
    """
    if os.path.isfile(source):
        return None
    try:
        folder = pipeline_folder(source, revision)
        dit = _read_config(folder, "transformer")
        latents = {} if vae is None else _read_config(folder if vae == "auto" else pipeline_folder(vae), "vae")
    except (OSError, ValueError):  # whoever loads it says why
        return None
    widths = latents.get("encoder_block_out_channels") or latents.get("block_out_channels") or [0]
    for size, fields in SIZES.items():
        fields = fields | {"patch_size": max(1, fields["patch_size"] // 2 ** (len(widths) - 1))}
        if all(dit.get(name) == value for name, value in fields.items()):
            return size
    return None


def _read_config(folder: Path, part: str) -> dict[str, Any]:
    """The configuration of a part of a pipeline; or that of the folder itself, where it is none."""
    for file in (folder / part / "config.json", folder / "config.json"):
        if file.is_file():
            return read_json(file)
    return {}


def detector_on(size: str | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """
    Fields of `DiTDetectionConfig` for a detector on a DiT of a size.

    Args:
        size (`str`, *optional*): A key of `DETECTORS`; `None` for another DiT, on which the defaults are.
        overrides (`dict`): What was chosen otherwise. Where that goes without the size's strides, what belongs to them
            is left to the defaults, too.
    """
    fields = dict(DETECTORS[size]) if size is not None else {}
    if "neck_channels" in overrides and overrides["neck_channels"] is None:  # a single map has the stride of a token
        del fields["strides"], fields["anchor_sizes"]
    elif "strides" in overrides and overrides["strides"] != fields.get("strides"):
        fields.pop("anchor_sizes", None)
    return fields | overrides


def write_small_dit(folder: str | Path, size: str, image_size: int, seed: int = 0) -> None:
    """
    Write a randomly initialised pixel-space DiT in diffusers' own format.

    Two things differ from diffusers' initialisation, without which little is learned in the first epochs: the gates of
    adaLN-Zero, which pretraining opens, are 1, and the patch embedding is 5 times as strong, next to positions of
    amplitude 1.

    Args:
        folder (`str` or `Path`): Where to; made if it does not exist.
        size (`str`): A key of `SIZES`.
        image_size (`int`): Longer side of the canvas it is meant for, in pixels.
        seed (`int`): Of the random weights. The caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dit = DiTTransformer2DModel(in_channels=3, sample_size=image_size, num_embeds_ada_norm=1, **SIZES[size])
    with torch.no_grad():
        dit.pos_embed.proj.weight.mul_(5)
        for block in dit.transformer_blocks:
            linear = block.norm1.linear
            linear.weight.zero_()
            linear.bias.zero_()
            # Six vectors in a row: shift, scale and gate of the attention, then of the MLP.
            gates = linear.bias.view(6, -1)
            gates[2].fill_(1.0)
            gates[5].fill_(1.0)
    dit.save_pretrained(folder)
