"""Rows that are checked as they pass: for data sets that do not fit the disk, or are not to be opened before."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets import Image as ImageFeature

from .annotations import Annotations, is_integer
from .checks import check_image, check_objects, look_like_fractions
from .hub import add_objects, name_splits, object_columns, object_fields
from .layouts import SPLITS
from .problems import InvalidDatasetError, OnInvalid, ProblemLog
from .row_format import OBJECT_FIELDS, detection_features

MIN_FRACTIONS = 3  # boxes that lie between 0 and 1, before a stream is said to be of fractions
NUM_SHARDS = 64  # of a data set that is at hand; as many workers and processes can share it


def stream_rows(
    loaded: Dataset | DatasetDict | IterableDataset | IterableDatasetDict,
    source: str,
    *,
    on_invalid: OnInvalid = "error",
    class_names: Sequence[str] | None = None,
    validation_fraction: float | None = None,
    seed: int = 0,
) -> IterableDatasetDict:
    """
    Stream a data set in the row format (`row_format.py`), with every row checked as it passes.

    A row that is invalid stops the stream with its name. With `on_invalid="drop"` or `"clip"` it is left out or
    clipped, and the counts of the process so far are logged at the 1st, 10th, 100th, ... problem: a stream need not
    have an end. Rows are not compared with each other, so an image id that occurs twice is not noticed.

    Shards are spread over workers and processes by `datasets`. `shuffle(seed=..., buffer_size=...)` on a split mixes
    the shards and draws from a buffer of rows; a buffer of 1000 photographs that are embedded takes about 150 MB.

    Args:
        loaded (`Dataset`, `DatasetDict`, `IterableDataset` or `IterableDatasetDict`): With the columns "image",
            "image_id" and "objects" ("bbox" xywh, "category").
        source (`str`): What messages call it.
        on_invalid (`"error"`, `"drop"` or `"clip"`): As of `load_detection_dataset`.
        class_names (`Sequence[str]`, *optional*): The classes in the order of their labels. Needed where the features
            do not name them; otherwise matched by name.
        validation_fraction (`float`, *optional*): Share of "train" that becomes "validation" where there is none. A
            hash of seed and image id decides, so the share is met on average only, and both splits read all rows.
        seed (`int`): Which images that share is made of.

    Raises:
        InvalidDatasetError: Splits, columns or classes are not what they must be.
    """
    splits = name_splits(loaded, source)
    names, labels = _class_labels(splits, source, class_names)
    parts: dict[str, tuple[Any, float, float]] = {split: (rows, 0, 1) for split, rows in splits.items()}
    if validation_fraction is not None and "train" in splits and "validation" not in splits:
        parts["validation"] = splits["train"], 0, validation_fraction
        parts["train"] = splits["train"], validation_fraction, 1
    features = detection_features(names)
    streams = {}
    for split in (split for split in SPLITS if split in parts):
        rows, low, high = parts[split]
        if isinstance(rows, Dataset):
            rows = rows.to_iterable_dataset(num_shards=min(NUM_SHARDS, max(1, len(rows))))
        check = RowCheck(f'{source}, split "{split}"', labels, on_invalid, low, high, seed)
        checked = rows.cast_column("image", ImageFeature(decode=False)).map(
            check,
            batched=True,  # so that a row can be left out
            batch_size=1,
            remove_columns=rows.column_names,
        )
        streams[split] = checked.cast(features)  # not as an argument of `map`, which would leave images encoded
    return IterableDatasetDict(streams)


def _class_labels(
    splits: Mapping[str, Any], source: str, class_names: Sequence[str] | None
) -> tuple[list[str], dict[Any, int]]:
    """Class names, and the label of each value of "category"."""
    named: dict[str, list[str]] = {}
    given = list(class_names or [])
    # Of classes "1", "2", … the number 1 may be a name or a place; of "0", "1", … both are the same.
    is_ambiguous = all(map(str.isdecimal, given)) and given != list(map(str, range(len(given))))
    for split, rows in splits.items():
        if rows.features is None or "image_id" not in rows.features:
            raise InvalidDatasetError(
                f'{source}, split "{split}": a stream needs features that are known, with a column "image_id" of '
                "integers: rows are not numbered across shards. Add one, or read the data set without streaming."
            )
        category = object_fields(rows, split)["category"]
        category = getattr(category, "feature", category)
        if isinstance(category, ClassLabel):
            named[split] = list(category.names)
        elif is_ambiguous and category.dtype != "string":
            raise InvalidDatasetError(
                f'{source}, split "{split}": its categories are numbers, and so are the names of the classes, '
                f"{', '.join(given)}: whether 1 is a name or a place among them, a stream cannot tell. "
                "Cast the field category to a ClassLabel, or read the data set without streaming."
            )
    names = next(iter(named.values()), None)
    if names is None and class_names is None:
        raise InvalidDatasetError(
            f"{source}: its features do not name the classes, and a stream cannot be searched for them. Name "
            "them with class_names, or cast the field category to a ClassLabel."
        )
    if any(others != names for others in named.values()) or (named and len(named) < len(splits)):
        what = "; ".join(f'"{split}" has {", ".join(others)}' for split, others in named.items())
        raise InvalidDatasetError(f"The classes differ between splits: {what}. Cast all to the same ClassLabel.")
    if names is None or class_names is None:
        wanted = list(names or class_names or [])
        return wanted, {value: label for label, name in enumerate(wanted) for value in (label, name)}
    return list(class_names), {
        label: class_names.index(name) for label, name in enumerate(names) if name in class_names
    }


class RowCheck:
    """
    Checks a row and puts it into the row format.

    Args:
        source (`str`): What messages call the split.
        labels (`Mapping`): Label of each value of "category".
        on_invalid (`"error"`, `"drop"` or `"clip"`): What to do about an invalid row.
        low (`float`): Rows whose image id is hashed to `[low, high)` pass, the others are no part of this split.
        high (`float`): At most 1.
        seed (`int`): Of that hash.
    """

    def __init__(
        self, source: str, labels: Mapping[Any, int], on_invalid: OnInvalid, low: float, high: float, seed: int
    ) -> None:
        self.source = source
        self.labels = labels
        self.low, self.high, self.seed = low, high, seed
        self.problems = ProblemLog(on_invalid)
        self.num_boxes = self.num_fractions = 0  # of the rows so far; a row may be missed where threads shuffle

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """
        Check a batch of one row, the image encoded.

        Raises:
            InvalidDatasetError: It is invalid, and `on_invalid` is "error"; or boxes are fractions of the image.
        """
        before = self.problems.counts.total()
        row = self._checked({column: values[0] for column, values in batch.items()})
        after = self.problems.counts.total()
        if after > before and (self.problems.on_invalid == "error" or len(str(after)) > len(str(before or ""))):
            self.problems.finish()
        return {column: [] if row is None else [row[column]] for column in detection_features([])}

    def _checked(self, row: dict[str, Any]) -> dict[str, Any] | None:
        annotations = Annotations(self.source, self.problems)
        image_id, width, height = row["image_id"], row.get("width"), row.get("height")
        if not is_integer(image_id) or any(size is not None and not is_integer(size) for size in (width, height)):
            what = f'fields "image_id", "width" and "height" are {image_id!r:.40}, {width!r:.40} and {height!r:.40}'
            self.problems.add("unusable image entry", self.source, what)
            return None
        if not self.low <= _share(self.seed, image_id) < self.high:
            return None
        encoded = _downloaded(row["image"])
        annotations.add_image(image_id, (encoded or {}).get("path") or "no file name", width, height)
        add_objects(annotations, 0, object_columns(row["objects"]), self.labels)
        self._refuse_fractions(np.array(annotations.boxes).reshape(-1, 4))
        check_image(annotations, 0, encoded)
        if not annotations.keep_image[0]:
            return None
        objects = check_objects(annotations, quiet=True)
        return {
            "image": encoded,
            "image_id": image_id,
            "width": annotations.widths[0],
            "height": annotations.heights[0],
            "objects": {field: objects[field].tolist() for field in OBJECT_FIELDS},
        }

    def _refuse_fractions(self, boxes: np.ndarray) -> None:
        self.num_boxes += len(boxes)
        self.num_fractions += int(look_like_fractions(boxes).sum())
        # One or two may be specks that somebody drew by mistake.
        if self.num_fractions >= MIN_FRACTIONS and self.num_fractions > self.num_boxes / 2:
            what = f"{self.num_fractions} of the first {self.num_boxes} boxes lie between 0 and 1, as fractions do"
            raise InvalidDatasetError(f"{self.source}: {what}. Write pixels.")


def _share(seed: int, image_id: int) -> float:
    """A number in `[0, 1)` that depends on nothing else."""
    digest = hashlib.blake2b(f"{seed} {image_id}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _downloaded(encoded: dict[str, Any] | None) -> dict[str, Any] | None:
    """An encoded image with its bytes, where it is a file on the Hub or in an archive."""
    if encoded is None or encoded["bytes"] is not None or "://" not in (encoded["path"] or ""):
        return encoded
    try:
        with fsspec.open(encoded["path"], "rb") as stream:
            return {"bytes": stream.read(), "path": encoded["path"]}
    except FileNotFoundError:
        return encoded  # reported as missing; that the network fails is no fault of the data
