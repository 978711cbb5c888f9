# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""
Box formats. xyxy: left, top, right, bottom. cxcywh: centre and sides. GIoU and NMS are torchvision's.

Shape letters: B images, A anchors, M objects.
"""

import torch
from torch import Tensor


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """`(..., 4)` cxcywh → `(..., 4)` xyxy, in the same units."""
    centers, sides = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centers - sides / 2, centers + sides / 2], dim=-1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """`(..., 4)` xyxy → `(..., 4)` cxcywh, in the same units."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(top_left + bottom_right) / 2, bottom_right - top_left], dim=-1)


def scale_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """
    Normalised boxes → pixels.

    Args:
        boxes (`torch.Tensor` of shape `(B, A, 4)` or `(M, 4)`): xyxy or cxcywh.
        sizes (`torch.Tensor` of shape `(B, 2)` or `(2,)`): (height, width) of each image.
    """
    factors = sizes.flip(-1).repeat(*[1] * (sizes.dim() - 1), 2).to(boxes.dtype)  # (w, h, w, h)
    return boxes * factors.unsqueeze(-2)


def normalize_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """
    Boxes in pixels → clipped to their image and divided by its sides; `scale_boxes` inverts it.

    Args:
        boxes (`torch.Tensor` of shape `(B, A, 4)`): xyxy, pixels.
        sizes (`torch.Tensor` of shape `(B, 2)`): (height, width) of each image.
    """
    factors = sizes.flip(-1).repeat(*[1] * (sizes.dim() - 1), 2).to(boxes.dtype)
    return (boxes / factors.unsqueeze(-2)).clamp(0, 1)


def broadcast_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """
    IoU of boxes, xyxy, that broadcast against each other: `(..., 4)`, `(..., 4)` → `(...)`.

    torchvision's `box_iou` compares all with all, in tables of pairs of coordinates: several times slower.
    """
    left, top, right, bottom = boxes.unbind(-1)
    other_left, other_top, other_right, other_bottom = others.unbind(-1)
    # In place where it can be: the time goes into reading and writing the tables.
    overlap = torch.minimum(right, other_right).sub_(torch.maximum(left, other_left)).clamp_(min=0)
    overlap *= torch.minimum(bottom, other_bottom).sub_(torch.maximum(top, other_top)).clamp_(min=0)
    union = (right - left) * (bottom - top) + (other_right - other_left) * (other_bottom - other_top)
    return overlap.div_(union.sub_(overlap))


def share_inside(boxes: Tensor, region: Tensor) -> Tensor:
    """The share of each box's area that lies in a region, all xyxy: `(A, 4)`, `(4,)` → `(A,)`."""
    overlap = (torch.minimum(boxes[:, 2:], region[2:]) - torch.maximum(boxes[:, :2], region[:2])).clamp(min=0)
    sides = boxes[:, 2:] - boxes[:, :2]
    return overlap.prod(dim=1) / sides.prod(dim=1)
