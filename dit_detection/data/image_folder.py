"""Images with a table beside them: `metadata.jsonl`, `.csv` or `.parquet` as of `datasets`, or a CSV of boxes."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .annotations import Annotations, is_integer, is_number
from .dataset_files import ImageFinder, is_name, leads_outside, read_class_list
from .hub import add_objects, object_columns
from .layouts import SPLITS, split_folders, split_of
from .problems import InvalidDatasetError, ProblemLog
from .tables import FILE_COLUMNS, Row, csv_header, read_table

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
LABEL_COLUMNS = ("label", "class", "class_name", "category", "category_name", "name", "categories", "labels")
SPLIT_COLUMNS = ("split", "set", "subset")
NO_OBJECT_COLUMNS = {*FILE_COLUMNS, *SPLIT_COLUMNS, "image_id", "width", "height", "image_width", "image_height"}
CORNERS = (
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"),
)
SIDES = (
    ("x", "y", "w", "h"),  # before the next: beside these, width and height are the image's
    ("x", "y", "width", "height"),
    ("left", "top", "width", "height"),
    ("bbox_x", "bbox_y", "bbox_width", "bbox_height"),
)
# Of a split, images by name and by the folder of the table that names them.
Entries = dict[tuple[str, Path], Row]
BOXES = (*CORNERS, *SIDES, ("bbox",))


def find_image_folder(folder: Path) -> str | None:
    """The first table in one of the places where `read_image_folder` looks."""
    return next((str(file) for files in _find_tables(folder).values() for file in files), None)


def read_image_folder(
    source: Path, problems: ProblemLog, class_names: Sequence[str] | None = None, group_by: str | None = None
) -> dict[str, Annotations]:
    """
    Read tables that name images relative to themselves, in a folder or in its folders `train`, `valid` and `test`.

    A row is an image with a column `objects` (`bbox` xywh in pixels and `category`, as lists or as a list of objects,
    or as JSON text), or an object with columns such as `xmin, ymin, xmax, ymax` or `x, y, width, height` in pixels and
    `label`; with nothing in these columns, or with a name and no other columns than `NO_OBJECT_COLUMNS`, it is an
    image without objects. The split is told by the table's folder or name, a column
    `split`, or a folder in the file names. Images are numbered in the order of their names.

    Args:
        source (`Path`): The folder, or one table, which is then the split "train".
        problems (`ProblemLog`): Where everything invalid is reported.
        class_names (`Sequence[str]`, *optional*): Names of classes that are given as integers, where there is no
            `classes.txt`.
        group_by (`str`, *optional*): Column that names the image's group.

    Source: https://huggingface.co/docs/datasets/image_dataset#object-detection
    """
    folder = source if source.is_dir() else source.parent
    tables = _choose_tables(source, problems) if source.is_dir() else {"train": [source]}
    images: dict[str, Entries] = {}
    for split, files in tables.items():
        for file in files:
            for row in read_table(file, problems):
                _add_row(images, split, row, file, problems, group_by)
    values = {
        category
        for entries in images.values()
        for entry in entries.values()
        for category in entry["objects"]["category"]
        if is_integer(category) or is_name(category)
    }
    names, labels = _read_classes(values, read_class_list(folder), class_names)
    return {
        split: _read_split(f'{folder}, split "{split}"', folder, images[split], names, labels, problems, group_by)
        for split in SPLITS
        if split in images
    }


def _find_tables(folder: Path) -> dict[str, list[Path]]:
    """Tables by split; the empty split is what a table at the top may hold several of."""
    found: dict[str, list[Path]] = {}
    for place in (folder, folder / "images", *split_folders(folder)):
        named = [place / name for name in METADATA if (place / name).is_file()]
        files = sorted(place.glob("*.csv")) if place.is_dir() else []
        for file in named or [file for file in files if _is_table_of_boxes(file)]:
            split = (split_of(place.name) if place != folder else None) or split_of(file.stem)
            found.setdefault(split or "", []).append(file)
    return found


def _choose_tables(folder: Path, problems: ProblemLog) -> dict[str, list[Path]]:
    """
    The tables that are read: where some are of a split, those of none hold its images again, and are reported.

    Raises:
        InvalidDatasetError: Several may hold the same images.
    """
    tables = _find_tables(folder)
    if len(tables) > 1:
        for file in tables.pop("", []):
            problems.add("annotation file in no split", str(file), "files beside it name their splits")
    unnamed: dict[tuple[str, Path], list[Path]] = {}  # by split and place
    for split, files in tables.items():
        for file in files:
            if split_of(file.stem) is None:
                unnamed.setdefault((split, file.parent if split else folder), []).append(file)
    for files in unnamed.values():
        if len(files) > 1:
            names = ", ".join(map(str, sorted(files)[:5]))
            raise InvalidDatasetError(f"{names} may hold the same objects. Remove all but one, or name it.")
    return tables


def _is_table_of_boxes(file: Path) -> bool:
    header = csv_header(file)
    boxes = any(set(names) <= header for names in BOXES)
    return bool(header & set(FILE_COLUMNS)) and (boxes or "objects" in header)


def _add_row(
    images: dict[str, Entries], split: str, row: Row, file: Path, problems: ProblemLog, group_by: str | None
) -> None:
    """Add a row of a table to the images of its split."""
    where = row.pop("where")
    name = next((row[column] for column in FILE_COLUMNS if row.get(column) is not None), None)
    if not is_name(name):
        what = f"no file name; it has the columns {', '.join(map(str, row))}"
        problems.add("unusable image entry", where, f"{what:.200}")
        return
    column = next((column for column in SPLIT_COLUMNS if row.get(column) not in (None, "")), None)
    if not split and column is not None and split_of(str(row[column])) is None:
        problems.add("unknown split", where, f'column "{column}" is {row[column]!r:.80}')
        return
    folders = name.replace("\\", "/").split("/")[:-1]
    stated = [] if column is None else [str(row[column])]
    split = split or next(filter(None, map(split_of, [*stated, *folders])), "train")
    key = name, file.parent
    is_new = key not in images.setdefault(split, {})
    entry = images[split].setdefault(key, {"objects": {"bbox": [], "category": []}})
    box_columns = next((names for names in BOXES if all(column in row for column in names)), None)
    for side in ("width", "height"):
        taken = box_columns is not None and side in box_columns
        entry[side] = row.get(f"image_{side}") if taken else row.get(side, row.get(f"image_{side}"))
    if group_by is not None:
        entry["group"] = row.get(group_by, row.get(group_by.lower()))  # headers of CSV are read in lower case
    if "objects" in row and not is_new:
        problems.add("image listed twice", where, f'field "file_name" is {name!r:.80} again')
    elif "objects" in row:
        objects = {} if row["objects"] in (None, "") else _objects_of(row["objects"])
        if objects is None:
            problems.add("unusable object", where, f'field "objects" is {row["objects"]!r:.100}')
        entry["objects"] = objects or entry["objects"]
    elif box_columns is None and set(row) - {*NO_OBJECT_COLUMNS, group_by}:
        what = f"no box: there are the columns {', '.join(map(str, row))}"
        problems.add("unusable object", where, f"{what:.200}")
    elif any(row[column] not in (None, "") for column in box_columns or ()):
        entry["objects"]["bbox"].append(_box_of(row, box_columns))  # type: ignore[arg-type]
        label = next((row[column] for column in LABEL_COLUMNS if row.get(column) not in (None, "")), None)
        entry["objects"]["category"].append(label)


def _objects_of(value: Any) -> dict[str, list[Any]] | None:
    """The column "objects" as a dict of lists with "bbox" and "category"; `None` if it is nothing of the kind."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        names = (name for name in (*LABEL_COLUMNS, "category_id") if any(name in entry for entry in value))
        category = next(names, "category")
        value = object_columns([entry | {"category": entry.get(category)} for entry in value])
    if not isinstance(value, dict):
        return None
    category = next((name for name in (*LABEL_COLUMNS, "category_id") if name in value), "category")
    objects = value | {"category": value.get(category)}
    objects = {name: objects[name] for name in ("id", "bbox", "category", "area", "iscrowd") if name in objects}
    return objects if all(isinstance(objects.get(name), list) for name in objects) and "bbox" in objects else None


