"""Which images are trained on: of folders, annotated data sets and the Hub, the training images alone."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, concatenate_datasets
from datasets import Image as ImageFeature

from ..data import InvalidDatasetError, load_detection_dataset
from ..data.dataset_files import is_image
from ..data.formats import find_formats
from ..data.hub import load_hub_dataset
from ..data.image_listing import find_images, is_dataset
from ..data.layouts import list_json_files, looks_like_coco, split_of

logger = logging.getLogger(__name__)

_FEATURES = Features({"image": ImageFeature(decode=False)})


def list_training_images(sources: Sequence[str]) -> Dataset:
    """
    List the images to train on, and log of each source how many they are and what is left out.

    Of a source with splits only "train" is read: what is to be measured on later must not have been seen. In folders
    without annotations, what lies below a folder whose name speaks of validation or test is left out.

    Args:
        sources (`Sequence[str]`): Image files; folders of images, searched in depth; folders or files of annotations
            that `load_detection_dataset` reads; folders or Hub ids of data sets with a column `image`.

    Returns:
        `datasets.Dataset`: The column `image`, encoded ("bytes" or, where that is `None`, "path").

    Raises:
        InvalidDatasetError: A source does not exist, has no images, or has splits but none to train on.
    """
    parts = [_list_source(source) for source in sources]
    return concatenate_datasets(parts)


def _list_source(source: str) -> Dataset:
    path = Path(source)
    if path.is_file() and is_image(path):
        return _rows_of([source])
    if is_dataset(source):
        return _train_split(load_hub_dataset(source, None, None), source)
    if not path.exists():
        raise InvalidDatasetError(f"There is no file or folder {source}. Check the path.")
    if path.is_file() or _is_annotated(path):
        # What is wrong with boxes is no matter here; images that cannot be read are refused when they are read.
        return _train_split(load_detection_dataset(path, on_invalid="drop", check_files=False), source)
    return _list_folder(path)


def _is_annotated(folder: Path) -> bool:
    """Any JSON file counts as COCO where nothing else is found; among images without annotations it may be a note."""
    return bool(find_formats(folder).keys() - {"coco"}) or any(map(looks_like_coco, list_json_files(folder)))


def _list_folder(folder: Path) -> Dataset:
    """All images in and below a folder without annotations."""
    found: list[str] = []
    held_out: list[str] = []
    for path in find_images(folder):
        parents = Path(path).relative_to(folder).parts[:-1]
        is_held_out = any(split_of(name) in ("validation", "test") for name in parents)
        (held_out if is_held_out else found).append(path)
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
    return rows.with_format(None).select_columns(["image"]).cast(_FEATURES)


def _rows_of(paths: Sequence[str]) -> Dataset:
    return Dataset.from_dict({"image": [{"bytes": None, "path": path} for path in paths]}, features=_FEATURES)
