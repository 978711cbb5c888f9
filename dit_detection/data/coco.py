"""COCO JSON: one file with the lists `images`, `annotations` and `categories`."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .annotations import Annotations, is_integer
from .problems import ProblemLog

Categories = dict[int, str]  # COCO's ids may start anywhere and have gaps; labels are their ranks


def read_coco(
    json_file: Path, image_folders: Sequence[Path], problems: ProblemLog
) -> tuple[Annotations, list[str], Categories]:
    """
    Read one COCO JSON file.

    Args:
        json_file (`Path`): The file.
        image_folders (`Sequence[Path]`): Where the images may lie; the first that has one of them is taken.
        problems (`ProblemLog`): Where everything invalid is reported.

    Returns:
        `tuple`: The images and objects, with labels that follow the order of the category ids; the path of each image;
        and the categories. All are empty if the file cannot be used.
    """
    annotations = Annotations(str(json_file), problems)
    lists = _load_lists(json_file, problems)
    if lists is None:
        return annotations, [], {}
    categories = _read_categories(lists["categories"], str(json_file), problems)
    paths = _add_images(annotations, lists["images"], image_folders)
    _add_objects(annotations, lists["annotations"], categories)
    return annotations, paths, categories


def _load_lists(json_file: Path, problems: ProblemLog) -> dict[str, list[Any]] | None:
    try:
        content = json.loads(json_file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        what = f"not valid JSON, perhaps cut off, at line {error.lineno}, column {error.colno}: {error.msg}"
        problems.add("unusable file", str(json_file), what)
        return None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        problems.add("unusable file", str(json_file), f"cannot be read: {error}")
        return None
    if not isinstance(content, dict):
        problems.add("unusable file", str(json_file), f"holds a {type(content).__name__}, not an object")
        return None
    wrong = [key for key in ("images", "annotations", "categories") if not isinstance(content.get(key), list)]
    for key in wrong:
        what = (
            "is not a list" if key in content else f"is missing; there are: {', '.join(map(str, content)) or 'none'}"
        )
        problems.add("unusable file", str(json_file), f'key "{key}" {what}')
    return None if wrong else content


def _read_categories(entries: list[Any], source: str, problems: ProblemLog) -> Categories:
    categories: dict[Any, str] = {}
    if not entries:
        problems.add("unusable category", source, 'key "categories" is an empty list')
    for index, entry in enumerate(entries):
        category_id = entry.get("id") if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        if not is_integer(category_id) or not isinstance(name, str) or not name:
            problems.add("unusable category", source, f"categories[{index}] is {entry!r:.80}")
        elif category_id in categories or name in categories.values():
            problems.add(
                "unusable category", source, f"categories[{index}]: id {category_id} or name {name!r} is taken"
            )
        else:
            categories[category_id] = name
    return dict(sorted(categories.items()))


def _add_images(annotations: Annotations, entries: list[Any], image_folders: Sequence[Path]) -> list[str]:
    source, problems = annotations.source, annotations.problems
    if not entries:
        problems.add("no images", source, 'key "images" is an empty list')
    seen: set[int] = set()
    files: list[PurePosixPath] = []
    for index, entry in enumerate(entries):
        where = f"{source}: images[{index}]"
        wrong = list(_wrong_image_fields(entry))
        if wrong:
            problems.add("unusable image entry", where, ", ".join(wrong))
            continue
        if entry["id"] in seen:
            problems.add("duplicate image id", where, f'field "id" is {entry["id"]} again ("{entry["file_name"]}")')
            continue
        seen.add(entry["id"])
        annotations.add_image(entry["id"], entry["file_name"], entry.get("width"), entry.get("height"))
        file = PurePosixPath(entry["file_name"].replace("\\", "/"))
        files.append(file)
        if file.is_absolute() or PureWindowsPath(entry["file_name"]).drive or _climbs(file):
            what = f'field "file_name" is {entry["file_name"]!r:.80}'
            annotations.drop_image(len(files) - 1, "file name leads outside the image folder", what)
    safe = [file for file, keep in zip(files, annotations.keep_image, strict=True) if keep]
    # A few, not the first alone: that one may be the missing one.
    found = (folder for folder in image_folders if any((folder / file).is_file() for file in safe[:20]))
    folder = next(found, image_folders[0]).resolve()
    return [str(folder / file) for file in files]


def _wrong_image_fields(entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f"it is {entry!r:.80}"
        return
    if not is_integer(entry.get("id")):
        yield f'field "id" is {entry.get("id")!r:.80}'
    if not isinstance(entry.get("file_name"), str) or not entry["file_name"] or "\0" in entry["file_name"]:
        yield f'field "file_name" is {entry.get("file_name")!r:.80}'
    for field in ("width", "height"):  # read from the file where they are not given
        if entry.get(field) is not None and not (is_integer(entry[field]) and entry[field] > 0):
            yield f'field "{field}" is {entry[field]!r:.80}'


def _climbs(file: PurePosixPath) -> bool:
    """Whether a relative path leaves its folder at any point."""
    depth = 0
    for part in file.parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return True
    return False


def _add_objects(annotations: Annotations, entries: list[Any], categories: Categories) -> None:
    source, problems = annotations.source, annotations.problems
    rows = {image_id: row for row, image_id in enumerate(annotations.image_ids)}
    labels = {category_id: label for label, category_id in enumerate(categories)}
    seen: Counter[int] = Counter()
    for index, entry in enumerate(entries):
        fields = ("id", "image_id", "category_id")
        if not isinstance(entry, dict) or not all(is_integer(entry.get(field)) for field in fields):
            found = {field: entry.get(field) for field in fields} if isinstance(entry, dict) else entry
            problems.add("unusable object", f"{source}: annotations[{index}]", f"it has {found!r:.120}")
            continue
        object_id, image_id, category_id = (entry[field] for field in fields)
        seen[object_id] += 1
        if image_id not in rows:
            what = f'field "image_id" is {image_id}, which no image has'
            problems.add("unknown image", f"{source}: annotation {object_id}", what)
        elif category_id not in labels:
            what = f'field "category_id" is {category_id}; there are {", ".join(map(str, categories)) or "none"}'
            problems.add("unknown category", annotations.where(rows[image_id], object_id), f"{what:.200}")
        elif seen[object_id] > 1:
            what = f'field "id" is {object_id} again (annotations[{index}])'
            problems.add("duplicate annotation id", annotations.where(rows[image_id], object_id), what)
        else:
            annotations.add_object(
                rows[image_id],
                object_id,
                entry.get("bbox"),
                labels[category_id],
                entry.get("area"),
                entry.get("iscrowd"),
            )
