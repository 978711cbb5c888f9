"""Pixels, masks and labels for the tiny detectors of `conftest.py`."""

import torch


def pixels(batch_size=2, height=64, width=64, seed=0):
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed))


def masks(*sizes, height=64, width=64):
    mask = torch.zeros(len(sizes), height, width, dtype=torch.int64)
    for row, (h, w) in zip(mask, sizes, strict=True):
        row[:h, :w] = 1
    return mask


def labels_of(boxes, class_labels=None, **extra):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    class_labels = [0] * len(boxes) if class_labels is None else class_labels
    return {"boxes": boxes, "class_labels": torch.tensor(class_labels, dtype=torch.int64), **extra}


def assert_same_outputs(one, other, **tolerance):
    for key in ("logits", "pred_boxes"):
        torch.testing.assert_close(getattr(one, key), getattr(other, key), **(tolerance or {"rtol": 0, "atol": 0}))
