# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""Tapped maps → feature maps for the head. Shape letters: B images, D backbone width, C neck width, h w token grid."""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_dit_detection import DiTDetectionConfig


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of 8 channels, as in RetinaNet's 256 / 32: unlike batch norm it does not mind batches of one image."""
    return nn.GroupNorm(channels // math.gcd(8, channels), channels)


class TapMix(nn.Module):
    """A learned softmax-weighted mean of maps of one shape; starts as the plain mean."""

    def __init__(self, num_taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_taps))

    def init_own_weights(self) -> None:
        """Called by the model's `_init_weights`."""
        init.zeros_(self.weight)

    def forward(self, maps: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
        """Maps of shape `(B, C, h, w)` → one of the same shape."""
        shares = self.weight.softmax(dim=0).to(maps[0].dtype)
        return sum(share * tap for share, tap in zip(shares, maps, strict=True))


class SimpleFeaturePyramid(nn.Module):
    """
    Taps → one feature map per stride, finest first.

    Each tap is projected and normalised on its own, the projections are mixed, and transposed or strided convolutions
    take the mix to the other strides: a plain ViT has no hierarchy that a top-down pathway could merge.

    Source: ViTDet (arXiv 2203.16527), section 3; there from the last block alone.
    """

    def __init__(self, config: DiTDetectionConfig) -> None:
        super().__init__()
        width = config.neck_channels or config.hidden_size
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(config.hidden_size, width, 1), group_norm(width)) for _ in config.out_indices
        )
        self.mix = TapMix(len(config.out_indices))
        num_finer = int(math.log2(config.token_stride / config.strides[0]))
        num_coarser = int(math.log2(max(1, config.strides[-1] / config.token_stride)))
        self.finer = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(width, width, 2, stride=2), group_norm(width), nn.GELU())
            for _ in range(num_finer)
        )
        self.coarser = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), group_norm(width), nn.GELU())
            for _ in range(num_coarser)
        )
        self.outputs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), group_norm(width)) for _ in config.strides
        )

    def forward(self, taps: tuple[Tensor, ...]) -> list[Tensor]:
        """Tapped maps, each `(B, D, h, w)` → feature maps `(B, C, H / stride, W / stride)`, finest first."""
        mixed = self.mix([project(tap) for project, tap in zip(self.projections, taps, strict=True)])  # (B, C, h, w)
        levels = [mixed]
        for upsample in self.finer:
            levels.insert(0, upsample(levels[0]))
        for downsample in self.coarser:
            levels.append(downsample(levels[-1]))
        # Strides that all lie below the token stride leave the coarser steps of the way out.
        return [output(level) for output, level in zip(self.outputs, levels, strict=False)]


class SingleScaleNeck(nn.Module):
    """Taps → their mix as the only feature map, as wide as the backbone and at its own stride."""

    def __init__(self, config: DiTDetectionConfig) -> None:
        super().__init__()
        self.mix = TapMix(len(config.out_indices))

    def forward(self, taps: tuple[Tensor, ...]) -> list[Tensor]:
        """Tapped maps, each `(B, D, h, w)` → one map of the same shape."""
        return [self.mix(taps)]
