# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""
Read a checkpoint in the format of the original DiT code (`blocks.0.attn.qkv.weight`, …), which SiT and REPA share.

The weights get diffusers' names and go the way of every other DiT. Sizes follow from shapes; what no file tells is the
family, and with it what the timestep embedder was trained on.
"""

import math
import os
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Mapping
from functools import reduce

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor

from .backbone import make_positions
from .load_dit import unpickling_reason

FAMILIES = ("dit", "sit", "repa")
# Width → attention heads of the published sizes S, B, L and XL; no weight's shape depends on the heads.
_NUM_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


def load_original(
    source: str | os.PathLike, family: str | None, num_attention_heads: int | None = None
) -> DiTTransformer2DModel:
    """
    Load a file of weights that DiT, SiT or REPA saved: a state dict, or a training checkpoint that has one.

    Args:
        source (`str` or `os.PathLike`): The `.pt` file. Of a training checkpoint, the moving average (`"ema"`) is
            taken. Only tensors are read from it: nothing in the file can run.
        family (`str`): `"dit"`, `"sit"` or `"repa"`; see `sinusoid_at` in `convert_dit.py`.
        num_attention_heads (`int`, *optional*): Needed if the width is none of the published ones.

    Returns:
        `DiTTransformer2DModel`: In the dtype of the file, its weights mapped from the disk. Fold it with the same
        `family`: diffusers itself computes another sinusoid of the timestep than the original code.

    Raises:
        `ValueError`: When the file is no such checkpoint, a weight is missing, unexpected or misshapen, or `family`
            or `num_attention_heads` is needed.

    Source: https://github.com/facebookresearch/DiT, https://github.com/willisma/SiT,
    https://github.com/sihyun-yu/REPA (their `models.py` and `train.py`).
    """
    if family not in FAMILIES:
        raise ValueError(
            f"source={os.fspath(source)!r} is a file, and family={family!r}. The weights of DiT, SiT and REPA look "
            f"alike, but not their time. Say whose code saved it: family='dit', 'sit' or 'repa'."
        )
    weights = _read_weights(source)
    if family == "repa":  # the projectors served REPA's training loss alone
        weights = {key: weight for key, weight in weights.items() if not key.startswith("projectors.")}
    try:
        renamed = original_to_diffusers(weights)
        transformer = _empty_transformer(weights, num_attention_heads)
        _check_shapes(renamed, transformer)
        _check_positions(weights["pos_embed"], transformer.inner_dim)
    except ValueError as error:
        raise ValueError(f"source={os.fspath(source)!r} cannot be read with family={family!r}: {error}") from error
    transformer.load_state_dict(renamed, assign=True)
    transformer.pos_embed.pos_embed = weights["pos_embed"]
    return transformer.eval()


def original_to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    The same weights under the names of a `DiTTransformer2DModel`, without the position table, which it computes.

    Query, key and value are taken apart, and each block gets the one timestep embedder and the one class table, as
    diffusers has it. No memory is copied.

    Raises:
        `ValueError`: When a weight is missing, or one is left that this architecture has no place for.
    """
    blocks = [int(match[1]) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))]
    depth = max(blocks, default=0) + 1
    names = {
        "x_embedder.proj": ["pos_embed.proj"],
        "final_layer.adaLN_modulation.1": ["proj_out_1"],
        "final_layer.linear": ["proj_out_2"],
    }
    embedders = {
        "t_embedder.mlp.0": "timestep_embedder.linear_1",
        "t_embedder.mlp.2": "timestep_embedder.linear_2",
        "y_embedder.embedding_table": "class_embedder.embedding_table",
    }
    for module, name in embedders.items():
        names[module] = [f"transformer_blocks.{index}.norm1.emb.{name}" for index in range(depth)]
    for index in range(depth):
        original, block = f"blocks.{index}", f"transformer_blocks.{index}"
        names[f"{original}.adaLN_modulation.1"] = [f"{block}.norm1.linear"]
        names[f"{original}.attn.qkv"] = [f"{block}.attn1.to_{part}" for part in "qkv"]
        names[f"{original}.attn.proj"] = [f"{block}.attn1.to_out.0"]
        names[f"{original}.mlp.fc1"] = [f"{block}.ff.net.0.proj"]
        names[f"{original}.mlp.fc2"] = [f"{block}.ff.net.2"]

    keys = {f"{module}.{parameter}": module for module in names for parameter in ("weight", "bias")}
    del keys["y_embedder.embedding_table.bias"]
    if missing := (keys.keys() | {"pos_embed"}) - weights.keys():
        raise ValueError(f"it lacks the weights {_some(missing)}.")
    if unexpected := weights.keys() - keys.keys() - {"pos_embed"}:
        raise ValueError(
            f"it has weights that this architecture has no place for: {_some(unexpected)}. Leaving them out would "
            f"change its outputs. (Those under 'projectors.' are REPA's: family='repa' drops them.)"
        )
    renamed: dict[str, Tensor] = {}
    for key, module in keys.items():
        targets = [f"{target}.{key.rpartition('.')[2]}" for target in names[module]]
        is_qkv = module.endswith("attn.qkv")
        tensors = weights[key].tensor_split(3) if is_qkv else [weights[key]] * len(targets)
        renamed |= dict(zip(targets, tensors, strict=True))
    return renamed


