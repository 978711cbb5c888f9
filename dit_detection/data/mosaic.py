"""Augmentations that put several images together: mosaic and box copy-paste."""

import math
from collections.abc import Sequence

import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from .target import DetectionTarget, Sample, box_area, crop, join, move

MID_GREY = 128  # becomes 0 once pixel values are scaled to [-1, 1]

MAX_PASTED = 4  # objects per image
MARGIN = 4  # pixels around a pasted box in which it fades into its new surroundings

_Region = tuple[int, int, int, int]  # left, top, right, bottom


def mosaic(samples: Sequence[Sample], generator: torch.Generator) -> Sample:
    """
    Four images on a canvas as large as the first one, each cut at random to its corner of it.

    The corners meet in the middle half of the canvas. Images of other sizes are first scaled to fit the canvas, so
    objects keep their size up to that. What no image covers is mid-grey.

    Source: YOLOv4 (arXiv 2004.10934), section 3.3.
    """
    height, width = samples[0][0].shape[-2:]
    middle_x, middle_y = (
        round(side * (0.25 + 0.5 * float(torch.rand((), generator=generator)))) for side in (width, height)
    )
    corners: list[_Region] = [
        (0, 0, middle_x, middle_y),
        (middle_x, 0, width, middle_y),
        (0, middle_y, middle_x, height),
        (middle_x, middle_y, width, height),
    ]
    canvas = torch.full((3, height, width), MID_GREY, dtype=torch.uint8)
    targets = []
    for index, (left, top, right, bottom) in zip(torch.randperm(4, generator=generator), corners, strict=True):
        image, target = _fit(samples[int(index)], height, width)
        # The part of the image that is shown, and its place: one of the two has no choice.
        shown_height, shown_width = min(bottom - top, image.shape[-2]), min(right - left, image.shape[-1])
        from_left = _draw(image.shape[-1] - shown_width, generator)
        from_top = _draw(image.shape[-2] - shown_height, generator)
        to_left = left + _draw(right - left - shown_width, generator)
        to_top = top + _draw(bottom - top - shown_height, generator)
        canvas[:, to_top : to_top + shown_height, to_left : to_left + shown_width] = image[
            :, from_top : from_top + shown_height, from_left : from_left + shown_width
        ]
        shown = crop(target, from_left, from_top, (shown_height, shown_width))
        targets.append(move(shown, to_left, to_top, (height, width)))
    return tv_tensors.Image(canvas), join(targets)


def copy_paste(sample: Sample, source: Sample, generator: torch.Generator) -> Sample:
    """
    Paste up to `MAX_PASTED` objects of another image, whole and as the rectangles of their boxes, at random places.

    Objects longer than half the canvas and crowd regions are not taken. Other objects of `source` come along as far as
    they lie in such a box. Around it, its surroundings fade in. Rectangles do not overlap each other; what they cover
    of an object counts as no longer visible, and its box stays.

    Source: Simple Copy-Paste (arXiv 2012.07177), with boxes in place of masks.
    """
    image, target = sample
    height, width = image.shape[-2:]
    source_image, source_target = _fit(source, height, width)
    boxes = source_target["boxes"].as_subclass(torch.Tensor)
    sides = boxes[:, 2:] - boxes[:, :2]
    suitable = (sides <= torch.tensor([width, height]) / 2).all(dim=1) & (source_target["iscrowd"] == 0)
    candidates = suitable.nonzero()[:, 0]
    count = 1 + _draw(MAX_PASTED - 1, generator)
    chosen = candidates[torch.randperm(len(candidates), generator=generator)][:count]

    canvas = image.as_subclass(torch.Tensor).clone()
    regions: list[_Region] = []
    pasted = []
    for box in boxes[chosen].tolist():
        core, (x0, y0, x1, y1) = _around(box, tuple(source_image.shape[-2:]))
        left, top = _draw(width - (x1 - x0), generator), _draw(height - (y1 - y0), generator)
        region = (left, top, left + x1 - x0, top + y1 - y0)
        if any(_overlap(region, other) for other in regions):
            continue
        regions.append(region)
        weight = _fading(core, (x0, y0, x1, y1))
        below = canvas[:, region[1] : region[3], region[0] : region[2]]
        patch = source_image.as_subclass(torch.Tensor)[:, y0:y1, x0:x1]
        below.copy_((patch * weight + below * (1 - weight)).round().to(torch.uint8))
        inside = crop(source_target, core[0], core[1], (core[3] - core[1], core[2] - core[0]))
        pasted.append(move(inside, left + core[0] - x0, top + core[1] - y0, (height, width)))
    return tv_tensors.wrap(canvas, like=image), join([_cover(target, regions), *pasted])


