# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""Labels of a batch as rectangles. Shape letters: B images, M objects."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .boxes import box_cxcywh_to_xyxy, scale_boxes

# Class of the rows that fill up a rectangle; what Trainer pads with.
PADDING = -100


def pad_labels(labels: Sequence[Mapping[str, Tensor]], num_labels: int) -> dict[str, Tensor]:
    """
    The labels of a batch as rectangles, which the model takes in the place of the list.

    Make them before a compiled model is called: `torch.compile` compiles anew for new numbers of objects in a list,
    and once or twice in all for rectangles.

    Args:
        labels: Per image `class_labels` `(M,)`, `boxes` `(M, 4)` and, optionally, `iscrowd` `(M,)` and `size` `(2,)`.
        num_labels (`int`): Classes of the model.

    Returns:
        `dict`: `class_labels` `(B, M)` int64, `PADDING` in the rows that fill up; `boxes` `(B, M, 4)` float32;
        `iscrowd` `(B, M)` bool; `size` `(B, 2)` float32 if all images have it. M is at least 2: 0 and 1 are sizes of
        their own to `torch.compile`.

    Raises:
        ValueError: If an image's labels differ in number, or, where that can be seen without waiting for a device, a
            class is not one of the model's or a box not one in [0, 1].
    """
    classes, boxes, crowds = [], [], []
    for index, image_labels in enumerate(labels):
        classes.append(image_labels["class_labels"].to(torch.int64))
        boxes.append(image_labels["boxes"].to(torch.float32).reshape(-1, 4))
        iscrowd = image_labels.get("iscrowd")
        crowds.append(torch.zeros_like(classes[-1], dtype=torch.bool) if iscrowd is None else iscrowd.bool())
        if not len(classes[-1]) == len(boxes[-1]) == len(crowds[-1]):
            raise ValueError(
                f"labels[{index}] has {len(classes[-1])} class_labels, {len(boxes[-1])} boxes and {len(crowds[-1])} "
                f"iscrowd: one of each per object is needed."
            )
        if classes[-1].device.type == "cpu" and not torch.compiler.is_compiling():
            _check_boxes(boxes[-1], index)
            for label in classes[-1][(classes[-1] < 0) | (classes[-1] >= num_labels)].tolist():
                raise ValueError(
                    f"labels[{index}]['class_labels'] has {label}, but num_labels={num_labels}: classes are numbered "
                    f"from 0 to {num_labels - 1}. Give the model the `id2label` of the data, or renumber the classes."
                )
    padded = {
        "class_labels": _pad(classes, PADDING),
        "boxes": _pad(boxes, 0.0),
        "iscrowd": _pad(crowds, 0.0),
    }
    if all("size" in image_labels for image_labels in labels):
        sizes = torch.stack([torch.as_tensor(image_labels["size"]) for image_labels in labels])
        padded["size"] = sizes.to(torch.float32)
    return padded


def make_targets(labels: Mapping[str, Tensor], sizes: Tensor) -> dict[str, Tensor]:
    """
    What [`DetectionLoss`] reads.

    Args:
        labels: As `pad_labels` gives them; `iscrowd` may be missing, `matched_idxs` may be there.
        sizes (`torch.Tensor` of shape `(B, 2)`): (height, width) of each image on its canvas, without the padding.

    Returns:
        `dict`: On the device of `sizes`, `boxes` `(B, M, 4)` xyxy, input pixels, every side longer than 0;
        `class_labels` `(B, M)`; `iscrowd` `(B, M)` bool; `matched_idxs` as it is.

    Raises:
        ValueError: If labels and images differ in number.
    """
    if len(labels["boxes"]) != len(sizes):
        raise ValueError(f"There are labels of {len(labels['boxes'])} images, but {len(sizes)} images.")
    boxes = scale_boxes(labels["boxes"].to(sizes.device, torch.float32), sizes)
    # A side of 0 has no logarithm. The image processor refuses such boxes; labels made by hand stay finite.
    boxes = torch.cat([boxes[..., :2], boxes[..., 2:].clamp(min=0.01)], dim=-1)
    class_labels = labels["class_labels"].to(sizes.device, torch.int64)
    iscrowd = labels.get("iscrowd")
    iscrowd = torch.zeros_like(class_labels) if iscrowd is None else iscrowd.to(sizes.device)
    targets = {"boxes": box_cxcywh_to_xyxy(boxes), "class_labels": class_labels, "iscrowd": iscrowd.bool()}
    if "matched_idxs" in labels:
        targets["matched_idxs"] = labels["matched_idxs"].to(sizes.device)
    return targets


def _check_boxes(boxes: Tensor, index: int) -> None:
    """Raise ValueError if boxes are in pixels, or not finite. Those that stick out of their image are left."""
    for box in boxes[~(boxes.abs() <= 2).all(dim=1)].tolist():
        raise ValueError(
            f"labels[{index}]['boxes'] has {box}: boxes are (center_x, center_y, width, height), divided by the width "
            "and height of the image, and finite."
        )


def _pad(tables: list[Tensor], value: float) -> Tensor:
    """Tables `(M, ...)` → `(B, M, ...)`, M at least 2."""
    padded = pad_sequence(tables, batch_first=True, padding_value=value)
    missing = max(0, 2 - padded.shape[1])
    return F.pad(padded, (0, 0) * (padded.ndim - 2) + (0, missing), value=value)
