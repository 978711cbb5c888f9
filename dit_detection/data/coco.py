"""COCO JSON: one file with the lists `images`, `annotations` and `categories`."""

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, permutations
from pathlib import Path, PurePosixPath
from typing import Any

from .annotations import Annotations, is_integer, is_number
from .dataset_files import ImageFinder, is_name, leads_outside
from .json_lists import PackedList, UnreadableJsonError, read_json_lists
from .layouts import find_coco_files
from .problems import ProblemLog

# Polygons and masks, keypoints and captions are not kept: they are most of the file.
FIELDS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "attributes"),
    "categories": ("id", "name", "supercategory"),
}
Categories = dict[int, str]  # COCO's ids may start anywhere and have gaps; labels are their ranks


def read_coco_splits(
    source: Path, problems: ProblemLog, class_names: Sequence[str] | None = None, group_by: str | None = None
) -> dict[str, Annotations]:
    """
    Read the COCO JSON of each split in a folder, or one file as the split "train".

    Args:
        source (`Path`): The folder or file.
        problems (`ProblemLog`): Where everything invalid is reported, also categories that differ between splits.
        class_names (`Sequence[str]`, *optional*): If given, categories may differ: they are matched by name later.
        group_by (`str`, *optional*): Field of the entries of `images` that names the image's group.
    """
    splits: dict[str, Annotations] = {}
    first: tuple[Path, Categories] | None = None
    roots: set[str] = set()
    for split, (file, image_folders) in find_coco_files(source, problems).items():
        splits[split], categories, roots = read_coco(file, image_folders, problems, group_by)
        if first is not None and categories and categories != first[1] and class_names is None:
            here, there = (dict(sorted(a.items() - b.items())) for a, b in permutations((categories, first[1])))
            what = f'key "categories" has {here!r:.100} where {first[0]} has {there!r:.100}'
            problems.add("categories differ between splits", str(file), what)
        first = first or ((file, categories) if categories else None)
    if roots and class_names is None and not problems.fatal:
        _leave_out_roots(list(splits.values()), roots)
    return splits


def _leave_out_roots(splits: Sequence[Annotations], roots: set[str]) -> None:
    """Take categories that only stand above others from the classes, where they have no object in any split."""
    names = splits[0].class_names
    used = set(chain.from_iterable(annotations.labels for annotations in splits))
    kept = [label for label, name in enumerate(names) if name not in roots or label in used]
    for name in (name for label, name in enumerate(names) if label not in kept):
        what = f"category {name!r:.80} stands above others and has no objects"
        splits[0].problems.add("category above others", splits[0].source, what)
    new_labels = {label: new_label for new_label, label in enumerate(kept)}
    for annotations in splits:
        annotations.class_names = [names[label] for label in kept]
        annotations.labels = array("q", map(new_labels.__getitem__, annotations.labels))


def read_coco(
    json_file: Path, image_folders: Sequence[Path], problems: ProblemLog, group_by: str | None = None
) -> tuple[Annotations, Categories, set[str]]:
    """
    Read one COCO JSON file.

    Args:
        json_file (`Path`): The file.
        image_folders (`Sequence[Path]`): Where the images may lie; the first that has one of them is taken.
        problems (`ProblemLog`): Where everything invalid is reported.
        group_by (`str`, *optional*): Field of the entries of `images` that names the image's group.

    Returns:
        `tuple[Annotations, Categories, set[str]]`: The images and objects, with labels that follow the order of the
        category ids; the categories; and the names of those that stand above others, as Roboflow's first. All are
        empty if the file cannot be used.
    """
    annotations = Annotations(str(json_file), problems)
    lists = _load_lists(json_file, group_by, problems)
    if lists is None:
        return annotations, {}, set()
    categories, roots = _read_categories(lists["categories"], str(json_file), problems)
    annotations.class_names = list(categories.values())
    _add_images(annotations, lists["images"], image_folders, group_by)
    _add_objects(annotations, lists["annotations"], categories)
    return annotations, categories, roots


def _load_lists(json_file: Path, group_by: str | None, problems: ProblemLog) -> dict[str, PackedList] | None:
    try:
        group = () if group_by is None else (group_by,)
        content = read_json_lists(json_file, FIELDS | {"images": FIELDS["images"] + group})
    except UnreadableJsonError as error:
        problems.add("unusable file", str(json_file), str(error))
        return None
    lists = {key: entries for key, entries in content.items() if entries is not None}
    wrong = [key for key in FIELDS if key not in lists]
    for key in wrong:
        what = "is not a list" if key in content else f"is missing; there are: {', '.join(content) or 'none'}"
        problems.add("unusable file", str(json_file), f'key "{key}" {what}')
    return None if wrong else lists


