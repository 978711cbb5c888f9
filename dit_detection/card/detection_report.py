"""
What the detections of an evaluation are worth at one confidence threshold: how many are right, what is missed, what is
taken for what.

All numbers but the confusion matrix are of COCO's matching at IoU 0.5, in which a detection's match does not depend on
the detections that score lower: cutting the list at a threshold leaves the matches above it as they are. Crowd regions
are neither found nor missed, and detections on them neither right nor wrong.

Shape letters: N images, K detections, M objects, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import hotcoco
import numpy as np
from numpy.typing import NDArray

from ..metrics import run_evaluator

IOU_THRESHOLD = 0.5
# Per image and class, as `map` counts them.
MAX_DETECTIONS = 100
# A threshold of two digits can be read, said and typed.
CANDIDATES = np.arange(100) / 100


@dataclass(frozen=True)
class ImageDetections:
    """
    One image of an evaluation.

    Args:
        image_id (`int`): Unique in its data set.
        found (`np.ndarray` of shape `(K, 6)`): xyxy in original pixels, score, label.
        expected (`np.ndarray` of shape `(M, 7)`): xyxy in original pixels, label, iscrowd, area.
    """

    image_id: int
    found: NDArray[Any]
    expected: NDArray[Any]


@dataclass
class ClassReport:
    """
    One class at the threshold.

    Args:
        name (`str`): Of the class.
        objects (`int`): To be found, without crowd regions.
        correct, wrong (`int`): Detections above the threshold.
        ap_50 (`float`, *optional*): Average precision at IoU 0.5, over all thresholds; `None` without objects.
        curve (`list[float]`): Precision at the recalls 0, 0.01, …, 1 (interpolated as COCO does); empty without
            objects.
    """

    name: str
    objects: int
    correct: int
    wrong: int
    ap_50: float | None = None
    curve: list[float] = field(default_factory=list)

    @property
    def precision(self) -> float | None:
        """Share of the detections that are right; `None` without detections."""
        return _share(self.correct, self.correct + self.wrong)

    @property
    def recall(self) -> float | None:
        """Share of the objects that are found; `None` without objects."""
        return _share(self.correct, self.objects)


@dataclass
class DetectionReport:
    """
    An evaluation at a confidence threshold. Made of numbers, strings and lists alone, to be written as JSON.

    Args:
        threshold (`float`): Detections with higher scores count.
        classes (`list[ClassReport]`): In the order of the labels.
        confusion (`list[list[int]]`): `[row, column, count]` where the count is not 0: objects of the class `row` that
            were detected as the class `column`. The index C is the background: in `column` for objects that were
            missed, in `row` for detections without an object. Each detection takes, best score first, the object
            it overlaps most, of whatever class.
    """

    threshold: float
    classes: list[ClassReport]
    confusion: list[list[int]]

    @property
    def precision(self) -> float | None:
        """Share of all detections that are right; `None` without detections."""
        correct = sum(one.correct for one in self.classes)
        return _share(correct, correct + sum(one.wrong for one in self.classes))

    @property
    def recall(self) -> float | None:
        """Share of all objects that are found; `None` without objects."""
        return _share(sum(one.correct for one in self.classes), sum(one.objects for one in self.classes))

    def confusion_matrix(self) -> NDArray[np.int64]:
        """The counts as a table `(C + 1, C + 1)`."""
        table = np.zeros((len(self.classes) + 1,) * 2, dtype=np.int64)
        for row, column, count in self.confusion:
            table[row, column] = count
        return table

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DetectionReport":
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**values, "classes": [ClassReport(**one) for one in values["classes"]]})


@dataclass(frozen=True)
class ImageErrors:
    """Of one image, at the threshold: detections that are right and wrong, and objects that are missed."""

    image_id: int
    correct: int
    wrong: int
    missed: int

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 1 where there is nothing to find and nothing was found."""
        total = 2 * self.correct + self.wrong + self.missed
        return 2 * self.correct / total if total else 1.0


