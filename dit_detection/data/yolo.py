"""YOLO: one text file per image, with a line `class x y width height` per object, as fractions of the image."""

import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .annotations import Annotations
from .dataset_files import IMAGE_SUFFIXES, find_class_list, is_image, list_files, read_classes, read_text
from .layouts import SPLIT_WORDS, SPLITS, split_folders, split_of
from .problems import InvalidDatasetError, ProblemLog
from .yolo_description import Places, find_description, read_description

CLASS_LISTS = ("classes.txt", "obj.names", "labels.txt", "predefined_classes.txt", "_darknet.labels")
OTHER_TEXTS = {*CLASS_LISTS, "readme.txt", "notes.txt", "train.txt", "val.txt", "valid.txt", "test.txt"}
MAX_FRACTION = 1.01  # the last digit of a file is rounded; what is further out is checked in pixels
MAX_UNNAMED = 10_000  # classes, where only their numbers are known


def find_yolo(folder: Path) -> str | None:
    """What shows that a folder holds YOLO annotations: its description, or the first file of labels."""
    described = find_description(folder)
    if described is not None:
        return str(described)
    for place in filter(Path.is_dir, (folder, *split_folders(folder), folder / "data")):  # the last of FiftyOne
        texts = (place / "labels").rglob("*.txt") if (place / "labels").is_dir() else ()
        labels = next((file for file in texts if file.name.lower() not in OTHER_TEXTS), None)
        if labels is not None and (place / "images").is_dir():
            return str(labels)
        names = set(os.listdir(place))
        beside = (name for name in sorted(names) if name.endswith(".txt") and name.lower() not in OTHER_TEXTS)
        for name in beside:
            if any(f"{name[:-4]}{suffix}" in names for suffix in IMAGE_SUFFIXES | {s.upper() for s in IMAGE_SUFFIXES}):
                return str(place / name)
    return None


def read_yolo(
    source: Path, problems: ProblemLog, class_names: Sequence[str] | None = None, group_by: str | None = None
) -> dict[str, Annotations]:
    """
    Read a data set described by `data.yaml` (Ultralytics, Roboflow) or `obj.data` (Darknet, CVAT), or a folder with
    `images` and `labels` (Label Studio), with or without a level for the splits, or with the labels beside the images.
    Without a description and folders of splits, lists of images in `train.txt`, `val.txt`, … make the splits.

    The labels of `…/images/a.jpg` are `…/labels/a.txt`, or else the text file beside it; an image without one has no
    objects. Polygons become the boxes around them. Fractions are of the image with its EXIF orientation applied, as
    Ultralytics reads it, and boxes are rounded to what six digits can say: thousandths of a pixel along sides of up
    to 666 pixels, hundredths up to 6666.

    Args:
        source (`Path`): The folder; then only images in it are read. Or its description, which may point anywhere.
        problems (`ProblemLog`): Where everything invalid is reported.
        class_names (`Sequence[str]`, *optional*): Used where the data set does not name its classes.
        group_by (`str`, *optional*): Refused: YOLO has no columns.

    Source: https://docs.ultralytics.com/datasets/detect/
    """
    if group_by is not None:
        raise InvalidDatasetError(f"group_by is {group_by!r}, but YOLO has no fields to group by. Leave it out.")
    folder = source if source.is_dir() else source.parent
    file = find_description(source) if source.is_dir() else source
    if file is not None:
        listed, places = read_description(file, folder if source.is_dir() else None, problems)
    else:
        listed, places = [], _find_places(folder)
    listed = listed or _read_class_lists(folder) or list(class_names or [])
    images = {split: places[split].images() for split in SPLITS if split in places}
    splits = {
        split: _read_split(f'{folder}, split "{split}"', folder, files, listed, problems)
        for split, files in images.items()
    }
    _report_orphans(places, images, problems)
    if file is None:
        others = (child / "images" for child in folder.iterdir() if (child / "labels").is_dir())
        _report_unplaced([folder / "images", *others], images, problems)
    if not listed:
        num_classes = max((max(annotations.labels, default=-1) for annotations in splits.values()), default=-1) + 1
        listed = [str(label) for label in range(num_classes)]
    for annotations in splits.values():
        annotations.class_names = listed
    return splits


