"""
How well a setting of anchors covers the boxes of a data set, and one that covers them better.

Shape letters: M objects, P prototypes: every size of every level in every ratio.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .data.statistics import SplitTable
from .model.anchors import make_anchors

CHUNK = 8192  # objects at a time: the (M, P) table of a large data set would fill the memory
MAX_FITTED = 5_000  # objects that a fit looks at: a size more or less exact moves no coverage
NUM_STARTS = 5
MAX_STEPS = 30
COVERED_IOU = 0.5
# A suggestion must gain this much, on the objects it was fitted to: less is chance, and every change of the anchors
# is one more thing that differs from what is published.
MIN_GAIN = 0.01


@dataclass(frozen=True)
class AnchorSetting:
    """The fields of [`DiTDetectionConfig`] that the anchors follow from; see there."""

    strides: tuple[int, ...]
    anchor_sizes: tuple[tuple[float, ...], ...]
    aspect_ratios: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Any) -> "AnchorSetting":
        """The setting of a [`DiTDetectionConfig`]."""
        return cls(tuple(config.strides), tuple(map(tuple, config.anchor_sizes)), tuple(config.aspect_ratios))

    def to_overrides(self) -> dict[str, list[Any]]:
        """Arguments of [`DiTDetectionConfig`], ready for JSON."""
        return {
            "strides": list(self.strides),
            "anchor_sizes": [list(sizes) for sizes in self.anchor_sizes],
            "aspect_ratios": list(self.aspect_ratios),
        }


def best_anchor_ious(boxes: Tensor, image_sizes: Tensor, setting: AnchorSetting) -> tuple[Tensor, Tensor]:
    """
    The IoU of each object with the anchor that overlaps it most, among all anchors that its image has.

    Exact without looking at every anchor: of two equal shapes the one that is closer on an axis overlaps more on that
    axis, so the best of a prototype stands at the nearest column and the nearest row.

    Args:
        boxes (`torch.Tensor` of shape `(M, 4)`): xyxy, pixels of the canvas.
        image_sizes (`torch.Tensor` of shape `(M, 2)`): (height, width) on the canvas of each object's image, without
            padding: anchors that are centred in the padding do not count.
        setting ([`AnchorSetting`]): The anchors.

    Returns:
        `tuple`: IoUs `(M,)`, float64, 0 where no anchor overlaps; and which prototype it was, `(M,)`, in the order of
        `make_anchors` on maps of one cell.
    """
    widths, heights, strides = _prototypes(setting)  # each (P,)
    ious, best = boxes.new_zeros(len(boxes), dtype=torch.float64), boxes.new_zeros(len(boxes), dtype=torch.int64)
    for start in range(0, len(boxes), CHUNK):
        left, top, right, bottom = boxes[start : start + CHUNK].double().T[:, :, None]  # each (M, 1)
        height, width = image_sizes[start : start + CHUNK].double().T[:, :, None]
        overlap = _overlap(left, right, width, widths, strides) * _overlap(top, bottom, height, heights, strides)
        union = (right - left) * (bottom - top) + widths * heights - overlap  # (M, P)
        ious[start : start + CHUNK], best[start : start + CHUNK] = (overlap / union).max(dim=1)
    return ious, best


def coverage(ious: Tensor) -> dict[str, float]:
    """`objects`, `covered` (the share whose best anchor reaches IoU 0.5) and `mean_iou`; -1 is COCO's "undefined"."""
    if not len(ious):
        return {"objects": 0, "covered": -1.0, "mean_iou": -1.0}
    return {
        "objects": len(ious),
        "covered": float((ious >= COVERED_IOU).double().mean()),
        "mean_iou": float(ious.mean()),
    }


def fit_anchors(boxes: Tensor, image_sizes: Tensor, setting: AnchorSetting, seed: int = 0) -> AnchorSetting:
    """
    Find sizes and ratios that cover the boxes better, as many as a setting has and on its strides.

    k-means with 1 - IoU as distance, as YOLOv2 does it (arXiv 1612.08242), with two differences. The means are those
    of our configuration: sizes per level, and ratios that all levels share. And the IoU is the one with the real
    anchor at its place: large anchors that stand 128 pixels apart cover less than their shape promises.

    Args:
        boxes (`torch.Tensor` of shape `(M, 4)`): xyxy, pixels of the canvas.
        image_sizes (`torch.Tensor` of shape `(M, 2)`): As of `best_anchor_ious`.
        setting ([`AnchorSetting`]): Where to start from.
        seed (`int`): Of the other starts, and of the sample that is looked at in a large data set.

    Returns:
        [`AnchorSetting`]: `setting` itself if nothing covers the boxes better, or there are none.
    """
    if not len(boxes):
        return setting
    generator = torch.Generator().manual_seed(seed)
    if len(boxes) > MAX_FITTED:
        sample = torch.randperm(len(boxes), generator=generator)[:MAX_FITTED]
        boxes, image_sizes = boxes[sample], image_sizes[sample]
    best, best_score = setting, (-1.0, -1.0)
    for candidate in _starts(boxes, setting, generator):
        members = torch.empty(0)
        for _ in range(MAX_STEPS):
            ious, prototype = best_anchor_ious(boxes, image_sizes, candidate)
            found = coverage(ious)
            # Shares that differ by less than a thousandth count as equal: then the mean IoU decides.
            score = round(found["covered"], 3), found["mean_iou"]
            if score > best_score:
                best, best_score = candidate, score
            if torch.equal(prototype, members):
                break
            members = prototype
            candidate = _move_to_means(boxes[ious > 0], members[ious > 0], candidate)
    if best is setting:
        return setting
    sizes = tuple(tuple(round(size, 2) for size in level) for level in best.anchor_sizes)
    return AnchorSetting(setting.strides, sizes, tuple(round(ratio, 3) for ratio in best.aspect_ratios))


