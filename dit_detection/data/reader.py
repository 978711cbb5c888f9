from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, load_dataset, load_from_disk
from datasets import Image as ImageFeature

from .annotations import Annotations
from .checks import check_images, check_objects
from .coco import Categories, read_coco
from .hub import read_class_names, read_objects_column
from .layouts import SPLITS, find_coco_files, split_of
from .problems import InvalidDatasetError, OnInvalid, ProblemLog

Split = tuple[Annotations, Dataset]  # a split as it was read, and the column "image" with a row for each of its images


def load_detection_dataset(
    source: str | Path | Dataset | DatasetDict,
    *,
    on_invalid: OnInvalid = "error",
    validation_fraction: float | None = None,
    seed: int = 0,
    check_files: bool = True,
    name: str | None = None,
    revision: str | None = None,
) -> DatasetDict:
    """
    Read annotated images, check them, and return them in the row format of `row_format.py`.

    Args:
        source (`str`, `Path`, `Dataset` or `DatasetDict`): One of

            - a folder with COCO JSON and images: `annotations_train.json` and `images/`;
              `annotations/instances_train2017.json` and `train2017/`; `train/_annotations.coco.json` and images;
            - one COCO JSON file, which becomes the split "train";
            - a data set with the columns `image` and `objects` (`bbox` xywh, `category`): loaded, a folder of parquet
              files or of `save_to_disk`, or the id of one on the Hub.
        on_invalid (`"error"`, `"drop"` or `"clip"`): What to do about invalid objects and images: stop with a report
            of all of them; leave them out and log the counts; or the same, but cut boxes to their image where
            something is left of them. A box that sticks out of its image by up to one pixel is always cut.
        validation_fraction (`float`, *optional*): Share of "train" that becomes "validation" where there is none.
        seed (`int`): Which images that share is made of.
        check_files (`bool`): Open every image file (its header only) to compare its size with the annotations.
        name (`str`, *optional*): Configuration of a data set on the Hub.
        revision (`str`, *optional*): Its commit, branch or tag.

    Returns:
        `DatasetDict`: One or more of "train", "validation" and "test". Images of COCO folders stay files and are
        decoded when they are read. Labels count from 0 in the order of the category ids.

    Raises:
        InvalidDatasetError: Something is wrong with the data; the message names files, entries, fields and remedies.
        ValueError: An argument is wrong.
    """
    if on_invalid not in ("error", "drop", "clip"):
        raise ValueError(f'on_invalid is {on_invalid!r}; it must be "error", "drop" or "clip".')
    if validation_fraction is not None and not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; it must lie between 0 and 1.")
    problems = ProblemLog(on_invalid)
    path = None if isinstance(source, Dataset | DatasetDict) else Path(source)
    coco_files = find_coco_files(path) if path is not None and _may_hold_coco(path) else {}
    if coco_files:
        splits, class_names = _read_coco_splits(coco_files, problems)
    else:
        loaded = _load(source, name, revision)
        splits, class_names = _read_objects_splits(loaded, "data set" if path is None else str(source), problems)
    dataset = _check_and_convert(splits, class_names, problems, check_files)
    if validation_fraction is not None and "train" in dataset and "validation" not in dataset:
        dataset = _split_train(dataset, validation_fraction, seed)
    return dataset


def _may_hold_coco(path: Path) -> bool:
    if path.is_file():
        if path.suffix.lower() == ".json":
            return True
        raise InvalidDatasetError(f"{path} is not a COCO JSON file. Name one, or the folder that holds the data set.")
    return path.is_dir() and not _is_saved_to_disk(path) and not any(path.rglob("*.parquet"))


