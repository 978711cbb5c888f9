"""One split on its way from an annotation format to a data set: a table of images and a flat table of objects."""

import math
from array import array
from collections.abc import Iterable, MutableSequence, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, NamedSplit, concatenate_datasets
from datasets.table import InMemoryTable

from .problems import ProblemLog
from .row_format import OBJECT_FIELDS, detection_features


def is_integer(value: Any) -> bool:
    """Whether a value of a JSON file is an integer that fits into 64 bits."""
    return type(value) is int and abs(value) < 2**63


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number, finite or not."""
    return type(value) is float or is_integer(value)


def _around_rotated(bbox: Sequence[float], rotation: float) -> list[float]:
    x, y, width, height = bbox
    cosine, sine = abs(math.cos(math.radians(rotation))), abs(math.sin(math.radians(rotation)))
    new_width, new_height = width * cosine + height * sine, width * sine + height * cosine
    return [x + (width - new_width) / 2, y + (height - new_height) / 2, new_width, new_height]


class Annotations:
    """
    Images and objects of one split: a reader adds them, `checks.py` finds the invalid ones, `to_dataset` takes the
    rest.

    Args:
        source (`str`): The file, or data set and split, that messages name.
        problems (`ProblemLog`): Where invalid entries are reported.
    """

    def __init__(self, source: str, problems: ProblemLog) -> None:
        self.source = source
        self.problems = problems
        self.image_ids: MutableSequence[int] = array("q")
        self.image_names: list[str] = []
        self.image_paths: Sequence[str] = []  # a reader of files sets it; empty where the images are embedded
        self.images: Dataset | None = None  # the column "image", where the images are embedded
        self.groups: list[Any] = []  # of each image, where a column was asked for by `group_by`
        self.class_names: list[str] = []  # in the order of the labels
        self.boxes_are_fractions = False  # YOLO's, until the sizes of the images are known
        # Arrays of 64 bits: as Python numbers, COCO's objects would take four times the memory.
        self.widths: MutableSequence[int] = array("q")  # 0 where the annotations do not say
        self.heights: MutableSequence[int] = array("q")
        self.keep_image: list[bool] = []
        self.rows: MutableSequence[int] = array("q")  # of the object's image
        self.object_ids: MutableSequence[int] = array("q")
        self.boxes: MutableSequence[float] = array("d")  # four per object: xywh, original pixels
        self.labels: MutableSequence[int] = array("q")
        self.areas: MutableSequence[float] = array("d")  # NaN where the annotations do not say
        self.iscrowd: MutableSequence[int] = array("b")

    def add_image(self, image_id: int, name: str, width: int | None, height: int | None) -> None:
        """Add an image; its row is the number of images before it."""
        self.image_ids.append(image_id)
        self.image_names.append(name)
        self.widths.append(width or 0)
        self.heights.append(height or 0)
        self.keep_image.append(True)

    def add_object(
        self,
        row: int,
        object_id: int,
        bbox: Any,
        label: int,
        area: Any = None,
        iscrowd: Any = None,
        rotation: float = 0.0,
    ) -> None:
        """
        Add an object whose box is made of four numbers; report one whose is not. Of a box that is turned about its
        middle, by `rotation` degrees, the upright box around it is taken.
        """
        if not (isinstance(bbox, list | tuple) and len(bbox) == 4 and all(map(is_number, bbox))):
            problem = "unusable object", f'field "bbox" is {bbox!r:.80}, not four numbers'
        elif area is not None and not (is_number(area) and 0 <= area < float("inf")):
            problem = "unusable area", f'field "area" is {area!r:.80}'
        elif iscrowd not in (None, 0, 1):
            problem = "unusable iscrowd", f'field "iscrowd" is {iscrowd!r:.80}'
        else:
            if math.isfinite(rotation) and rotation % 180:
                bbox = _around_rotated(bbox, rotation)
                self.report("rotated box", f"it is turned by {rotation} degrees", row, object_id, bbox)
            self.rows.append(row)
            self.object_ids.append(object_id)
            self.boxes.extend(bbox)
            self.labels.append(label)
            self.areas.append(float("nan") if area is None else area)
            self.iscrowd.append(int(iscrowd or 0))
            return
        self.report(problem[0], problem[1], row, object_id)

    def drop_image(self, row: int, kind: str, what: str) -> None:
        """Report an image and mark it, so that it is left out with its objects."""
        self.report(kind, what, row)
        self.keep_image[row] = False

    def report(
        self, kind: str, what: str, row: int, object_id: int | None = None, bbox: Sequence[float] | None = None
    ) -> None:
        """Report what is wrong with an image, or with an object in it and its box (xywh, original pixels)."""
        image = self.image_paths[row] if row < len(self.image_paths) else None
        box = None if bbox is None else (bbox[0], bbox[1], bbox[2], bbox[3])
        size = (self.widths[row], self.heights[row]) if self.widths[row] and self.heights[row] else None
        self.problems.add(kind, self.where(row, object_id), what, image, box, size)

    def where(self, row: int, object_id: int | None = None) -> str:
        """The words that name an image, or an object in it, in messages."""
        image = f'image {self.image_ids[row]} ("{self.image_names[row]}")'
        return f"{self.source}: {image}" if object_id is None else f"{self.source}: annotation {object_id} of {image}"

    def object_columns(self) -> dict[str, np.ndarray]:
        """All objects as arrays of M entries: "row", "bbox" `(M, 4)` and the other fields of the row format."""
        return {
            "row": np.array(self.rows, dtype=np.int64),
            "id": np.array(self.object_ids, dtype=np.int64),
            "bbox": np.array(self.boxes, dtype=np.float64).reshape(-1, 4),
            "category": np.array(self.labels, dtype=np.int64),
            "area": np.array(self.areas, dtype=np.float64),
            "iscrowd": np.array(self.iscrowd, dtype=np.int64),
        }

    def to_dataset(
        self, images: Dataset, objects: dict[str, np.ndarray], class_names: Sequence[str], split: str
    ) -> Dataset:
        """
        The images that are kept, with these objects, in the row format (`row_format.py`).

        Args:
            images (`Dataset`): The column "image" with a row per image.
            objects (`dict[str, np.ndarray]`): As of `object_columns`, without the invalid ones. They are numbered if
                an id occurs twice: on the Hub, many data sets number the objects of each image.
            class_names (`Sequence[str]`): Names in the order of the labels.
            split (`str`): Name of the split.
        """
        features = detection_features(class_names)
        if len(np.unique(objects["id"])) < len(objects["id"]):
            objects = objects | {"id": np.arange(len(objects["id"]))}
        order = np.argsort(objects["row"], kind="stable")
        counts = np.bincount(objects["row"], minlength=len(self.image_ids))
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
        values = {field: pa.array(objects[field][order]) for field in OBJECT_FIELDS if field != "bbox"}
        values["bbox"] = pa.ListArray.from_arrays(
            pa.array(np.arange(0, 4 * len(order) + 1, 4), pa.int32()), pa.array(objects["bbox"][order].ravel())
        )
        columns = {
            "image_id": pa.array(np.array(self.image_ids, dtype=np.int64)),
            "width": pa.array(np.array(self.widths, dtype=np.int64)),
            "height": pa.array(np.array(self.heights, dtype=np.int64)),
            "objects": pa.StructArray.from_arrays(
                [pa.ListArray.from_arrays(offsets, values[field]) for field in OBJECT_FIELDS], names=OBJECT_FIELDS
            ),
        }
        info = DatasetInfo(features=Features({name: features[name] for name in columns}))
        others = Dataset(InMemoryTable.from_pydict(columns), info=info)
        dataset = concatenate_datasets([images, others], axis=1, split=NamedSplit(split))
        if not all(self.keep_image):
            dataset = dataset.select(np.flatnonzero(self.keep_image))
        return dataset


def sort_classes(splits: Iterable[Annotations], labels: dict[str, int], listed: Sequence[str]) -> None:
    """
    Name the classes of splits whose labels were given out in the order in which the classes occurred.

    Args:
        splits (`Iterable[Annotations]`): Their `class_names` are set and their labels numbered anew.
        labels (`dict[str, int]`): Label of each class so far.
        listed (`Sequence[str]`): The classes in the order of a list that came with the data; empty for sorted names.
    """
    names = listed or sorted(labels)
    new_labels = {labels[name]: label for label, name in enumerate(names)}
    for annotations in splits:
        annotations.class_names = list(names)
        annotations.labels = array("q", [new_labels[label] for label in annotations.labels])
