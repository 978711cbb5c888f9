"""Looks for what is suspicious in a data set. Shape letters: N images, M objects, K pairs, of one split."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .duplicates import Place, find_duplicate_images
from .findings import FEW_OBJECTS, Example, FindingLog
from .image_scan import ImageFacts
from .statistics import SplitTable

SAME_PLACE_IOU = 0.9  # two objects of one class that close would be one detection to non-maximum suppression
WHOLE_IMAGE = 0.95  # share of the image
MIN_CANVAS_SIDE = 4.0  # pixels: half a cell of the finest default feature map
MAX_ASPECT = 10.0
NEARLY_ALL = 0.9  # of the images of a split
MIN_IMAGES = 20  # that show a class, to speak of nearly all
BACKGROUND_NAMES = {"background", "bg", "no object", "none"}


def inspect_boxes(table: SplitTable, class_names: Sequence[str], log: FindingLog) -> None:
    """Look for boxes that are doubled, as large as their image, lost on the canvas, or very long and thin."""
    countable = table.iscrowd == 0
    first, second, ious = find_same_place(table)
    same_class = table.labels[first] == table.labels[second]
    for kind, mask in (("two boxes for one object", same_class), ("two classes at one place", ~same_class)):
        pairs = sorted(zip((-ious[mask]).tolist(), first[mask].tolist(), second[mask].tolist(), strict=True))
        examples = (_example(table, (i, j), f"overlap by IoU {-iou:.2f}", class_names) for iou, i, j in pairs)
        log.add(kind, len(pairs), examples, table.name)

    shares = table.bbox[:, 2:].prod(axis=1) / (table.widths * table.heights)[table.rows]
    canvas_boxes = table.canvas_boxes
    sides = canvas_boxes[:, 2:] - canvas_boxes[:, :2]
    short_side = sides.min(axis=1, initial=np.inf)
    ratios = sides[:, 1] / sides[:, 0]
    stretch = np.maximum(ratios, 1 / ratios)
    crowds = np.flatnonzero(~countable)
    if 2 * len(crowds) > len(countable):
        examples = (
            _example(table, (i,), f"a crowd region, as {len(crowds)} of {len(countable)} objects are", class_names)
            for i in crowds.tolist()
        )
        log.add("mostly crowd regions", len(crowds), examples, table.name)
    checks: dict[str, tuple[Any, Any, Any]] = {
        "box of the whole image": (shares > WHOLE_IMAGE, -shares, lambda i: f"covers {shares[i]:.0%} of the image"),
        "object too small for the canvas": (
            short_side < MIN_CANVAS_SIDE,
            short_side,
            lambda i: f"{sides[i, 0]:.1f} x {sides[i, 1]:.1f} pixels on the canvas",
        ),
        "extreme aspect ratio": (stretch > MAX_ASPECT, -stretch, lambda i: f"height / width is {ratios[i]:.3g}"),
    }
    for kind, (mask, order, what) in checks.items():
        indices = np.flatnonzero(mask & countable)
        indices = indices[np.argsort(order[indices], kind="stable")]
        examples = (_example(table, (i,), what(i), class_names) for i in indices.tolist())
        log.add(kind, len(indices), examples, table.name)


def find_same_place(table: SplitTable) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """
    Pairs of objects of one image whose boxes overlap by an IoU above 0.9; crowd regions are left out.

    Returns:
        `tuple`: The objects of each pair, two arrays `(K,)`, and their IoU `(K,)`.
    """
    objects = np.flatnonzero(table.iscrowd == 0)
    objects = objects[np.lexsort((table.bbox[objects, 0], table.rows[objects]))]
    x, y, width, height = table.bbox[objects].T
    rows = table.rows[objects]
    found: list[tuple[Any, Any, Any]] = []
    # In the order of their left edges, a box and one that starts further right than a tenth of its width cannot
    # overlap that much, nor can any later one: so each box is compared with a few successors, all boxes at once.
    current, step = np.arange(len(objects)), 1
    while True:
        current = current[current + step < len(objects)]
        other = current + step
        near = (rows[other] == rows[current]) & (x[other] - x[current] < (1 - SAME_PLACE_IOU) * width[current])
        current, other = current[near], other[near]
        if not len(current):
            break
        overlap_x = np.minimum((x + width)[current], (x + width)[other]) - x[other]
        overlap_y = np.minimum((y + height)[current], (y + height)[other]) - np.maximum(y[current], y[other])
        overlap = overlap_x.clip(0) * overlap_y.clip(0)
        iou = overlap / ((width * height)[current] + (width * height)[other] - overlap)
        same = iou > SAME_PLACE_IOU
        found.append((objects[current[same]], objects[other[same]], iou[same]))
        step += 1
    first, second, ious = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else np.zeros((3, 0))
    return first.astype(np.int64), second.astype(np.int64), ious


def inspect_classes(tables: Mapping[str, SplitTable], class_names: Sequence[str], log: FindingLog) -> None:
    """Look for classes that are unused, misplaced or rare, in all splits together."""
    num_classes = len(class_names)
    # Without crowd regions, in which nothing is learned.
    counts = {
        name: np.bincount(table.labels[table.iscrowd == 0], minlength=num_classes) for name, table in tables.items()
    }
    for split, per_class in counts.items():
        if not per_class.sum():
            log.add("split without objects", 1, [Example(split, "none of its images has an object")], split)

    def report(kind: str, labels: Iterable[int], what: str) -> None:
        examples = [Example(f'class {label} ("{class_names[label]}")', what) for label in labels]
        log.add(kind, len(examples), examples)

    totals = sum(counts.values(), np.zeros(num_classes, np.int64))
    background = {
        label for label, name in enumerate(class_names) if name.lower().replace("_", " ").strip() in BACKGROUND_NAMES
    }
    report("class for the background", sorted(background), "a class of its own")
    unused = [label for label in np.flatnonzero(totals == 0).tolist() if label not in background]
    # All labels raised by one leave the first class empty; lowered by one, the last.
    if num_classes > 2 and unused in ([0], [num_classes - 1]):
        position = "first" if unused == [0] else "last"
        report("labels may be one class off", unused, f"the {position} class, and the only one without objects")
    elif totals.sum():
        report("class that is never used", unused, "has no object in any split")
    if all(name.strip().isdecimal() for name in class_names):
        log.add("classes without names", num_classes, [Example("classes", ", ".join(class_names[:5]))])
    if "train" not in counts:
        log.add("no training split", 1, [Example("data set", f"it has {', '.join(tables)}")])
        return
    train, others = counts["train"], totals - counts["train"]
    report("class without training objects", np.flatnonzero((train == 0) & (others > 0)), "only in other splits")
    if others.sum():
        report("class in training only", np.flatnonzero((train > 0) & (others == 0)), "in no other split")
    for label in np.flatnonzero((train > 0) & (train < FEW_OBJECTS)).tolist():
        what = f"{train[label]} object{'s' if train[label] > 1 else ''} in train"
        report("class with few training objects", [label], what)


def inspect_images(
    table: SplitTable, class_names: Sequence[str], facts: Sequence[ImageFacts], log: FindingLog
) -> None:
    """Look for images in which objects seem to be missing, and take over what the files themselves show."""
    num_images = len(table.widths)
    shown = np.zeros((num_images, len(class_names)), dtype=bool)
    shown[table.rows, table.labels] = True
    empty = np.flatnonzero(~shown.any(axis=1))
    usual = shown.sum(axis=0) >= max(NEARLY_ALL * num_images, MIN_IMAGES)
    without = np.argwhere(~shown & usual & shown.any(axis=1, keepdims=True)).tolist()
    lacking = (_image_example(table, row, f"no {class_names[label]}") for row, label in without)
    log.add("image without a usual class", len(without), lacking, table.name)
    if len(table.rows):  # otherwise it is said of the split
        log.add(
            "image without objects", len(empty), (_image_example(table, row, "") for row in empty.tolist()), table.name
        )
    damaged = [row for row, fact in enumerate(facts) if fact.damage]
    examples: Iterator[Example] = (_image_example(table, row, str(facts[row].damage)) for row in damaged)
    log.add("image cannot be decoded", len(damaged), examples, table.name)
    odd: dict[str, list[int]] = {}
    for row, fact in enumerate(facts):
        for kind in fact.oddities:
            odd.setdefault(kind, []).append(row)
    for kind, found in odd.items():
        examples = (_image_example(table, row, f"{facts[row].format}, mode {facts[row].mode}") for row in found)
        log.add(kind, len(found), examples, table.name)


def inspect_duplicates(tables: Mapping[str, SplitTable], log: FindingLog) -> None:
    """Look for images that are the same byte for byte, in one split or in several."""
    groups = find_duplicate_images({name: table.dataset for name, table in tables.items()})
    for name, table in tables.items():
        copies: dict[str, list[tuple[int, Place]]] = {
            "same image twice in a split": [],
            "same image in two splits": [],
        }
        for places in groups:
            rows = [row for split, row in places if split == name]
            copies["same image twice in a split"] += ((row, (name, rows[0])) for row in rows[1:])
            # A leak is told where it does harm: in the later split.
            if rows and places[0][0] != name:
                copies["same image in two splits"] += ((row, places[0]) for row in rows)
        for kind, found in copies.items():
            examples = (_copy_example(table, row, original, tables) for row, original in found)
            log.add(kind, len(found), examples, name)


def _copy_example(table: SplitTable, row: int, original: Place, tables: Mapping[str, SplitTable]) -> Example:
    split, first = original
    same = _objects_of(table, row) == _objects_of(tables[split], first)
    what = f"also as {_image_example(tables[split], first, '').where}, with {'the same' if same else 'other'} objects"
    return _image_example(table, row, what)


def _objects_of(table: SplitTable, row: int) -> list[tuple[float, ...]]:
    start, end = np.searchsorted(table.rows, [row, row + 1])
    return sorted((float(table.labels[i]), *table.bbox[i].tolist()) for i in range(start, end))


def _image_example(table: SplitTable, row: int, what: str) -> Example:
    path = table.dataset[row]["image"]["path"]
    name = Path(path).name if path else f"image_id {table.image_ids[row]}"
    return Example(f"{name} ({table.name})", what, table.name, row)


def _example(table: SplitTable, indices: Sequence[int], what: str, class_names: Sequence[str]) -> Example:
    image = _image_example(table, int(table.rows[indices[0]]), "")
    labels = tuple(class_names[table.labels[i]] for i in indices)
    boxes = tuple(tuple(table.bbox[i].tolist()) for i in indices)
    return Example(image.where, f"{' and '.join(labels)}: {what}", image.split, image.row, boxes=boxes, labels=labels)