def _read_categories(entries: PackedList, source: str, problems: ProblemLog) -> tuple[Categories, set[str]]:
    """Names by id, and those of them that stand above others: Roboflow's first is the project, above all classes."""
    categories: dict[Any, str] = {}
    supercategories = [entry.get("supercategory") for entry in entries if isinstance(entry, dict)]
    named = Counter(entry["name"] for entry in entries if isinstance(entry, dict) and is_name(entry.get("name")))
    roots: set[str] = set()
    if not entries:
        problems.add("unusable category", source, 'key "categories" is an empty list')
    for index, entry in enumerate(entries):
        category_id = entry.get("id") if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        if not is_integer(category_id) or not is_name(name):
            problems.add("unusable category", source, f"categories[{index}] is {entry!r:.80}")
            continue
        if entry.get("supercategory") == "none" and name in supercategories and name != "none":
            if named[name] > 1:  # the class is called as the project is, and is the other one
                continue
            roots.add(name)
        if category_id in categories or name in categories.values():
            problems.add(
                "unusable category", source, f"categories[{index}]: id {category_id} or name {name!r} is taken"
            )
        else:
            categories[category_id] = name
    return dict(sorted(categories.items())), roots


def _add_images(
    annotations: Annotations, entries: PackedList, image_folders: Sequence[Path], group_by: str | None
) -> None:
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
        if group_by is not None:
            annotations.groups.append(entry.get(group_by))
        file = PurePosixPath(entry["file_name"].replace("\\", "/"))
        files.append(file)
        if leads_outside(entry["file_name"]):
            what = f'field "file_name" is {entry["file_name"]!r:.80}'
            annotations.drop_image(len(files) - 1, "file name leads outside the image folder", what)
    safe = [file for file, keep in zip(files, annotations.keep_image, strict=True) if keep]
    # A few, not the first alone: that one may be the missing one.
    sample, finder = safe[:20], ImageFinder([])
    found = (folder for folder in image_folders if any(os.path.isfile(folder / file) for file in sample))
    alike = (folder for folder in image_folders if any(finder.find_alike(folder / file) for file in sample))
    folder = Path(os.path.abspath(next(chain(found, alike), image_folders[0])))
    annotations.image_paths = [str(folder / file) for file in files]


def _wrong_image_fields(entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f"it is {entry!r:.80}"
        return
    if not is_integer(entry.get("id")):
        yield f'field "id" is {entry.get("id")!r:.80}'
    if not is_name(entry.get("file_name")):
        yield f'field "file_name" is {entry.get("file_name")!r:.80}'
    for field in ("width", "height"):  # read from the file where they are not given
        if entry.get(field) is not None and not (is_integer(entry[field]) and entry[field] > 0):
            yield f'field "{field}" is {entry[field]!r:.80}'


def _add_objects(annotations: Annotations, entries: PackedList, categories: Categories) -> None:
    source, problems = annotations.source, annotations.problems
    rows = {image_id: row for row, image_id in enumerate(annotations.image_ids)}
    labels = {category_id: label for label, category_id in enumerate(categories)}
    seen: set[int] = set()
    for index, entry in enumerate(entries):
        fields = ("id", "image_id", "category_id")
        if not isinstance(entry, dict) or not all(is_integer(entry.get(field)) for field in fields):
            found = {field: entry.get(field) for field in fields} if isinstance(entry, dict) else entry
            problems.add("unusable object", f"{source}: annotations[{index}]", f"it has {found!r:.120}")
            continue
        object_id, image_id, category_id = (entry[field] for field in fields)
        is_taken = object_id in seen
        seen.add(object_id)
        if image_id not in rows:
            what = f'field "image_id" is {image_id}, which no image has'
            problems.add("unknown image", f"{source}: annotation {object_id}", what)
        elif category_id not in labels:
            what = f'field "category_id" is {category_id}; there are {", ".join(map(str, categories)) or "none"}'
            problems.add("unknown category", annotations.where(rows[image_id], object_id), f"{what:.200}")
        elif is_taken:
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
                _rotation(entry.get("attributes")),
            )


def _rotation(attributes: Any) -> float:
    """Degrees by which CVAT says that a box is turned."""
    rotation: Any = attributes.get("rotation") if isinstance(attributes, dict) else None
    return float(rotation) if is_number(rotation) else 0.0
