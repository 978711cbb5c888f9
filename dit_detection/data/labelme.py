"""LabelMe: one JSON per image with the shapes that were drawn on it; X-AnyLabeling writes the same."""

import json
import math
import os
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from .annotations import Annotations, is_number, sort_classes
from .dataset_files import ImageFinder, find_image_of, is_name, list_files, read_class_list, read_text
from .layouts import SPLITS, ends_of, split_of
from .problems import InvalidDatasetError, ProblemLog

# Shapes that have an extent, and how many points each needs at least. "rotation" and "quadrilateral" are
# X-AnyLabeling's; a JSON of old versions does not say what its polygons are.
NUM_POINTS = {
    **{"rectangle": 2, "polygon": 3, "circle": 2, "mask": 2},
    **{"rotation": 3, "oriented_rectangle": 3, "quadrilateral": 3},
}
TURNED = ("rotation", "oriented_rectangle")
FIELDS = ("label", "shape_type", "points")  # of a shape, in messages
NO_CLASSES = ("__ignore__", "_background_")  # stand first in LabelMe's own lists of classes
NUM_LOOKED_AT = 20  # JSON files, to tell the format


def find_labelme(folder: Path) -> str | None:
    """A JSON of LabelMe among the first ones of a folder, of those in it and of those in these."""
    files = chain.from_iterable(folder.glob(f"{below}[!.]*.json") for below in ("", "*/", "*/*/"))
    return next((str(file) for file in islice(files, NUM_LOOKED_AT) if looks_like_labelme(file)), None)


def looks_like_labelme(file: Path) -> bool:
    """Whether a JSON has the keys of LabelMe's at its begin or end."""
    text = b"".join(ends_of(file))
    return b'"shapes"' in text and (b'"imagePath"' in text or b'"imageWidth"' in text)


def read_labelme(
    folder: Path, problems: ProblemLog, class_names: Sequence[str] | None = None, group_by: str | None = None
) -> dict[str, Annotations]:
    """
    Read all JSON files in a folder, at any depth; folders named after splits make the splits.

    An image lies where the field "imagePath" says, if that names a folder; or else beside the JSON, or in `images`,
    `img`, `JPEGImages` or `data` there or one folder up, where the JSON's own name goes before that of the field. Of
    every shape the upright box around it is taken; shapes of one label and one "group_id" are one object, whose parts
    are hidden from one another. Points and lines have no box, and are reported. Images are numbered in the order of
    the names of the JSON files; those without one are not used, for nobody has said that nothing is in them.

    Args:
        folder (`Path`): The data set.
        problems (`ProblemLog`): Where everything invalid is reported.
        class_names (`Sequence[str]`, *optional*): Ignored: the classes are those of `classes.txt`, `labels.txt` or
            `labelmap.txt`, or else all that occur, sorted.
        group_by (`str`, *optional*): Field of the JSON that names the image's group.

    Source: https://github.com/wkentaro/labelme
    """
    listed = [name for name in read_class_list(folder) if name not in NO_CLASSES]
    labels = {name: label for label, name in enumerate(listed)}
    files: dict[str, list[Path]] = {}
    for file in list_files(folder, (".json",)):
        split = next(filter(None, map(split_of, file.relative_to(folder).parts[:-1])), "train")
        files.setdefault(split, []).append(file)
    splits = {
        split: _read_split(f'{folder}, split "{split}"', folder, files[split], labels, not listed, problems, group_by)
        for split in SPLITS
        if split in files
    }
    sort_classes(splits.values(), labels, listed)
    return splits


def _read_split(
    source: str,
    folder: Path,
    files: list[Path],
    labels: dict[str, int],
    may_add: bool,
    problems: ProblemLog,
    group_by: str | None,
) -> Annotations:
    """One split; classes that `labels` does not have are added to it in the order in which they occur, if they may."""
    annotations = Annotations(source, problems)
    paths: list[str] = []
    annotations.image_paths = paths
    finders: dict[Path, ImageFinder] = {}
    for file in files:
        content = _read_json(file, problems)
        if content is None:
            continue
        row = len(paths)
        named = content.get("imagePath")
        place, _, name = named.replace("\\", "/").rpartition("/") if is_name(named) else ("", "", "")
        stated = Path(os.path.normpath(file.parent / place / name)) if place and name else None
        if stated is not None and stated.is_relative_to(folder) and os.path.isfile(stated):
            image: Path | None = stated
        else:
            image = find_image_of(file, [name], finders)
        paths.append(str(image or file.with_suffix(".jpg")))
        if group_by is not None:
            annotations.groups.append(content.get(group_by))
        fields = [content.get(field) for field in ("imageWidth", "imageHeight")]
        sizes = [_size(value) for value in fields]
        annotations.add_image(row, file.name, *(sizes if -1 not in sizes else (None, None)))
        if -1 in sizes:
            what = f'fields "imageWidth" and "imageHeight" are {fields[0]!r:.40} and {fields[1]!r:.40}'
            annotations.drop_image(row, "unusable image entry", what)
        elif image is None:
            what = f'there is no image "{file.stem}" with a known suffix, and no file {name!r:.80} (field "imagePath")'
            if content.get("imageData"):
                what += '; its pixels are in the field "imageData", from which LabelMe can write the file'
            annotations.drop_image(row, "missing image file", what)
        else:
            _add_objects(annotations, row, content["shapes"], labels, may_add)
    return annotations