def _box_of(row: Row, columns: tuple[str, ...]) -> Any:
    """The box of an object as [x, y, width, height], or what stands in its place."""
    if columns == ("bbox",):
        try:
            return json.loads(row["bbox"]) if isinstance(row["bbox"], str) else row["bbox"]
        except (ValueError, RecursionError):
            return row["bbox"]
    values = [_number(row[column]) for column in columns]
    if columns in CORNERS and all(map(is_number, values)):
        return [values[0], values[1], values[2] - values[0], values[3] - values[1]]
    return values


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _read_classes(
    values: set[Any], listed: list[str], class_names: Sequence[str] | None
) -> tuple[list[str], dict[Any, int]]:
    """Names of the classes, and the label of each value in the data."""
    # pandas writes integers as "2.0" in a column where some are missing.
    numbers = {
        value: int(float(value)) for value in values if is_integer(value) or re.fullmatch(r"[0-9]{1,15}(\.0)?", value)
    }
    if len(numbers) < len(values):
        names = listed or sorted(map(str, values))
        return names, {name: label for label, name in enumerate(names)}
    order = sorted(set(numbers.values()))
    found = list(map(str, order))
    names = listed or list(class_names or [])
    # Classes that are named "1", "2", … are so because their numbers were all there was: of a detector, say.
    if not names or (not listed and set(found) <= set(names)):
        return found, {value: order.index(number) for value, number in numbers.items()}
    return names, {value: number for value, number in numbers.items() if number < len(names)}


def _read_split(
    source: str,
    folder: Path,
    images: Entries,
    class_names: list[str],
    labels: dict[Any, int],
    problems: ProblemLog,
    group_by: str | None,
) -> Annotations:
    annotations = Annotations(source, problems)
    annotations.class_names = class_names
    paths: list[str] = []
    annotations.image_paths = paths
    finders: dict[Path, ImageFinder] = {}
    for row, (name, place) in enumerate(sorted(images)):
        entry = images[name, place]
        finder = finders.setdefault(place, ImageFinder([place, place / "images", folder, folder / "images"]))
        paths.append(str(finder.find(name) or place / os.path.basename(name)))
        if group_by is not None:
            annotations.groups.append(entry["group"])
        sizes = [_size(entry[side]) for side in ("width", "height")]
        annotations.add_image(row, name, *sizes)
        if leads_outside(name):
            what = f'field "file_name" is {name!r:.80}'
            annotations.drop_image(row, "file name leads outside the image folder", what)
        elif -1 in sizes:
            what = f'fields "width" and "height" are {entry["width"]!r:.40} and {entry["height"]!r:.40}'
            annotations.drop_image(row, "unusable image entry", what)
        else:
            add_objects(annotations, row, entry["objects"], labels)
    return annotations


def _size(value: Any) -> int | None:
    """A width or height in pixels; `None` where there is none, -1 where it is something else."""
    if value in (None, ""):
        return None
    number = _number(value)
    return int(number) if is_number(number) and 0 < number < 2**31 and number == int(number) else -1