def fit_to_splits(tables: dict[str, SplitTable], setting: AnchorSetting, seed: int = 0) -> tuple[AnchorSetting, bool]:
    """
    Fit anchors to the objects of the split `train`.

    Args:
        tables (`dict[str, SplitTable]`): The splits by name; those that are neither `train` nor `validation` are not
            looked at.
        setting ([`AnchorSetting`]): Where to start from.
        seed (`int`): As of `fit_anchors`.

    Returns:
        `tuple`: The fitted setting, and whether it is worth the change: it covers at least a hundredth more of the
        objects of `train`, and of `validation`, which it was not fitted to, no fewer.
    """
    boxes, image_sizes = boxes_of(tables["train"])
    fitted = fit_anchors(boxes, image_sizes, setting, seed)
    gains = {}
    for split in ("train", "validation"):
        if split in tables:
            boxes, image_sizes = boxes_of(tables[split])
            old, new = (coverage(best_anchor_ious(boxes, image_sizes, anchors)[0]) for anchors in (setting, fitted))
            gains[split] = new["covered"] - old["covered"]
    return fitted, gains["train"] >= MIN_GAIN and gains.get("validation", 0) >= 0


def boxes_of(table: SplitTable) -> tuple[Tensor, Tensor]:
    """What anchors are to cover, as `best_anchor_ious` takes it: boxes and image sizes, without the crowd regions."""
    counts = table.iscrowd == 0
    return torch.from_numpy(table.canvas_boxes[counts]), torch.from_numpy(table.canvas_sizes[table.rows][counts])


def _prototypes(setting: AnchorSetting) -> tuple[Tensor, Tensor, Tensor]:
    """Width, height and stride of each prototype, `(P,)`, float64, in the order level, ratio, size."""
    anchors = make_anchors(
        [(1, 1)] * len(setting.strides), setting.strides, setting.anchor_sizes, setting.aspect_ratios
    ).double()
    strides = torch.tensor(setting.strides, dtype=torch.float64).repeat_interleave(
        len(anchors) // len(setting.strides)
    )
    return anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1], strides


def _overlap(low: Tensor, high: Tensor, image_side: Tensor, side: Tensor, stride: Tensor) -> Tensor:
    """On one axis, what objects `(M, 1)` share with the nearest anchors of the prototypes `(P,)`: `(M, P)`, pixels."""
    # Cell i is centred at (i + 0.5) · stride, and takes part if that lies inside the image; the first of the finest
    # cells always does.
    last = (image_side.clamp(min=stride.min()) / stride - 1.5).ceil()  # -1: none does
    nearest = ((low + high) / (2 * stride) - 0.5).round().clamp(min=0).minimum(last)
    center = (nearest + 0.5) * stride
    overlap = (center + side / 2).minimum(high) - (center - side / 2).maximum(low)
    return overlap.clamp(min=0).masked_fill(last < 0, 0)


def _starts(boxes: Tensor, setting: AnchorSetting, generator: torch.Generator) -> Iterator[AnchorSetting]:
    """The setting itself, quantiles of the boxes, and draws from them; the smallest sizes on the finest level."""
    yield setting
    sizes, ratios = _shapes(boxes)
    num_levels, num_ratios = len(setting.strides), len(setting.aspect_ratios)
    num_sizes = num_levels * len(setting.anchor_sizes[0])
    for start in range(1, NUM_STARTS):
        shares = []
        for count in (num_sizes, num_ratios):
            even = (torch.arange(count, dtype=torch.float64) + 0.5) / count
            drawn = torch.rand(count, generator=generator, dtype=torch.float64).sort().values
            shares.append(even if start == 1 else drawn)
        yield AnchorSetting(
            setting.strides,
            _by_level(sizes.quantile(shares[0]), num_levels),
            tuple(ratios.quantile(shares[1]).tolist()),
        )


def _move_to_means(boxes: Tensor, members: Tensor, setting: AnchorSetting) -> AnchorSetting:
    """Lloyd's step: each size and ratio becomes the geometric mean over the boxes `(M, 4)` it is best for."""
    log_sizes, log_ratios = (values.log() for values in _shapes(boxes))
    per_level, num_ratios = len(setting.anchor_sizes[0]), len(setting.aspect_ratios)
    level, within = members // (num_ratios * per_level), members % (num_ratios * per_level)
    sizes = torch.tensor(setting.anchor_sizes, dtype=torch.float64).flatten()
    sizes = _means(log_sizes, level * per_level + within % per_level, sizes)
    ratios = _means(log_ratios, within // per_level, torch.tensor(setting.aspect_ratios, dtype=torch.float64))
    return AnchorSetting(setting.strides, _by_level(sizes, len(setting.strides)), tuple(sorted(ratios.tolist())))


def _by_level(sizes: Tensor, num_levels: int) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(sorted(row)) for row in sizes.reshape(num_levels, -1).tolist())


def _shapes(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of the area and height / width of each box, both `(M,)`."""
    widths, heights = (boxes[:, 2:] - boxes[:, :2]).double().unbind(1)
    return (widths * heights).sqrt(), heights / widths


def _means(logs: Tensor, index: Tensor, default: Tensor) -> Tensor:
    """Geometric mean of each group; the default where a group is empty."""
    counts = torch.bincount(index, minlength=len(default))
    totals = torch.bincount(index, weights=logs, minlength=len(default))
    return torch.where(counts > 0, (totals / counts.clamp(min=1)).exp(), default)
