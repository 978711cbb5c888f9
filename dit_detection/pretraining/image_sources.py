"""Which images are trained on: of folders, annotated data sets and the Hub, the training images alone."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, concatenate_datasets
from datasets import Image as ImageFeature

from ..data import InvalidDatasetError, draw_shapes_dataset, load_detection_dataset
from ..data.dataset_files import is_image
from ..data.formats import find_formats
from ..data.hub import load_hub_dataset
from ..data.image_listing import find_images, is_dataset
from ..data.layouts import list_json_files, looks_like_coco, split_of

logger = logging.getLogger(__name__)

_FEATURES = Features({"image": ImageFeature(decode=False)})


def list_training_images(sources: Sequence[str], leave_out: Path | None = None) -> Dataset:
    """
    List the images to train on, and log of each source how many they are and what is left out.

    Of a source with splits only "train" is read: what is to be measured on later must not have been seen. In folders
    without annotations, what lies below a folder whose name speaks of validation or test is left out. If all annotated
    images of a folder are for training, so are the others beside and below them.

    Args:
        sources (`Sequence[str]`): Image files; folders of images, searched in depth; folders or files of annotations
            that `load_detection_dataset` reads; folders or Hub ids of data sets with a column `image`.
        leave_out (`Path`, *optional*): A folder in them that is not read: that of the run, with its pictures.

    Returns:
        `datasets.Dataset`: The column `image`, encoded ("bytes" or, where that is `None`, "path").

    Raises:
        InvalidDatasetError: A source does not exist, has no images, has splits but none to train on, or is the folder
            `leave_out` itself.
    """
    parts = [_list_source(source, leave_out) for source in sources]
    return concatenate_datasets(parts)


def draw_training_images(count: int, image_size: int, seed: int) -> Dataset:
    """Images of drawn shapes, with sides of `image_size` pixels to half as much again, as `list_training_images`."""
    sides = (max(32, image_size), max(32, round(1.5 * image_size)))
    return _encoded(draw_shapes_dataset(count, 0, 0, image_size=sides, seed=seed)["train"])


def _list_source(source: str, leave_out: Path | None) -> Dataset:
    path = Path(source)
    if leave_out is not None and leave_out.is_dir() and path.is_dir() and path.samefile(leave_out):
        raise InvalidDatasetError(
            f"--output_dir {leave_out} is a folder of images, which from the next time on would have the pictures of "
            "this run among them. Name another."
        )
    if leave_out is not None and leave_out.is_dir() and path.resolve() in leave_out.resolve().parents:
        logger.info("%s: the output_dir %s in it is left out.", source, leave_out)
    if path.is_file() and is_image(path):
        return _rows_of([source])
    if is_dataset(source):
        return _train_split(load_hub_dataset(source, None, None), source)
    if not path.exists():
        raise InvalidDatasetError(f"There is no file or folder {source}. Check the path.")
    formats = set() if path.is_file() else _annotated_formats(path)
    if not path.is_file() and not formats:
        return _list_folder(path, leave_out)
    # What is wrong with boxes is no matter here; images that cannot be read are refused when they are read.
    loaded = load_detection_dataset(path, on_invalid="drop", check_files=False)
    rows = _train_split(loaded, source)
    if path.is_file() or "datasets" in formats:
        return rows
    if leave_out is not None:  # of YOLO's annotations, too, all images below a folder may be meant
        places = [_place_of(image["path"]) for image in rows["image"]]
        run_dir = Path(os.path.realpath(leave_out))
        rows = rows.select([row for row, place in enumerate(places) if run_dir not in place.parents])
    named = {_place_of(image["path"]) for split in loaded.values() for image in _encoded(split)["image"]}
    taken = _unnamed_images(path, named, len(loaded) > 1, leave_out)
    return concatenate_datasets([rows, _rows_of(taken)]) if taken else rows


def _annotated_formats(folder: Path) -> set[str]:
    """
    Any JSON file counts as COCO where nothing else is found; among images without annotations it may be a note. And
    images with LabelMe's JSON beside them are taken as they lie, whatever has been drawn on them.
    """
    others = find_formats(folder).keys() - {"coco", "labelme"}
    return {*others, "coco"} if any(map(looks_like_coco, list_json_files(folder))) else {*others}


def _place_of(path: str) -> Path:
    """A file in its true folder; of a file that is a link, that of the link."""
    folder, name = os.path.split(path)
    return Path(os.path.realpath(folder), name)


def _unnamed_images(folder: Path, named: set[Path], has_others: bool, leave_out: Path | None) -> list[str]:
    """
    The images beside and below those that a data set names; none, and a warning, if it has other splits than "train":
    they may be of an entry there that cannot be used.
    """
    folders = {place.parent for place in named}
    taken: list[str] = []
    left: list[str] = []
    for path in find_images(folder, leave_out):
        place = _place_of(path)
        if place not in named:
            is_near = not folders.isdisjoint(place.parents)
            is_taken = is_near and not has_others and not _is_held_out(path, folder)
            (taken if is_taken else left).append(path)
    if taken:
        logger.info("%s: and %d images that no annotation names, as %s.", folder, len(taken), taken[0])
    if left:
        logger.warning(
            "%s: %d images that no annotation names are left out, as %s. If they are to be trained on, name these "
            "files or their folder, too.",
            folder,
            len(left),
            left[0],
        )
    return taken


def _is_held_out(path: str, folder: Path) -> bool:
    """Whether the name of a folder between speaks of validation or test."""
    return any(split_of(name) in ("validation", "test") for name in Path(path).relative_to(folder).parts[:-1])


def _list_folder(folder: Path, leave_out: Path | None) -> Dataset:
    """All images in and below a folder without annotations."""
    found: list[str] = []
    held_out: list[str] = []
    for path in find_images(folder, leave_out):
        (held_out if _is_held_out(path, folder) else found).append(path)
    if held_out:
        logger.warning(
            "%s: %d images are left out, because the names of their folders speak of validation or test (%s). If they "
            "are to be trained on, name their folder itself.",
            folder,
            len(held_out),
            Path(held_out[0]).relative_to(folder),
        )
    if not found:
        raise InvalidDatasetError(f"The folder {folder} holds no images{' to train on' * bool(held_out)}.")
    logger.info("%s: %d images without annotations.", folder, len(found))
    return _rows_of(found)


def _train_split(loaded: Any, source: str) -> Dataset:
    splits = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    train = [name for name in splits if split_of(name) == "train"]
    if not train and len(splits) == 1 and split_of(next(iter(splits))) is None:
        train = list(splits)
    if len(train) != 1:
        raise InvalidDatasetError(
            f'{source} has the splits {", ".join(splits)}: none, or more than one, is the split "train", and others '
            "are not trained on. Name a folder of images instead."
        )
    rows = splits[train[0]]
    if "image" not in rows.features:
        raise InvalidDatasetError(
            f'{source} needs a column "image", but has {", ".join(rows.features)}. Rename the one with the images.'
        )
    others = [f"{name} ({rows.num_rows})" for name, rows in splits.items() if name not in train]
    logger.info(
        '%s: %d images of the split "%s"; left out: %s.',
        source,
        rows.num_rows,
        train[0],
        ", ".join(others) or "nothing, for there is no other split",
    )
    return _encoded(rows)


def _encoded(rows: Dataset) -> Dataset:
    return rows.with_format(None).select_columns(["image"]).cast(_FEATURES)


def _rows_of(paths: Sequence[str]) -> Dataset:
    return Dataset.from_dict({"image": [{"bytes": None, "path": path} for path in paths]}, features=_FEATURES)
