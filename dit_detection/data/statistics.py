"""A data set in numbers: its images, objects and classes. Shape letters: N images, M objects, of one split."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from .image_scan import ImageFacts

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
# COCO's limits, by the annotated area in original pixels.
SMALL, MEDIUM = 32**2, 96**2


@dataclass(frozen=True)
class SplitTable:
    """
    One split as flat arrays; objects come in the order of their images.

    Args:
        name (`str`): Of the split.
        dataset (`Dataset`): In the row format (`row_format.py`), images not decoded.
        image_ids, widths, heights (`(N,)` int64): Of the images, original pixels.
        rows (`(M,)` int64): Of each object's image.
        bbox (`(M, 4)` float64): xywh, original pixels.
        labels, areas, iscrowd (`(M,)`): As in the row format.
        canvas_sizes (`(N, 2)` float64): (height, width) of the images on the canvas, without padding.
    """

    name: str
    dataset: Dataset
    image_ids: NDArray[np.int64]
    widths: NDArray[np.int64]
    heights: NDArray[np.int64]
    rows: NDArray[np.int64]
    bbox: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    iscrowd: NDArray[np.int64]
    canvas_sizes: NDArray[np.float64]

    @property
    def canvas_boxes(self) -> NDArray[np.float64]:
        """`(M, 4)`: xyxy, pixels of the canvas."""
        scale_y, scale_x = self.canvas_sizes[self.rows].T / np.array([self.heights, self.widths])[:, self.rows]
        x, y, width, height = self.bbox.T
        return np.stack([x * scale_x, y * scale_y, (x + width) * scale_x, (y + height) * scale_y], axis=1)

    @property
    def size_classes(self) -> dict[str, NDArray[np.bool_]]:
        """By COCO's name, `(M,)`: which objects are of that size. Limits as in `metrics.py`."""
        small, large = self.areas <= SMALL, self.areas > MEDIUM
        return {"small": small, "medium": ~small & ~large, "large": large}


def read_table(name: str, dataset: Dataset, canvas: tuple[int, int]) -> SplitTable:
    """
    Read the annotations of a split into arrays; no image is opened.

    Args:
        name (`str`): Of the split.
        dataset (`Dataset`): In the row format.
        canvas (`tuple[int, int]`): (height, width) that the image processor fits images into.
    """
    dataset = dataset.with_format(None).cast_column("image", type(dataset.features["image"])(decode=False))
    columns = ["image_id", "width", "height", "objects"]
    table = dataset.select_columns(columns).with_format("arrow")[:].combine_chunks()
    image_ids, widths, heights = (table[column].to_numpy() for column in columns[:3])
    objects = pa.concat_arrays(table["objects"].chunks) if table.num_rows else None

    def values(field: str) -> NDArray[Any]:
        return np.zeros(0) if objects is None else objects.field(field).flatten().to_numpy(zero_copy_only=False)

    counts = np.zeros(0, np.int64)
    bbox = np.zeros((0, 4))
    if objects is not None:
        counts = objects.field("bbox").value_lengths().to_numpy(zero_copy_only=False)
        bbox = objects.field("bbox").flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
    scale = np.minimum(canvas[0] / heights, canvas[1] / widths)
    # As the image processor rounds: no side becomes 0.
    canvas_sizes = np.maximum(1, np.round(np.stack([heights * scale, widths * scale], axis=1)))
    return SplitTable(
        name=name,
        dataset=dataset,
        image_ids=image_ids,
        widths=widths,
        heights=heights,
        rows=np.repeat(np.arange(len(counts)), counts),
        bbox=bbox,
        labels=values("category").astype(np.int64),
        areas=values("area").astype(np.float64),
        iscrowd=values("iscrowd").astype(np.int64),
        canvas_sizes=canvas_sizes,
    )


def describe_split(table: SplitTable, class_names: list[str], facts: list[ImageFacts]) -> dict[str, Any]:
    """
    The numbers of one split, ready for JSON.

    Args:
        table ([`SplitTable`]): The split.
        class_names (`list[str]`): Names in the order of the labels.
        facts (`list[ImageFacts]`): Of its images, in their order.

    Returns:
        `dict`: Counts; "boxes_per_image"; and quantiles, by their percentage: "relative_size" (square root of the
        share of the image that a box covers), "canvas_size" (square root of a box's area, pixels of the canvas),
        "canvas_short_side" (pixels of the canvas) and "aspect_ratio" (height / width). Crowd regions count as objects.
    """
    per_image = np.bincount(table.rows, minlength=len(table.widths))
    labels = np.bincount(table.labels, minlength=len(class_names))
    sides = table.canvas_boxes[:, 2:] - table.canvas_boxes[:, :2]
    image_areas = (table.widths * table.heights)[table.rows]
    sizes = Counter(f"{width} x {height}" for width, height in zip(table.widths, table.heights, strict=True))
    return {
        "images": len(table.widths),
        "images_without_objects": int((per_image == 0).sum()),
        "objects": len(table.rows),
        "crowd_regions": int(table.iscrowd.sum()),
        "boxes_per_image": _quantiles(per_image),
        "classes": {name: int(count) for name, count in zip(class_names, labels, strict=True)},
        "size_classes": {name: int(mask.sum()) for name, mask in table.size_classes.items()},
        "relative_size": _quantiles(np.sqrt(table.bbox[:, 2:].prod(axis=1) / image_areas)),
        "canvas_size": _quantiles(np.sqrt(sides.prod(axis=1))),
        "canvas_short_side": _quantiles(sides.min(axis=1, initial=np.inf)),
        "aspect_ratio": _quantiles(table.bbox[:, 3] / table.bbox[:, 2]),
        "image_sizes": dict(sizes.most_common()),
        "modes": dict(Counter(fact.mode for fact in facts if fact.mode).most_common()),
        "file_formats": dict(Counter(fact.format for fact in facts if fact.format).most_common()),
    }


def _quantiles(values: NDArray[Any]) -> dict[str, float]:
    """By percentage; empty without values."""
    if not len(values):
        return {}
    found = np.quantile(values, QUANTILES)
    return {f"{share:.0%}": round(float(value), 4) for share, value in zip(QUANTILES, found, strict=True)}