def choose_threshold(images: Sequence[ImageDetections], id2label: Mapping[int, str]) -> float | None:
    """
    The confidence threshold of the highest F1 at IoU 0.5, counted over the detections of all classes together.

    Args:
        images (`Sequence[ImageDetections]`): Of the validation split, not of the one that is reported.
        id2label (`Mapping[int, str]`): The classes.

    Returns:
        `float`, *optional*: 0.00, 0.01, … or 0.99; of several that are as good the middle one. `None` if not one
        detection is right.
    """
    matches = _match(images, sorted(id2label))
    scores, is_correct = matches.scores[matches.counts], matches.is_correct[matches.counts]
    order = np.argsort(-scores, kind="stable")
    # A score must be above the threshold, in the precision in which the image processor compares them.
    num_kept = np.searchsorted(-scores[order], -CANDIDATES.astype(np.float32), side="left")
    correct = np.concatenate([[0], np.cumsum(is_correct[order])])[num_kept]
    if not correct.any():
        return None
    f1 = 2 * correct / (num_kept + len(matches.object_labels))
    best = np.flatnonzero(f1 == f1.max())
    return float(CANDIDATES[best[len(best) // 2]])


def report_detections(
    images: Sequence[ImageDetections], id2label: Mapping[int, str], threshold: float
) -> tuple[DetectionReport, list[ImageErrors]]:
    """
    Count what is right and wrong at a threshold.

    Args:
        images (`Sequence[ImageDetections]`): Of the split that is reported; ids must be unique.
        id2label (`Mapping[int, str]`): The classes.
        threshold (`float`): Detections with higher scores count.

    Returns:
        `tuple` of the [`DetectionReport`] and an [`ImageErrors`] per image, in the order of the images.
    """
    labels = sorted(id2label)
    matches = _match(images, labels)
    kept = matches.counts & (matches.scores > np.float32(threshold))
    correct, wrong = kept & matches.is_correct, kept & ~matches.is_correct
    classes = []
    for index, label in enumerate(labels):
        curve = matches.precision[:, index]
        is_defined = bool((curve > -1).all())
        classes.append(
            ClassReport(
                name=id2label[label],
                objects=int((matches.object_labels == label).sum()),
                correct=int((matches.labels[correct] == label).sum()),
                wrong=int((matches.labels[wrong] == label).sum()),
                ap_50=round(float(curve.mean()), 6) if is_defined else None,
                curve=[round(value, 4) for value in curve.tolist()] if is_defined else [],
            )
        )
    found, objects = (np.bincount(rows, minlength=len(images)) for rows in (matches.images, matches.object_images))
    found, mistaken = (np.bincount(matches.images[rows], minlength=len(images)) for rows in (correct, wrong))
    errors = [
        ImageErrors(image.image_id, int(right), int(bad), int(total - right))
        for image, right, bad, total in zip(images, found, mistaken, objects, strict=True)
    ]
    return DetectionReport(float(threshold), classes, _confusion(matches, kept)), errors


@dataclass(frozen=True)
class _Matches:
    """COCO's matching at IoU 0.5: columns of all K detections and of the M objects without crowd regions."""

    evaluator: hotcoco.COCOeval
    precision: NDArray[np.float64]  # (101, C), interpolated; -1: undefined
    images: NDArray[np.int64]  # (K,), from 0
    labels: NDArray[np.int64]  # (K,)
    scores: NDArray[np.float32]  # (K,)
    counts: NDArray[np.bool_]  # (K,), is neither on a crowd region nor beyond the limit per image
    is_correct: NDArray[np.bool_]  # (K,)
    object_images: NDArray[np.int64]  # (M,), from 0
    object_labels: NDArray[np.int64]  # (M,)


def _match(images: Sequence[ImageDetections], labels: Sequence[int]) -> _Matches:
    found = np.concatenate([np.zeros((0, 6)), *(image.found for image in images)]).astype(np.float64)
    truth = np.concatenate([np.zeros((0, 7)), *(image.expected for image in images)]).astype(np.float64)
    found_image, truth_image = (
        np.repeat(np.arange(len(images)), [len(rows) for rows in tables])
        for tables in ([image.found for image in images], [image.expected for image in images])
    )
    detections = {"image": found_image + 1, "boxes": _xywh(found), "scores": found[:, 4], "labels": found[:, 5]}
    objects = {"image": truth_image + 1, "boxes": _xywh(truth), "labels": truth[:, 4]}
    objects |= {"iscrowd": truth[:, 5], "area": truth[:, 6]}
    evaluator = run_evaluator(len(images), labels, detections, objects, [MAX_DETECTIONS], [IOU_THRESHOLD])
    counts, is_correct = np.zeros(len(found), dtype=bool), np.zeros(len(found), dtype=bool)
    all_sizes = list(evaluator.params.area_rng[0])
    for one in evaluator.eval_imgs:
        if one is not None and list(one["aRng"]) == all_sizes:
            rows = np.array(one["dtIds"], dtype=np.int64) - 1  # numbered from 1, in the order they were given
            counts[rows] = ~np.array(one["dtIgnore"][0], dtype=bool)
            is_correct[rows] = np.array(one["dtMatched"][0], dtype=bool)
    is_object = truth[:, 5] == 0
    return _Matches(
        evaluator=evaluator,
        precision=(evaluator.eval or {})["precision"][0, :, :, 0, -1],
        images=found_image,
        labels=found[:, 5].astype(np.int64),
        scores=found[:, 4].astype(np.float32),
        counts=counts,
        is_correct=is_correct,
        object_images=truth_image[is_object],
        object_labels=truth[is_object, 4].astype(np.int64),
    )


def _confusion(matches: _Matches, kept: NDArray[np.bool_]) -> list[list[int]]:
    """See [`DetectionReport`]; of the detections that are kept."""
    # The evaluator cuts by score alone, and would count detections on crowd regions as wrong.
    ground_truth = matches.evaluator.coco_gt
    table = np.array(
        [
            [one["image_id"], *one["bbox"], one["score"], one["category_id"]]
            for one in matches.evaluator.coco_dt.load_anns((np.flatnonzero(kept) + 1).tolist())
        ]
    ).reshape(-1, 7)
    evaluator = hotcoco.COCOeval(ground_truth, ground_truth.load_res(table), "bbox")
    counts = evaluator.confusion_matrix(iou_thr=IOU_THRESHOLD, max_det=len(kept))["matrix"]
    return [[int(row), int(column), int(counts[row, column])] for row, column in np.argwhere(counts).tolist()]


def _xywh(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.hstack([rows[:, :2], rows[:, 2:4] - rows[:, :2]])


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
