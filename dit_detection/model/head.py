# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""Feature maps → class scores and box deltas per anchor. Shape letters: B images, A anchors, C channels, h w cells."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_dit_detection import DiTDetectionConfig
from .neck import group_norm


class Predictor(nn.Conv2d):
    """The last layer of a branch; starts near zero, so every box near its anchor, and at a bias of its own."""

    initial_bias = 0.0

    def init_own_weights(self) -> None:
        """Called by the model's `_init_weights`; keyed on this leaf, because containers are never asked there."""
        init.normal_(self.weight, std=0.01)
        init.constant_(self.bias, self.initial_bias)


class AnchorHead(nn.Module):
    """
    Convolutions shared by all feature maps, then per anchor one score per class and four deltas.

    Source: RetinaNet (arXiv 1708.02002), with group norm as in FCOS and ATSS.
    """

    def __init__(self, config: DiTDetectionConfig) -> None:
        super().__init__()
        self.num_labels = config.num_labels
        in_channels = config.neck_channels or config.hidden_size
        self.class_tower = self._tower(in_channels, config.head_channels)
        self.box_tower = None if config.shared_head_tower else self._tower(in_channels, config.head_channels)
        width = [in_channels, *config.head_channels][-1]
        kernel, anchors = config.predictor_kernel_size, config.num_anchors_per_cell
        self.class_predictor = Predictor(width, anchors * config.num_labels, kernel, padding=kernel // 2)
        self.class_predictor.initial_bias = -math.log((1 - config.prior_probability) / config.prior_probability)
        self.box_predictor = Predictor(width, anchors * 4, kernel, padding=kernel // 2)

    def _tower(self, in_channels: int, widths: Sequence[int]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Conv2d(in_channels, width, 3, padding=1), group_norm(width), nn.ReLU(inplace=True)]
            in_channels = width
        return nn.Sequential(*layers)

    def forward(self, feature_maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """
        Args:
            feature_maps: Each `(B, C, h, w)`, finest first.

        Returns:
            Logits `(B, A, num_labels)` and deltas `(B, A, 4)`, in the order of `make_anchors`.
        """
        logits, deltas = [], []
        for feature_map in feature_maps:
            class_features = self.class_tower(feature_map)
            box_features = class_features if self.box_tower is None else self.box_tower(feature_map)
            logits.append(self._per_anchor(self.class_predictor(class_features), self.num_labels))
            deltas.append(self._per_anchor(self.box_predictor(box_features), 4))
        return torch.cat(logits, dim=1), torch.cat(deltas, dim=1)

    def _per_anchor(self, prediction: Tensor, values: int) -> Tensor:
        """`(B, anchors · values, h, w)` → `(B, h · w · anchors, values)`."""
        prediction = prediction.permute(0, 2, 3, 1)
        if torch.compiler.is_compiling():
            # Of a single image, a traced convolution can have other strides than a real one, and a recorded view of it
            # fails. In a compiled graph the copy is part of the concatenation.
            prediction = prediction.clone(memory_format=torch.contiguous_format)
        return prediction.reshape(prediction.shape[0], -1, values)
