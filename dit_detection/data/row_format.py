"""
The one row format behind every data set, whatever the annotation tool wrote:

    image     `datasets.Image`: a file path or encoded bytes, decoded when it is read
    image_id  unique within its split
    width     of the image as it is annotated, pixels
    height
    objects   {"id": [...], "bbox": [...], "category": [...], "area": [...], "iscrowd": [...]}, one entry per object

`bbox` is (x, y, width, height) in original pixels with x and y of the left upper corner; `category` counts from 0.
Class names travel in the feature `objects["category"]`, so a data set written with `to_parquet` needs no second file.
"""

from collections.abc import Sequence
from typing import Any

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
)

OBJECT_FIELDS = ("id", "bbox", "category", "area", "iscrowd")


def detection_features(class_names: Sequence[str]) -> Features:
    """
    The `datasets.Features` of the row format for these classes.

    Args:
        class_names (`Sequence[str]`): Names in the order of their labels, which count from 0.
    """
    return Features(
        {
            "image": Image(),
            "image_id": Value("int64"),
            "width": Value("int64"),
            "height": Value("int64"),
            "objects": {
                "id": List(Value("int64")),
                "bbox": List(List(Value("float64"))),
                "category": List(ClassLabel(names=list(class_names))),
                "area": List(Value("float64")),
                "iscrowd": List(Value("int64")),
            },
        }
    )


def empty_objects() -> dict[str, list[Any]]:
    """The `objects` entry of an image without objects."""
    return {field: [] for field in OBJECT_FIELDS}


def class_names_of(dataset: Dataset | DatasetDict | IterableDataset | IterableDatasetDict) -> list[str]:
    """Class names of a data set in the row format, in the order of their labels."""
    features = next(iter(dataset.values())).features if isinstance(dataset, dict) else dataset.features
    return list(features["objects"]["category"].feature.names)


def id2label_of(dataset: Dataset | DatasetDict | IterableDataset | IterableDatasetDict) -> dict[int, str]:
    """The `id2label` that a model configuration needs for a data set in the row format."""
    return dict(enumerate(class_names_of(dataset)))