def _read_class_lists(folder: Path) -> list[str]:
    """
    The classes of the lists in the folder and beside the labels of its splits, where labelImg and Roboflow write one
    each. One may go on where another ends.

    Raises:
        InvalidDatasetError: They number the classes differently.
    """
    places = [folder, *split_folders(folder)]
    labels = [place / "labels" for place in places if (place / "labels").is_dir()]
    places += [place for folder in labels for place in (folder, *split_folders(folder))]
    files = [file for place in places if (file := find_class_list(place, CLASS_LISTS)) is not None]
    lists = {file: read_classes(file) for file in files}
    longest = max(lists, key=lambda file: len(lists[file]), default=None)
    if longest is None:
        return []
    for file, names in lists.items():
        if names != lists[longest][: len(names)]:
            what = "number the classes differently. Write the same list into both, and the labels anew."
            raise InvalidDatasetError(f"{longest} and {file} {what}")
    return lists[longest]


def to_pixels(annotations: Annotations) -> None:
    """Turn boxes of (x, y) of the centre, width and height as fractions into xywh in pixels, once sizes are known."""
    rows = np.asarray(annotations.rows, dtype=np.int64)
    sizes = np.array([annotations.widths, annotations.heights], dtype=np.float64).T[rows]
    boxes = np.asarray(annotations.boxes, dtype=np.float64).reshape(-1, 4)
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    # Labelling tools write 6 digits, an error of up to 0.75e-6 of the image in a corner. Rounded to the next power of
    # ten, whole pixels come back as they were, and in images below 670 pixels thousandths do.
    sides = np.tile(np.maximum(sizes, 1), 2)
    decimals = -np.ceil(np.log10(1.5e-6 * sides)).astype(int)
    corners *= sides
    for places in np.unique(decimals):
        corners = np.where(decimals == places, corners.round(places), corners)
    extents = (corners[:, 2:] - corners[:, :2]).round(int(decimals.max(initial=0)))
    annotations.boxes = array("d", np.concatenate([corners[:, :2], extents], axis=1).ravel())
    annotations.boxes_are_fractions = False


def _find_places(folder: Path) -> dict[str, Places]:
    """
    Image folders by split: `images/train` or `train/images`, or those with the labels beside the images; or else the
    lists of images.
    """
    images = folder / "images"
    named = split_folders(folder)
    if images.is_dir():
        # Beside `images` and `labels`, a folder of test pictures without labels of its own is something else.
        has_labels = (folder / "labels").is_dir()
        named = [place for place in named if not has_labels or next(list_files(place, (".txt",)), None) is not None]
        named = [*split_folders(images), *named]
    found: dict[str, list[Path]] = {}
    for place in named:
        found.setdefault(split_of(place.name) or "", []).append(place)
    lists = {} if found else _image_lists(folder)
    if "train" in lists:
        return {split: Places([], [file], folder) for split, file in lists.items()}
    if not found:
        found["train"] = [images if images.is_dir() else folder]
    return {split: Places(folders, [], folder) for split, folders in found.items()}


def _image_lists(folder: Path) -> dict[str, Path]:
    """The lists of images, as `train.txt`, by split. (One beside `train.jpg` holds the labels of that image.)"""
    files = {split_of(file.stem): file for file in sorted(folder.glob("*.txt")) if file.stem.lower() in SPLIT_WORDS}
    firsts = {split: read_text(file).strip().partition("\n")[0] for split, file in files.items()}
    return {split: files[split] for split in SPLITS if split in files and is_image(Path(firsts[split].strip()))}


def _labels_of(images: Path) -> list[Path]:
    """`…/labels/…` for a folder `…/images/…`."""
    folders = []
    for name in ("images", "JPEGImages"):
        before, found, after = f"{images}{os.sep}".rpartition(f"{os.sep}{name}{os.sep}")
        if found:
            folders.append(Path(f"{before}{os.sep}labels{os.sep}{after}"))
    return folders


