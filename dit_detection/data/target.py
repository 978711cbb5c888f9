"""The objects of one image while it is augmented, and what happens to them when the image is cut or moved."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F


class DetectionTarget(TypedDict):
    """The objects of one image, aligned: entry i of each belongs to object i."""

    boxes: tv_tensors.BoundingBoxes  # (M, 4) float32, xyxy, pixels
    category: torch.Tensor  # (M,) int64
    area: torch.Tensor  # (M,) float32, pixels; of what is visible
    iscrowd: torch.Tensor  # (M,) int64
    visible: torch.Tensor  # (M,) float32, share of the box's area that is left; 1 in an image as it was annotated


Sample = tuple[tv_tensors.Image, DetectionTarget]  # uint8, (3, H, W)


def box_area(boxes: torch.Tensor) -> torch.Tensor:
    """Areas `(M,)` of xyxy boxes `(M, 4)`."""
    sides = (boxes[:, 2:] - boxes[:, :2]).as_subclass(torch.Tensor)
    return sides[:, 0] * sides[:, 1]


def move(target: DetectionTarget, left: int, top: int, canvas_size: tuple[int, int]) -> DetectionTarget:
    """Objects whose image was placed at (left, top) of a canvas (height, width); boxes may reach over its edges."""
    # A plain shift: F.crop and F.pad would clip the boxes, and how much of each is visible could no longer be told.
    boxes = target["boxes"].as_subclass(torch.Tensor)
    shifted = boxes + torch.tensor([left, top, left, top], dtype=boxes.dtype)
    return {**target, "boxes": tv_tensors.BoundingBoxes(shifted, format="XYXY", canvas_size=canvas_size)}


def crop(target: DetectionTarget, left: int, top: int, size: tuple[int, int]) -> DetectionTarget:
    """Objects in a region (height, width) of their image: boxes clipped, areas in proportion; none without a side."""
    shifted = move(target, -left, -top, size)
    boxes = F.clamp_bounding_boxes(shifted["boxes"])
    left_over = box_area(boxes) / box_area(shifted["boxes"]).clamp(min=1e-6)
    cut: DetectionTarget = {
        **shifted,
        "boxes": boxes,
        "area": target["area"] * left_over,
        "visible": target["visible"] * left_over,
    }
    return select(cut, (boxes[:, 2:] > boxes[:, :2]).as_subclass(torch.Tensor).all(dim=1))


def select(target: DetectionTarget, keep: torch.Tensor) -> DetectionTarget:
    """The objects where `keep` `(M,)` is true."""
    return {
        "boxes": tv_tensors.wrap(target["boxes"].as_subclass(torch.Tensor)[keep], like=target["boxes"]),
        "category": target["category"][keep],
        "area": target["area"][keep],
        "iscrowd": target["iscrowd"][keep],
        "visible": target["visible"][keep],
    }


def join(targets: Sequence[DetectionTarget]) -> DetectionTarget:
    """The objects of several targets on one canvas."""
    boxes = torch.cat([target["boxes"].as_subclass(torch.Tensor) for target in targets])
    return {
        "boxes": tv_tensors.wrap(boxes, like=targets[0]["boxes"]),
        "category": torch.cat([target["category"] for target in targets]),
        "area": torch.cat([target["area"] for target in targets]),
        "iscrowd": torch.cat([target["iscrowd"] for target in targets]),
        "visible": torch.cat([target["visible"] for target in targets]),
    }