def _draw(largest: int, generator: torch.Generator) -> int:
    """A whole number from 0 to `largest`."""
    return int(torch.randint(largest + 1, (), generator=generator))


def _fit(sample: Sample, height: int, width: int) -> Sample:
    """Scaled, its aspect ratio kept, to the largest size that fits."""
    image, target = sample
    old_height, old_width = image.shape[-2:]
    scale = min(height / old_height, width / old_width)
    new_height, new_width = max(1, round(old_height * scale)), max(1, round(old_width * scale))
    if (new_height, new_width) == (old_height, old_width):
        return sample
    factor_x, factor_y = new_width / old_width, new_height / old_height
    boxes = target["boxes"].as_subclass(torch.Tensor) * torch.tensor([factor_x, factor_y] * 2)
    scaled: DetectionTarget = {
        **target,
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(new_height, new_width)),
        "area": target["area"] * (factor_x * factor_y),
    }
    # In floating point: torch (2.15) fails to scale 8-bit images of one column to one pixel.
    pixels = F.resize(image.as_subclass(torch.Tensor).float(), [new_height, new_width], antialias=True)
    return tv_tensors.Image(pixels.round_().clamp_(0, 255).to(torch.uint8)), scaled


def _around(box: Sequence[float], image_size: tuple[int, ...]) -> tuple[_Region, _Region]:
    """The pixels that a box touches, and those with `MARGIN` more on each side, as far as the image has them."""
    height, width = image_size
    left, top = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
    right, bottom = min(width, math.ceil(box[2])), min(height, math.ceil(box[3]))
    region = (max(0, left - MARGIN), max(0, top - MARGIN), min(width, right + MARGIN), min(height, bottom + MARGIN))
    return (left, top, right, bottom), region


def _fading(core: _Region, region: _Region) -> torch.Tensor:
    """Weight of each pixel of `region` `(h, w)`: 1 on `core`, falling to 0 just outside a margin around it."""

    def along(start: int, end: int, core_start: int, core_end: int) -> torch.Tensor:
        position = torch.arange(start, end)
        distance = torch.maximum(core_start - position, position - (core_end - 1)).clamp(min=0)
        return 1 - distance / (MARGIN + 1)

    across, down = along(region[0], region[2], core[0], core[2]), along(region[1], region[3], core[1], core[3])
    return torch.minimum(across[None, :], down[:, None])


def _overlap(first: _Region, second: _Region) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def _cover(target: DetectionTarget, regions: Sequence[_Region]) -> DetectionTarget:
    """Areas and visible shares of objects over which rectangles that do not overlap each other were painted."""
    boxes = target["boxes"].as_subclass(torch.Tensor)
    covered = torch.zeros(len(boxes))
    for region in torch.tensor(regions, dtype=boxes.dtype).reshape(-1, 4):
        low, high = torch.maximum(boxes[:, :2], region[:2]), torch.minimum(boxes[:, 2:], region[2:])
        covered += (high - low).clamp(min=0).prod(dim=1)
    left_over = (1 - covered / box_area(boxes).clamp(min=1e-6)).clamp(min=0)
    return {**target, "area": target["area"] * left_over, "visible": target["visible"] * left_over}
