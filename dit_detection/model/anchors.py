# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""Anchors: a pure function of the feature maps' shapes. Shape letters: A anchors, h w cells."""

from collections.abc import Sequence

import torch
from torch import Tensor


def feature_shapes_of(token_grid: Sequence[int], token_stride: int, strides: Sequence[int]) -> list[tuple[int, int]]:
    """(h, w) of each feature map that a neck makes of a grid of tokens; strides double from map to map."""
    height, width = token_grid
    shapes: list[tuple[int, int]] = []
    for stride in strides:
        if stride <= token_stride:
            shapes.append((height * token_stride // stride, width * token_stride // stride))
        else:  # of the one before, by a strided convolution that is padded so that no cell is lost
            shapes.append(((shapes[-1][0] + 1) // 2, (shapes[-1][1] + 1) // 2))
    return shapes


def make_anchors(
    feature_shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    anchor_sizes: Sequence[Sequence[float]],
    aspect_ratios: Sequence[float],
    device: torch.device | None = None,
) -> Tensor:
    """
    All anchors of an input, centred on the cells of its feature maps; not rounded, not clipped.

    Args:
        feature_shapes: (h, w) of each feature map, finest first.
        strides: Input pixels per cell of each map.
        anchor_sizes: Per map, square roots of the anchors' areas, in input pixels.
        aspect_ratios: Height / width; every size comes in every ratio.

    Returns:
        `torch.Tensor` of shape `(A, 4)`, float32: xyxy, input pixels, ordered by map, row, column, ratio, size: the
        order of the head's predictions.

    Source: Faster R-CNN (arXiv 1506.01497). torchvision centres anchors on the cells' corners and rounds them; a token
    of a ViT sees the patch around the cell's centre.
    """
    levels = []
    for (height, width), stride, sizes in zip(feature_shapes, strides, anchor_sizes, strict=True):
        side = torch.tensor(sizes, dtype=torch.float32, device=device)
        ratio = torch.tensor(aspect_ratios, dtype=torch.float32, device=device).sqrt()[:, None]
        half_widths, half_heights = (side / ratio).flatten() / 2, (side * ratio).flatten() / 2
        cell = torch.stack([-half_widths, -half_heights, half_widths, half_heights], dim=1)  # (anchors per cell, 4)
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) * stride
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) * stride
        y, x = torch.meshgrid(y, x, indexing="ij")
        centers = torch.stack([x, y, x, y], dim=-1)  # (h, w, 4)
        levels.append((centers[:, :, None] + cell).flatten(0, 2))
    return torch.cat(levels)
