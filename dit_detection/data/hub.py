"""Data sets with the columns `image` and `objects` (`bbox` xywh, `category`), as on the Hub: CPPE-5 and its like."""

from collections.abc import Mapping
from typing import Any

from datasets import ClassLabel, Dataset
from datasets import Image as ImageFeature

from .annotations import Annotations, is_integer
from .problems import InvalidDatasetError, ProblemLog


def read_class_names(splits: Mapping[str, Dataset]) -> tuple[list[str], dict[Any, int]]:
    """
    The classes of all splits together.

    Returns:
        `tuple[list[str], dict]`: Names in the order of the labels, and the label of each value in the data. Without a
        `ClassLabel` the classes are the values that occur, integers or names, sorted.

    Raises:
        InvalidDatasetError: A split lacks a column, or the splits have different classes.
    """
    named: dict[str, list[str]] = {}
    values: set[Any] = set()
    for split, dataset in splits.items():
        fields = _object_fields(dataset, split)
        category = getattr(fields["category"], "feature", fields["category"])
        if isinstance(category, ClassLabel):
            named[split] = list(category.names)
        else:
            for row in dataset.select_columns(["objects"]):
                values.update(_columns(row["objects"])["category"])
    if named and (values or len({tuple(names) for names in named.values()}) > 1):
        what = "; ".join(f'"{split}" has {", ".join(names)}' for split, names in named.items())
        raise InvalidDatasetError(f"The classes differ between splits: {what}. Cast all to the same ClassLabel.")
    if named:
        names = next(iter(named.values()))
        return names, {label: label for label in range(len(names))}
    ordered = sorted(values - {None})
    return [str(value) for value in ordered], {value: label for label, value in enumerate(ordered)}


def read_objects_column(
    dataset: Dataset, labels: Mapping[Any, int], source: str, problems: ProblemLog
) -> tuple[Annotations, Dataset]:
    """
    Read one split.

    Args:
        dataset (`Dataset`): With the columns that `read_class_names` asks for; `image_id`, `width` and `height` and
            the objects' `id`, `area` and `iscrowd` are used where they exist. Images without an id are numbered.
        labels (`Mapping`): Label of each value of `category`.
        source (`str`): What messages call it.
        problems (`ProblemLog`): Where everything invalid is reported.

    Returns:
        `tuple[Annotations, Dataset]`: What was read, and its images (the column "image").
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
        _add_objects(annotations, row, _columns(entry["objects"]), labels)
    return annotations, dataset.select_columns(["image"]).cast_column("image", ImageFeature())


def _object_fields(dataset: Dataset, split: str) -> dict[str, Any]:
    objects = dataset.features.get("objects")
    fields = getattr(objects, "feature", objects)
    if "image" in dataset.features and isinstance(fields, dict) and "bbox" in fields and "category" in fields:
        return fields
    raise InvalidDatasetError(
        f'The split "{split}" needs the columns "image" and "objects" with "bbox" and "category", but has '
        f"{dict(dataset.features)}. Rename or convert its columns."
    )


def _columns(objects: Any) -> dict[str, list[Any]]:
    """The objects of one image as a dict of lists; some data sets have a list of dicts."""
    if isinstance(objects, dict):
        return objects
    fields = ("id", "bbox", "category", "area", "iscrowd")
    return {field: [entry.get(field) for entry in objects or []] for field in fields}


def _add_objects(annotations: Annotations, row: int, objects: dict[str, list[Any]], labels: Mapping[Any, int]) -> None:
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
        if category not in labels:
            what = f'field "category" is {category!r:.80}'
            problems.add("unknown category", annotations.where(row, object_id), what)
        else:
            annotations.add_object(row, object_id, bbox, labels[category], area, iscrowd)
