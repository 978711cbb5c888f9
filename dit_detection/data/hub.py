"""Data sets with the columns `image` and `objects` (`bbox` xywh, `category`), as on the Hub: CPPE-5 and its like."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets.config
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    get_dataset_config_names,
    get_dataset_default_config_name,
    load_dataset,
    load_from_disk,
)
from datasets import Image as ImageFeature
from datasets.fingerprint import Hasher

from .annotations import Annotations, is_integer
from .layouts import SPLITS, split_of
from .problems import InvalidDatasetError, ProblemLog


def is_saved_to_disk(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def find_saved_dataset(folder: Path) -> str | None:
    """The first parquet file at any depth, tables of `imagefolder` left out."""
    return next((str(file) for file in folder.rglob("*.parquet") if file.name != "metadata.parquet"), None)


def load_hub_dataset(
    source: str | Path, name: str | None, revision: str | None, streaming: bool = False
) -> Dataset | DatasetDict | IterableDatasetDict:
    """
    Load a folder that `save_to_disk` wrote, one of parquet files, or a data set on the Hub.

    Raises:
        InvalidDatasetError: There is none, it is damaged, or its configurations are several and none of them is named.
    """
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise InvalidDatasetError(f"{path} is a folder: it has no revision {revision!r}. Leave the revision out.")
        if name is not None and is_saved_to_disk(path):
            raise InvalidDatasetError(f"{path} is one data set: it has no configuration {name!r}. Leave the name out.")
        try:
            if is_saved_to_disk(path):
                return load_from_disk(str(path))
            return load_dataset(str(path), name, cache_dir=_cache_of(path), streaming=streaming)
        except Exception as error:  # whatever damaged files make `datasets` and Arrow raise
            _refuse_configuration(str(path), name, None, error)
            message = " ".join(str(error.__cause__ or error).split())
            raise InvalidDatasetError(f"{path} cannot be loaded: {message:.300}. Write it again.") from error
    if path.exists():
        raise InvalidDatasetError(f"{path} is a file. Name the folder of the data set.")
    if path.is_absolute() or str(source).startswith(".") or str(source).count("/") > 1:
        raise InvalidDatasetError(f"{source} does not exist. Check the path.")
    try:
        return load_dataset(str(source), name, revision=revision, streaming=streaming)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        _refuse_configuration(str(source), name, revision, error)
        raise InvalidDatasetError(
            f"{source} is no folder or file here, and could not be loaded from the Hub: {error}. Check its name."
        ) from error


def _cache_of(folder: Path) -> str:
    """
    Where `datasets` keeps what it makes of a folder: a place for each state of its files.

    In its own place (5.2) it takes folders of one name with the same configurations in their README, as copies from
    the Hub have them, for the same, whatever their files hold.
    """
    state = []
    for parent, folders, files in os.walk(folder.resolve()):
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # such as .git and .cache
        for file in sorted(files):
            found = os.stat(os.path.join(parent, file))
            state.append((parent, file, found.st_size, found.st_mtime_ns))
    return str(Path(datasets.config.HF_DATASETS_CACHE, "dit_detection_folders", Hasher.hash(state)))


def _refuse_configuration(source: str, name: str | None, revision: str | None, error: Exception) -> None:
    """Raise InvalidDatasetError if a data set could not be loaded because of the name of its configuration."""
    if not isinstance(error, ValueError):  # which `datasets` then raises
        return
    try:
        names = get_dataset_config_names(source, revision=revision)
        default = get_dataset_default_config_name(source, revision=revision)
    except Exception:  # that it cannot be loaded has another reason
        return
    if (default if name is None else name) not in names:
        has = f"has no configuration {name!r}, but" if name is not None else "has several configurations:"
        raise InvalidDatasetError(
            f"{source} {has} {', '.join(names)}. Name one with --dataset_config_name (in Python, `name`), or save it "
            "with `save_to_disk` of `datasets` and name that folder."
        ) from error


def read_hub_splits(
    loaded: Dataset | DatasetDict,
    source: str,
    problems: ProblemLog,
    class_names: Sequence[str] | None = None,
    group_by: str | None = None,
) -> dict[str, Annotations]:
    """
    Read all splits of a data set that is loaded.

    Args:
        loaded (`Dataset` or `DatasetDict`): One alone is the split that it names, or "train".
        source (`str`): What messages call it.
        problems (`ProblemLog`): Where everything invalid is reported.
        class_names (`Sequence[str]`, *optional*): Names of classes that are given as integers alone.
        group_by (`str`, *optional*): Column that names the image's group.

    Raises:
        InvalidDatasetError: Splits or columns are not what they must be.
    """
    datasets = name_splits(loaded, source)
    names, labels = read_class_names(datasets, class_names)
    splits: dict[str, Annotations] = {}
    for split in datasets:
        where = f'{source}, split "{split}"'
        splits[split] = read_objects_column(datasets[split], labels, where, problems)
        splits[split].class_names = names
        if group_by is not None:
            if group_by not in datasets[split].column_names:
                columns = ", ".join(datasets[split].column_names)
                raise InvalidDatasetError(f"{where}: group_by is {group_by!r}, but it has the columns {columns}.")
            splits[split].groups = list(datasets[split][group_by])
    return splits


def name_splits(loaded: Any, source: str) -> dict[str, Any]:
    """
    The splits of a data set, streamed or not, under our names and in our order.

    Raises:
        InvalidDatasetError: A split has no name that is known, or two have the same.
    """
    named = loaded
    if not isinstance(loaded, dict):
        name = str(loaded.split or "train")
        named = {"train" if "train" in map(split_of, name.split("+")) else name: loaded}
    datasets: dict[str, Any] = {}
    for name, dataset in named.items():
        split = split_of(name) or ("train" if len(named) == 1 else None)
        if split is None or split in datasets:
            raise InvalidDatasetError(
                f'{source} has the splits {", ".join(named)}: "{name}" is none of {", ".join(SPLITS)}, or is twice. '
                "Load it with `datasets`, leave out or rename that split, and pass the DatasetDict."
            )
        datasets[split] = dataset.with_format(None)
    return {split: datasets[split] for split in SPLITS if split in datasets}


def read_class_names(
    splits: Mapping[str, Dataset], class_names: Sequence[str] | None = None
) -> tuple[list[str], dict[Any, int]]:
    """
    The classes of all splits together.

    Returns:
        `tuple[list[str], dict]`: Names in the order of the labels, and the label of each value in the data. Without a
        `ClassLabel` the classes are the values that occur, integers or names, sorted; integers that are no names in
        `class_names` are places in it.

    Raises:
        InvalidDatasetError: A split lacks a column, or the splits have different classes.
    """
    named: dict[str, list[str]] = {}
    values: set[Any] = set()
    for split, dataset in splits.items():
        fields = object_fields(dataset, split)
        category = getattr(fields["category"], "feature", fields["category"])
        if isinstance(category, ClassLabel):
            named[split] = list(category.names)
        else:
            for row in dataset.select_columns(["objects"]):
                values.update(object_columns(row["objects"])["category"])
    if named and (values or len({tuple(names) for names in named.values()}) > 1):
        what = "; ".join(f'"{split}" has {", ".join(names)}' for split, names in named.items())
        raise InvalidDatasetError(f"The classes differ between splits: {what}. Cast all to the same ClassLabel.")
    if named:
        names = next(iter(named.values()))
        return names, {label: label for label in range(len(names))}
    ordered = sorted(values - {None})
    found = list(map(str, ordered))
    # Classes that are named "1", "2", … are so because their numbers were all there was: of a detector, say.
    if class_names is not None and all(map(is_integer, ordered)) and not set(found) <= set(class_names):
        return list(class_names), {label: label for label in range(len(class_names))}
    return found, {value: label for label, value in enumerate(ordered)}


def read_objects_column(dataset: Dataset, labels: Mapping[Any, int], source: str, problems: ProblemLog) -> Annotations:
    """
    Read one split.

    Args:
        dataset (`Dataset`): With the columns that `read_class_names` asks for; `image_id`, `width` and `height` and
            the objects' `id`, `area` and `iscrowd` are used where they exist. Images without an id are numbered.
        labels (`Mapping`): Label of each value of `category`.
        source (`str`): What messages call it.
        problems (`ProblemLog`): Where everything invalid is reported.

    Returns:
        `Annotations`: What was read, with its images.
    """
    annotations = Annotations(source, problems)
    columns = [name for name in ("image_id", "width", "height", "objects") if name in dataset.column_names]
    if len(dataset) == 0:
        problems.add("no images", source, "it has no rows")
    seen: set[int] = set()
    for row, entry in enumerate(dataset.select_columns(columns)):
        image_id, width, height = entry.get("image_id", row), entry.get("width"), entry.get("height")
        if not is_integer(image_id) or any(size is not None and not is_integer(size) for size in (width, height)):
            what = f'fields "image_id", "width" and "height" are {image_id!r:.40}, {width!r:.40} and {height!r:.40}'
            annotations.add_image(row, f"row {row}", None, None)
            annotations.drop_image(row, "unusable image entry", what)
            continue
        if image_id in seen:
            problems.add("duplicate image id", f"{source}: row {row}", f'field "image_id" is {image_id} again')
        seen.add(image_id)
        annotations.add_image(image_id, f"row {row}", width, height)
        add_objects(annotations, row, object_columns(entry["objects"]), labels)
    annotations.images = dataset.select_columns(["image"]).cast_column("image", ImageFeature())
    return annotations


def object_fields(dataset: Dataset | IterableDataset, split: str) -> dict[str, Any]:
    """The features of the fields of `objects`."""
    objects = dataset.features.get("objects")
    fields = getattr(objects, "feature", objects)
    if "image" in dataset.features and isinstance(fields, dict) and "bbox" in fields and "category" in fields:
        return fields
    raise InvalidDatasetError(
        f'The split "{split}" needs the columns "image" and "objects" with "bbox" and "category", but has '
        f"{dict(dataset.features)!s:.300}. Rename or convert its columns."
    )


def object_columns(objects: Any) -> dict[str, list[Any]]:
    """The objects of one image as a dict of lists; some data sets have a list of dicts."""
    if isinstance(objects, dict):  # Arrow may have nothing at all in the place of an empty list
        return {field: [] if values is None else values for field, values in objects.items()}
    fields = ("id", "bbox", "category", "area", "iscrowd")
    return {field: [entry.get(field) for entry in objects or []] for field in fields}


def add_objects(annotations: Annotations, row: int, objects: dict[str, list[Any]], labels: Mapping[Any, int]) -> None:
    """Add the objects of an image, as `object_columns` gives them; `labels` has the label of each category."""
    problems, boxes = annotations.problems, objects["bbox"]
    for field, values in objects.items():
        if len(values) != len(boxes):
            what = f'field "{field}" has {len(values)} entries for {len(boxes)} boxes'
            problems.add("unusable object", annotations.where(row), what)
            return
    nothing = [None] * len(boxes)
    ids, areas, crowds = (objects.get(field, nothing) for field in ("id", "area", "iscrowd"))
    columns = zip(ids, boxes, objects["category"], areas, crowds, strict=True)
    for position, (object_id, bbox, category, area, iscrowd) in enumerate(columns):
        object_id = object_id if is_integer(object_id) else position
        if not isinstance(category, int | str) or category not in labels:
            what = f'field "category" is {category!r:.80}'
            problems.add("unknown category", annotations.where(row, object_id), what)
        else:
            annotations.add_object(row, object_id, bbox, labels[category], area, iscrowd)
