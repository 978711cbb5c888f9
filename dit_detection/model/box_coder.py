# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""Boxes ↔ what the head predicts. Shape letters: A anchors."""

import math

import torch
from torch import Tensor

from .boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh

# How far a box may outgrow its anchor: 1000 / 16, the longest side of an image over the smallest object of interest
# (torchvision, detectron2). Without a bound one wild log-side of an untrained head is an infinite box.
MAX_LOG_GROWTH = math.log(1000 / 16)


class BoxCoder:
    """
    Deltas relative to anchors: centre shifts in anchor sides, and log-ratios of the sides.

    Source: R-CNN, appendix C (arXiv 1311.2524).
    """

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """
        Express boxes as the deltas the head must predict from their anchors.

        Args:
            boxes (`torch.Tensor` of shape `(A, 4)`): Matched objects, xyxy, input pixels; every side longer than 0.
            anchors (`torch.Tensor` of shape `(A, 4)`): xyxy, input pixels; every side longer than 0.

        Returns:
            `torch.Tensor` of shape `(A, 4)`: (dx, dy, dw, dh) in anchor sides and log-sides.
        """
        boxes, anchors = box_xyxy_to_cxcywh(boxes), box_xyxy_to_cxcywh(anchors)
        shifts = (boxes[..., :2] - anchors[..., :2]) / anchors[..., 2:]
        return torch.cat([shifts, (boxes[..., 2:] / anchors[..., 2:]).log()], dim=-1)

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """
        The boxes that deltas stand for; inverts `encode` up to the bound on growth.

        Args:
            deltas (`torch.Tensor` of shape `(..., A, 4)`): (dx, dy, dw, dh).
            anchors (`torch.Tensor` of shape `(A, 4)`): xyxy, input pixels.

        Returns:
            `torch.Tensor` of shape `(..., A, 4)`: xyxy, input pixels; may reach out of the image.
        """
        anchors = box_xyxy_to_cxcywh(anchors)
        centers = anchors[..., :2] + deltas[..., :2] * anchors[..., 2:]
        sides = anchors[..., 2:] * deltas[..., 2:].clamp(max=MAX_LOG_GROWTH).exp()
        return box_cxcywh_to_xyxy(torch.cat([centers, sides], dim=-1))