def _is_saved_to_disk(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _load(source: str | Path | Dataset | DatasetDict, name: str | None, revision: str | None) -> Dataset | DatasetDict:
    if isinstance(source, Dataset | DatasetDict):
        return source
    path = Path(source)
    if path.is_dir():
        if _is_saved_to_disk(path):
            return load_from_disk(str(path))
        if any(path.rglob("*.parquet")):
            return load_dataset(str(path))
        raise InvalidDatasetError(
            f"{path} holds neither a COCO JSON nor a data set of `datasets`. Known are annotations_train.json with "
            "images/, annotations/instances_train2017.json with train2017/, train/_annotations.coco.json, parquet "
            "files and folders of save_to_disk."
        )
    if path.is_absolute() or str(source).startswith(".") or str(source).count("/") > 1:
        raise InvalidDatasetError(f"{source} does not exist. Check the path.")
    try:
        return load_dataset(str(source), name, revision=revision)
    except (FileNotFoundError, ConnectionError) as error:
        raise InvalidDatasetError(
            f"{source} is no folder or file here, and could not be loaded from the Hub: {error}. Check its name."
        ) from error


def _read_coco_splits(
    files: Mapping[str, tuple[Path, list[Path]]], problems: ProblemLog
) -> tuple[dict[str, Split], list[str]]:
    splits: dict[str, Split] = {}
    first: tuple[Path, Categories] | None = None
    for split, (file, image_folders) in files.items():
        annotations, paths, categories = read_coco(file, image_folders, problems)
        splits[split] = annotations, Dataset.from_dict({"image": paths}, features=Features({"image": ImageFeature()}))
        if first is not None and categories and categories != first[1]:
            here, there = (dict(sorted(a.items() - b.items())) for a, b in permutations((categories, first[1])))
            what = f'key "categories" has {here!r:.100} where {first[0]} has {there!r:.100}'
            problems.add("categories differ between splits", str(file), what)
        first = first or ((file, categories) if categories else None)
    return splits, list(first[1].values()) if first else []


def _read_objects_splits(
    loaded: Dataset | DatasetDict, source: str, problems: ProblemLog
) -> tuple[dict[str, Split], list[str]]:
    named = loaded if isinstance(loaded, DatasetDict) else {str(loaded.split or "train"): loaded}
    datasets: dict[str, Dataset] = {}
    for name, dataset in named.items():
        split = split_of(name) or ("train" if len(named) == 1 else None)
        if split is None or split in datasets:
            raise InvalidDatasetError(
                f'{source} has the splits {", ".join(named)}: "{name}" is none of {", ".join(SPLITS)}, or is twice. '
                "Load it with `datasets`, leave out or rename that split, and pass the DatasetDict."
            )
        datasets[split] = dataset.with_format(None)
    class_names, labels = read_class_names(datasets)
    splits = {
        split: read_objects_column(datasets[split], labels, f'{source}, split "{split}"', problems)
        for split in SPLITS
        if split in datasets
    }
    return splits, class_names


def _check_and_convert(
    splits: Mapping[str, Split], class_names: list[str], problems: ProblemLog, check_files: bool
) -> DatasetDict:
    checked: dict[str, dict[str, np.ndarray]] = {}
    for split, (annotations, images) in splits.items():
        encoded: Any = images.cast_column("image", ImageFeature(decode=False))["image"]
        check_images(annotations, encoded, check_files)
        checked[split] = check_objects(annotations)
        if problems.fatal:
            continue
        if not any(annotations.keep_image):
            problems.add("no images", annotations.source, "none of its images can be used")
        elif split == "train" and not len(checked[split]["row"]):
            problems.add("no objects", annotations.source, "none of its images has a valid object")
    problems.finish()
    return DatasetDict(
        {
            split: annotations.to_dataset(images, checked[split], class_names, split)
            for split, (annotations, images) in splits.items()
        }
    )


def _split_train(dataset: DatasetDict, fraction: float, seed: int) -> DatasetDict:
    train = dataset["train"]
    num_validation = min(max(1, round(len(train) * fraction)), len(train) - 1)
    if num_validation < 1:
        raise ValueError(f'The split "train" has {len(train)} image; it takes 2 to set some aside for validation.')
    order = np.random.default_rng(seed).permutation(len(train))
    parts = {"train": sorted(order[num_validation:]), "validation": sorted(order[:num_validation])}
    return DatasetDict(dataset | {split: train.select(indices) for split, indices in parts.items()})
