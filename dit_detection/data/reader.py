import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset, DatasetDict, Features, IterableDatasetDict
from datasets import Image as ImageFeature

from .annotations import Annotations
from .checks import check_images, check_objects, look_like_fractions
from .coco import read_coco_splits
from .dataset_files import report_unlisted_images, settle_image_paths
from .formats import FORMATS, LOOKED_FOR, Format, find_format
from .hub import load_hub_dataset, read_hub_splits
from .image_folder import read_image_folder
from .labelme import read_labelme
from .problems import CROWD_REMEDY, InvalidDatasetError, OnInvalid, ProblemLog
from .splits import check_fractions, report_overlap, split_train
from .streaming import stream_rows
from .voc import read_voc
from .yolo import read_yolo, to_pixels

READERS = {
    "coco": read_coco_splits,
    "voc": read_voc,
    "yolo": read_yolo,
    "labelme": read_labelme,
    "imagefolder": read_image_folder,
}


def load_detection_dataset(
    source: str | Path | Dataset | DatasetDict,
    *,
    on_invalid: OnInvalid = "error",
    format: Format | None = None,
    class_names: Sequence[str] | None = None,
    validation_fraction: float | None = None,
    test_fraction: float | None = None,
    group_by: str | None = None,
    seed: int = 0,
    check_files: bool = True,
    name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    splits: Sequence[str] | None = None,
) -> DatasetDict | IterableDatasetDict:
    """
    Read annotated images, check them, and return them in the row format of `row_format.py`.

    Args:
        source (`str`, `Path`, `Dataset` or `DatasetDict`): One of

            - a folder with images and COCO JSON (`layouts.py` says where), Pascal VOC (`voc.py`), YOLO (`yolo.py`),
              LabelMe (`labelme.py`) or tables (`image_folder.py`);
            - one file: a COCO JSON or a table, which becomes the split "train", or a description of YOLO;
            - a data set with the columns `image` and `objects` (`bbox` xywh, `category`): loaded, a folder of parquet
              files or of `save_to_disk`, or the id of one on the Hub.
        on_invalid (`"error"`, `"drop"` or `"clip"`): What to do about invalid objects and images: stop with a report
            of all of them; leave them out and log the counts; or the same, but cut boxes to their image where
            something is left of them. A box that sticks out of its image by up to one pixel is always cut.
        format (`str`, *optional*): "coco", "voc", "yolo", "labelme", "imagefolder" or "datasets", where a folder holds
            several.
        class_names (`Sequence[str]`, *optional*): The classes in the order of their labels, matched by name, in place
            of those of the data and their order.
        validation_fraction (`float`, *optional*): Share of "train" that becomes "validation" where there is none.
        test_fraction (`float`, *optional*): Share of "train" that becomes "test" where there is none.
        group_by (`str`, *optional*): Column, or field of an image's entry, whose values are kept together in these
            shares: the patient, the video, the place. Images with the same content always are, but for data sets of
            `datasets` that are streamed.
        seed (`int`): Which images those shares are made of.
        check_files (`bool`): Open every image file (its header only) to compare its size with the annotations, and
            look for images that are there twice (as is done to set some aside, too).
        name (`str`, *optional*): Configuration of a data set on the Hub, or of a copy of one, that has several.
        revision (`str`, *optional*): Commit, branch or tag of a data set on the Hub.
        streaming (`bool`): Open no image before its row is read. Data sets of `datasets` are checked row by row as
            they pass (`stream_rows` says how) and need not fit the disk; of the other formats, which are read as a
            whole, the annotations are checked at once and the images as they pass.
        splits (`Sequence[str]`, *optional*): Those that are wanted: if the data have them, and "train" is none of
            them, no other is checked or returned. By default all.

    Returns:
        `DatasetDict`, or `IterableDatasetDict` with `streaming`: One or more of "train", "validation" and "test".
        Images in folders stay files and are decoded when they are read. Labels count from 0 in the order of COCO's
        category ids, of a list of classes that comes with the data, or of the sorted names.

    Raises:
        InvalidDatasetError: Something is wrong with the data; the message names files, entries, fields and remedies.
        ValueError: An argument is wrong.
    """
    if on_invalid not in ("error", "drop", "clip"):
        raise ValueError(f'on_invalid is {on_invalid!r}; it must be "error", "drop" or "clip".')
    if streaming and _is_hub_dataset(source, format):
        _refuse_names(source, format, name, revision)
        check_fractions(validation_fraction, test_fraction)
        if test_fraction is not None or group_by is not None:
            raise ValueError("test_fraction and group_by cannot be used while a data set is streamed. Leave them out.")
        is_loaded = not isinstance(source, str | Path)
        return stream_rows(
            source if is_loaded else load_hub_dataset(source, name, revision, streaming=True),
            "data set" if is_loaded else str(source),
            on_invalid=on_invalid,
            class_names=class_names,
            validation_fraction=validation_fraction,
            seed=seed,
        )
    problems = ProblemLog(on_invalid)
    dataset = read_detection_dataset(
        source,
        problems,
        format=format,
        class_names=class_names,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        group_by=group_by,
        seed=seed,
        check_files=check_files and not streaming,
        name=name,
        revision=revision,
        splits=splits,
    )
    problems.finish()
    if streaming and dataset is not None:
        return stream_rows(dataset, str(source), on_invalid=on_invalid)
    return cast(DatasetDict, dataset)  # None comes with a problem that `finish` raises