def _read_json(file: Path, problems: ProblemLog) -> dict[str, Any] | None:
    try:
        content = json.loads(read_text(file))
    except InvalidDatasetError as error:
        what = str(error).removeprefix(f"{file} ")
    except (ValueError, RecursionError) as error:
        what = f"cannot be read as JSON: {error}"
    else:
        if isinstance(content, dict) and isinstance(content.get("shapes"), list):
            return content
        what = 'is not a JSON of LabelMe, which has a list "shapes"'
        if not isinstance(content, dict) or "shapes" not in content:  # COCO's, or a project's
            problems.add("annotation file in no split", str(file), what)
            return None
    problems.add("unusable annotation file", str(file), what)
    return None


def _add_objects(annotations: Annotations, row: int, shapes: list[Any], labels: dict[str, int], may_add: bool) -> None:
    found: dict[Any, tuple[int, int, list[float]]] = {}  # by group or own number: number of the first, label, xyxy
    for object_id, shape in enumerate(shapes, start=1):
        name = shape.get("label") if isinstance(shape, dict) else None
        name = name.strip() if isinstance(name, str) else name
        box = _corners(shape) if is_name(name) else None
        if box is None or not is_name(name):
            shown = {field: shape.get(field) for field in FIELDS} if isinstance(shape, dict) else shape
            annotations.report("unusable shape", f"shapes[{object_id - 1}] is {shown!r:.160}", row, object_id)
            continue
        if name in NO_CLASSES:
            annotations.report("ignored shape", f"its label is {name!r}", row, object_id)
            continue
        xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        if may_add:
            labels.setdefault(name, len(labels))
        if name not in labels:
            what = f'field "label" is {name!r:.80}; there are {", ".join(labels) or "none"}'
            annotations.report("unknown category", f"{what:.200}", row, object_id, xywh)
            continue
        if shape.get("shape_type") in TURNED:
            annotations.report("rotated box", "it is a turned rectangle", row, object_id, xywh)
        if shape.get("difficult") is True:
            annotations.report("difficult object", f"{name!r:.40} is marked as difficult", row, object_id, xywh)
        group = shape.get("group_id")
        key = (name, group) if isinstance(group, int | str) and group != "" else object_id
        first, label, whole = found.get(key, (object_id, labels[name], box))
        found[key] = first, label, [*map(min, whole[:2], box[:2]), *map(max, whole[2:], box[2:])]
    for object_id, label, (left, top, right, bottom) in found.values():
        annotations.add_object(row, object_id, [left, top, right - left, bottom - top], label)


def _corners(shape: dict[str, Any]) -> list[float] | None:
    """The box (xyxy) around a shape; `None` if it has none."""
    kind, points = shape.get("shape_type") or "polygon", shape.get("points")
    num_points = NUM_POINTS.get(kind) if isinstance(kind, str) else None
    if num_points is None or not isinstance(points, list) or len(points) < num_points:
        return None
    if not all(isinstance(point, list) and len(point) == 2 and all(map(is_number, point)) for point in points):
        return None
    if not all(math.isfinite(value) for point in points for value in point):
        return None
    if kind == "circle":  # its middle, and a point on it
        (x, y), on_it = points[:2]
        radius = math.dist((x, y), on_it)
        return [x - radius, y - radius, x + radius, y + radius]
    xs, ys = zip(*points, strict=True)
    return [min(xs), min(ys), max(xs), max(ys)]


def _size(value: Any) -> int | None:
    """A width or height in pixels; `None` where the file does not say, or says 0; -1 where it is something else."""
    if value is None or value == 0:
        return None
    is_size = is_number(value) and 0 < value < 2**31 and value == int(value)
    return int(value) if is_size else -1
