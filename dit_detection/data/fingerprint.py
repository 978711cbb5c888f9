"""What a split holds, in a name and in numbers."""

import hashlib
import json
import os
from typing import Any

import numpy as np
from datasets import Dataset

from .row_format import class_names_of
from .statistics import SplitTable, read_table

# Of the middle of each image's file: compressed pixels, where two pictures never agree.
NUM_BYTES = 4096


def count_objects(rows: Dataset) -> dict[str, int]:
    """Annotated objects per class of a split in the row format, without crowd regions."""
    names, table = class_names_of(rows), _table(rows)
    counts = np.bincount(table.labels[table.iscrowd == 0], minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def fingerprint_of(rows: Dataset) -> str:
    """
    A name for a split in the row format: 16 hexadecimal digits that change with an annotation, an image or the order
    of the images, and not with the place of the files or the machine.

    It covers width, height, boxes, class names, areas and crowd flags, and of each image the length of its file and
    the 4096 bytes in its middle. Copies of the same data in other annotation formats may differ: in their order, in
    areas, in the last digits of boxes.
    """
    table = _table(rows)
    digest = hashlib.blake2b(digest_size=8)
    names = class_names_of(rows)
    digest.update(json.dumps([names[label] for label in table.labels]).encode())
    for column, kind in (
        *((table.widths, "<i8"), (table.heights, "<i8"), (table.rows, "<i8")),
        *((table.bbox, "<f8"), (table.areas, "<f8"), (table.iscrowd, "<i8")),
    ):
        digest.update(np.ascontiguousarray(column, dtype=kind).tobytes())
    for image in table.dataset.select_columns(["image"]):
        digest.update(_sample(image["image"]))
    return digest.hexdigest()


def _table(rows: Dataset) -> SplitTable:
    return read_table("", rows, (1, 1))  # no canvas is asked for


def _sample(image: dict[str, Any]) -> bytes:
    if image["bytes"] is not None:
        size = len(image["bytes"])
        start = max(0, (size - NUM_BYTES) // 2)
        content = image["bytes"][start : start + NUM_BYTES]
    else:
        with open(image["path"], "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, (size - NUM_BYTES) // 2))
            content = file.read(NUM_BYTES)
    return size.to_bytes(8, "little") + content