def _is_hub_dataset(source: Any, format: Format | None) -> bool:
    """Whether a source is read by `datasets` and not by a reader of files."""
    if not isinstance(source, str | Path) or not Path(source).exists():
        return True
    return (format or find_format(Path(source))) == "datasets"


def read_detection_dataset(
    source: str | Path | Dataset | DatasetDict,
    problems: ProblemLog,
    *,
    format: Format | None = None,
    class_names: Sequence[str] | None = None,
    validation_fraction: float | None = None,
    test_fraction: float | None = None,
    group_by: str | None = None,
    seed: int = 0,
    check_files: bool = True,
    name: str | None = None,
    revision: str | None = None,
    splits: Sequence[str] | None = None,
) -> DatasetDict | None:
    """
    Read annotated images and record what is wrong with them, without raising for it; `load_detection_dataset` is this
    and `problems.finish()`.

    Args:
        source (`str`, `Path`, `Dataset` or `DatasetDict`): As all arguments that follow: see `load_detection_dataset`.
        problems (`ProblemLog`): Where everything invalid is recorded.

    Returns:
        `DatasetDict`, *optional*: What is valid (clipped if `problems` says so), or `None` after a problem that cannot
        be left out (`problems.fatal`).

    Raises:
        ValueError: An argument is wrong.
    """
    check_fractions(validation_fraction, test_fraction)
    if format not in (None, *FORMATS):
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}.")
    if class_names is not None and (not class_names or len(set(class_names)) < len(class_names)):
        raise ValueError(f"class_names is {list(class_names)}; it must have one name or more, each once.")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more.")
    where = "data set"
    try:
        _refuse_names(source, format, name, revision)
        if isinstance(source, Dataset | DatasetDict):
            found = read_hub_splits(source, where, problems, class_names, group_by)
        else:
            path = Path(source)
            where = os.path.abspath(path) if path.exists() else str(source)
            format = _format_of(path, format)
            if format == "datasets":
                loaded = load_hub_dataset(source, name, revision)
                found = read_hub_splits(loaded, str(source), problems, class_names, group_by)
            else:
                found = _read_files(Path(where), format, class_names, group_by, problems, check_files)
        # Of "train" others may be set aside.
        if splits is not None and "train" not in splits and found.keys() >= set(splits):
            found = {split: found[split] for split in splits}
            validation_fraction = test_fraction = None
        if group_by is not None:
            _check_groups(found, group_by)
        _refuse_fractions(found.values())
        dataset = _check_and_convert(found, class_names, problems, check_files)
        if dataset is None:
            return None
        groups = {
            split: [group for group, keep in zip(annotations.groups, annotations.keep_image, strict=True) if keep]
            for split, annotations in found.items()
            if annotations.groups
        }
        sets_aside = validation_fraction is not None or test_fraction is not None
        duplicates = report_overlap(dataset, groups, problems) if check_files or sets_aside else []
        return split_train(dataset, groups.get("train", []), duplicates, validation_fraction, test_fraction, seed)
    except (InvalidDatasetError, OSError) as error:
        problems.add("unusable data set", where, str(error).removeprefix(f"{where}: ").removeprefix(f"{where} "))
        return None


def _refuse_names(source: Any, format: Format | None, name: str | None, revision: str | None) -> None:
    """Raise ValueError if a name or revision would change nothing, as `datasets` does not load what it names."""
    given = {field: value for field, value in {"name": name, "revision": revision}.items() if value is not None}
    is_loaded = not isinstance(source, str | Path)
    if given and (is_loaded or not _is_hub_dataset(source, format)):
        what = "a data set that is loaded" if is_loaded else f"the annotations of {source}"
        raise ValueError(f"{given}: {what} can have neither a name nor a revision. Leave it out.")