def _label_folders(images: Path) -> list[Path]:
    """Where the labels of the images in a folder may lie: in the folder for labels, and beside them."""
    return [*_labels_of(images), images]


def _read_split(
    source: str, folder: Path, images: list[Path], class_names: Sequence[str], problems: ProblemLog
) -> Annotations:
    annotations = Annotations(source, problems)
    annotations.boxes_are_fractions = True
    annotations.image_paths = list(map(str, images))
    for row, image in enumerate(images):
        name = image.relative_to(folder) if image.is_relative_to(folder) else image
        annotations.add_image(row, str(name), None, None)
        places = (place / f"{image.stem}.txt" for place in _label_folders(image.parent))
        file = next((place for place in places if os.path.lexists(place)), None)
        if file is None:
            annotations.report("image without a label file", "it is taken for an image without objects", row)
            continue
        try:
            lines = read_text(file).split("\n")
        except InvalidDatasetError as error:
            annotations.drop_image(row, "unusable annotation file", str(error))
            continue
        for number, line in enumerate(lines, start=1):
            if line.strip():
                _add_object(annotations, row, number, line.split(), file, class_names)
    return annotations


def _add_object(
    annotations: Annotations, row: int, object_id: int, words: list[str], file: Path, class_names: Sequence[str]
) -> None:
    where = f"{file}, line {object_id}"
    try:
        label, *values = map(float, words)
    except ValueError:
        what = f"{where}: {' '.join(words)!r:.80} has something that is no number"
        annotations.report("unusable label line", what, row, object_id)
        return
    is_polygon = len(values) >= 6 and len(values) % 2 == 0
    if len(values) != 4 and not is_polygon:
        what = f"{where}: {len(words)} columns; a box has 5, a polygon 7 or more and an odd number"
        annotations.report("unusable label line", what, row, object_id)
    elif not label.is_integer() or not 0 <= label < (len(class_names) or MAX_UNNAMED):
        what = f"{where}: class {words[0]:.40}, not one of 0 to {(len(class_names) or MAX_UNNAMED) - 1}"
        annotations.report("unknown category", what, row, object_id)
    elif any(value < 0 or MAX_FRACTION < value < float("inf") for value in values):
        what = f"{where}: {' '.join(words[1:])!r:.80} are not between 0 and 1"
        annotations.report("box not in fractions", what, row, object_id)
    else:
        if is_polygon:
            low, high = (min(values[::2]), min(values[1::2])), (max(values[::2]), max(values[1::2]))
            values = [(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, high[0] - low[0], high[1] - low[1]]
        annotations.add_object(row, object_id, values, int(label))


def _report_orphans(places: dict[str, Places], images: dict[str, list[Path]], problems: ProblemLog) -> None:
    """Report label files that belong to no image, in the folders where labels were looked for."""
    if any(place.lists for place in places.values()):
        return  # labels of images that no list names are no mistake
    names: dict[Path, set[str]] = {}  # of the images, by the folders where their labels may lie
    for image in (image for files in images.values() for image in files):
        for folder in _label_folders(image.parent):
            names.setdefault(folder, set()).add(image.stem)
    for labels in (labels for place in places.values() for folder in place.folders for labels in _labels_of(folder)):
        for file in list_files(labels, (".txt",)) if labels.is_dir() else ():
            names.setdefault(file.parent, set())
    for folder, stems in names.items():
        for file in sorted(folder.glob("[!.]*.txt")):
            if file.name.lower() not in OTHER_TEXTS and file.stem not in stems:
                problems.add("label file without image", str(file), f'there is no image "{file.stem}"')


def _report_unplaced(folders: Iterable[Path], images: dict[str, list[Path]], problems: ProblemLog) -> None:
    """Note the images that are in no split, where others lie in folders of splits."""
    placed = {image for files in images.values() for image in files}
    found = {path for folder in folders if folder.is_dir() for path in list_files(folder, IMAGE_SUFFIXES)}
    for path in sorted(found - placed):
        problems.add("image without annotations", str(path), "it is in the folder of no split", str(path))