def _read_weights(source: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict of a file, every tensor in the widest dtype among them, mapped from the disk where it can be."""
    try:
        # Training scripts put their command line beside the weights. A Namespace holds values and does nothing.
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except Exception as error:  # a broken file raises whatever its reader raises
        reason = unpickling_reason(error).partition("\n")[0]
        raise ValueError(
            f"source={os.fspath(source)!r} cannot be read as weights of PyTorch ({type(error).__name__}: {reason}). "
            f"Download it again; if it holds other objects than tensors, which could run any code, have its author "
            f"save the state dict alone."
        ) from None
    for part in ("ema", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(part), Mapping):
            content = content[part]
            break
    is_state_dict = isinstance(content, Mapping) and len(content) > 0
    if not is_state_dict or not all(isinstance(x, Tensor) and x.is_floating_point() for x in content.values()):
        raise ValueError(
            f"source={os.fspath(source)!r} must hold a state dict of floating-point tensors, or one under 'ema' or "
            f"'model'."
        )
    dtype = reduce(torch.promote_types, (weight.dtype for weight in content.values()))
    return {str(key): weight.to(dtype) for key, weight in content.items()}


def _empty_transformer(weights: Mapping[str, Tensor], num_attention_heads: int | None) -> DiTTransformer2DModel:
    """A transformer without memory, of the sizes that the shapes tell."""
    projection, positions = weights["x_embedder.proj.weight"], weights["pos_embed"]
    if projection.ndim != 4 or positions.ndim != 3:
        raise ValueError(
            f"its x_embedder.proj.weight has the shape {tuple(projection.shape)} and its pos_embed "
            f"{tuple(positions.shape)}, but 4 and 3 dimensions are needed."
        )
    width, in_channels, patch_size, _ = projection.shape
    num_heads = _NUM_HEADS.get(width, 0) if num_attention_heads is None else num_attention_heads
    if num_heads < 1 or width % num_heads:
        raise ValueError(
            f"it is {width} wide, and num_attention_heads={num_attention_heads} does not fit. The number of heads "
            f"follows from no shape, and is known only of the widths {list(_NUM_HEADS)}: pass "
            f"num_attention_heads=..., a divisor of {width}."
        )
    with torch.device("meta"):
        return DiTTransformer2DModel(
            num_attention_heads=num_heads,
            attention_head_dim=width // num_heads,
            in_channels=in_channels,
            out_channels=weights["final_layer.linear.bias"].numel() // patch_size**2,
            num_layers=len([key for key in weights if key.endswith(".attn.qkv.weight")]),
            sample_size=math.isqrt(positions.shape[1]) * patch_size,
            patch_size=patch_size,
            num_embeds_ada_norm=len(weights["y_embedder.embedding_table.weight"]) - 1,  # the last is the null class
            norm_eps=1e-6,
        )


def _check_shapes(weights: Mapping[str, Tensor], transformer: DiTTransformer2DModel) -> None:
    expected = {key: tuple(weight.shape) for key, weight in transformer.state_dict().items()}
    for key, weight in weights.items():
        if tuple(weight.shape) != expected[key]:
            raise ValueError(
                f"{key}, as diffusers calls it, has the shape {tuple(weight.shape)}, but {expected[key]} is needed "
                f"beside the other weights."
            )


def _check_positions(table: Tensor, width: int) -> None:
    """Refuse other positions than those that a detector computes."""
    grid = math.isqrt(table.shape[1])
    expected = make_positions(grid, grid, width, grid)[None]
    # Moving averages, which average the constant table too, and half precision are off by some thousandths.
    if table.shape != expected.shape or not (table.float() - expected).abs().max() <= 0.01:
        raise ValueError(
            f"its position table 'pos_embed' of shape {tuple(table.shape)} is not the 2-D sine-cosine table of a "
            f"square grid, which a detector computes anew for every image size. Learned positions are not supported."
        )


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