def _format_of(path: Path, format: Format | None) -> Format:
    """The format of a source that is no data set in memory. What does not exist here may be on the Hub."""
    if not path.exists():
        if format not in (None, "datasets"):
            raise InvalidDatasetError(f"{path} does not exist. Check the path.")
        return "datasets"
    if format is None or path.is_file():
        found = find_format(path)
        if format not in (None, found):
            raise InvalidDatasetError(f'{path} is a file of the format "{found}", not "{format}". Correct either.')
        return found
    return format


def _read_files(
    path: Path,
    format: Format,
    class_names: Sequence[str] | None,
    group_by: str | None,
    problems: ProblemLog,
    check_files: bool,
) -> dict[str, Annotations]:
    splits = READERS[format](path, problems, class_names, group_by)
    if not splits:
        raise InvalidDatasetError(f'{path} holds nothing of the format "{format}". Looked for:\n{LOOKED_FOR}')
    for annotations in splits.values():
        settle_image_paths(annotations, path if path.is_dir() else path.parent)
    if check_files:
        report_unlisted_images(splits.values(), problems)
    return splits


def _check_groups(splits: Mapping[str, Annotations], group_by: str) -> None:
    for annotations in splits.values():
        missing = [row for row, group in enumerate(annotations.groups) if group is None or group == ""]
        if annotations.groups and len(missing) == len(annotations.groups):
            raise InvalidDatasetError(f"{annotations.source}: group_by is {group_by!r}, but no image has that field.")
        for row in missing:
            annotations.drop_image(row, "no group", f'field "{group_by}" is missing')


def _refuse_fractions(splits: Iterable[Annotations]) -> None:
    """Many tools write fractions of the image under the same names; as pixels, they would all be specks."""
    for annotations in splits:
        if annotations.boxes_are_fractions or not len(annotations.boxes):
            continue
        # Not all of them: tools round, and boxes stick out.
        are_fractions = look_like_fractions(np.array(annotations.boxes).reshape(-1, 4))
        if are_fractions.mean() > 0.5:
            number = "all" if are_fractions.all() else f"{are_fractions.sum()} of {len(are_fractions)}"
            what = f"{number} boxes lie between 0 and 1, as fractions do. Write pixels."
            raise InvalidDatasetError(f"{annotations.source}: {what}")


def _check_and_convert(
    splits: Mapping[str, Annotations], class_names: Sequence[str] | None, problems: ProblemLog, check_files: bool
) -> DatasetDict | None:
    checked: dict[str, dict[str, np.ndarray]] = {}
    images: dict[str, Dataset] = {}
    for split, annotations in splits.items():
        if annotations.images is None:
            paths = {"image": list(annotations.image_paths)}
            annotations.images = Dataset.from_dict(paths, features=Features({"image": ImageFeature()}))
        images[split] = annotations.images
        encoded: Any = images[split].cast_column("image", ImageFeature(decode=False))["image"]
        check_images(annotations, encoded, check_files)
        if annotations.boxes_are_fractions:
            to_pixels(annotations)
        checked[split] = check_objects(annotations)
        if class_names is not None:
            checked[split] = _match_classes(annotations, checked[split], class_names)
        if problems.fatal:
            continue
        if not any(annotations.keep_image):
            problems.add("no images", annotations.source, "none of its images can be used")
        elif split == "train" and checked[split]["iscrowd"].all():
            crowds = len(checked[split]["row"])
            what = f"all {crowds} objects are crowd regions, in which nothing is learned. {CROWD_REMEDY}"
            problems.add("no objects", annotations.source, what if crowds else "none of its images has a valid object")
    if problems.fatal:
        return None
    return DatasetDict(
        {
            split: annotations.to_dataset(images[split], checked[split], class_names or annotations.class_names, split)
            for split, annotations in splits.items()
        }
    )


def _match_classes(
    annotations: Annotations, objects: dict[str, np.ndarray], class_names: Sequence[str]
) -> dict[str, np.ndarray]:
    """The objects with the labels of these classes; those of other classes are reported and left out."""
    labels = {name: label for label, name in enumerate(class_names)}
    new_labels = np.array([labels.get(name, -1) for name in annotations.class_names], dtype=np.int64)
    matched = new_labels[objects["category"]]
    for index in np.flatnonzero(matched < 0):
        name = annotations.class_names[objects["category"][index]]
        what = f"class {name!r:.80} is none of class_names: {', '.join(class_names)}"
        row, object_id = int(objects["row"][index]), int(objects["id"][index])
        annotations.report("unknown category", f"{what:.300}", row, object_id, objects["bbox"][index].tolist())
    keep = matched >= 0
    return {field: values[keep] for field, values in (objects | {"category": matched}).items()}
