"""
COCO's mean average precision as an `evaluate.Metric`, with the very numbers of pycocotools.

Shape letters: K detections of one image, M objects of one image, N images, C classes, T = 10 IoU thresholds, R = 101
recall thresholds, A = 4 area ranges (all, small, medium, large), D limits on the detections per image and class.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import evaluate
import hotcoco
import numpy as np
import torch
from datasets import Features, Value
from numpy.typing import NDArray

_OVERALL_KEYS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
_AREAS = ("small", "medium", "large")
# What follows the box, xyxy, in the float64 rows in which the examples are kept.
_PREDICTION_COLUMNS = ("labels", "scores")
_REFERENCE_COLUMNS = ("labels", "area", "iscrowd")

_DESCRIPTION = """
Mean average precision and recall of object detection by COCO's protocol: IoU thresholds 0.50:0.05:0.95, 101 recall
points, sizes by the object's area in original pixels: small to 32², medium to 96², large beyond (limits included).
"""

_INPUTS = """
Args:
    predictions (`list[dict]`): One per image: `image_id`, `scores` (K,), `labels` (K,), `boxes` (K, 4), xyxy,
        original pixels.
    references (`list[dict]`): One per image, in the same order: `image_id`, `labels` (M,), `boxes` (M, 4), xyxy,
        original pixels; optionally `area` (M,), square original pixels, and `iscrowd` (M,).

Returns:
    `dict[str, float]`: `map`, `map_50`, `map_75`, `map_small`, `map_medium`, `map_large`, `mar_1`, `mar_10`,
    `mar_100`, `mar_small`, `mar_medium`, `mar_large`, a `map_<class name>` per class; -1 where nothing is to be found.
"""

_CITATION = """
@inproceedings{lin2014coco,
    title = {Microsoft {COCO}: Common Objects in Context},
    author = {Tsung-Yi Lin and others},
    booktitle = {European Conference on Computer Vision},
    year = {2014},
}
"""


class CocoMetric(evaluate.Metric):
    """
    COCO's detection metrics, collected with `add` or `add_batch` and reduced by `compute`, on one process or several.

    Each call takes predictions and references of the same images in the same order, as numpy arrays, torch tensors or
    lists; an image without detections or without objects gives empty ones. An image that arrives twice (distributed
    samplers repeat images to fill the last batch) counts once, the first time. A missing `area` is the box's own, a
    missing `iscrowd` is 0. With several processes, process 0 computes and `compute` gives `None` on the others; a
    process without images must still call `add_batch` once, with empty lists, because evaluate waits for all of them.

    Every class of `id2label` is reported as `map_<class name>`, with COCO's -1 for a class without objects, which no
    mean includes. A class whose key is one of the metric's own (named "50" or "small", say) has its id appended:
    `map_small_3`.

    Args:
        id2label (`dict[int, str]`, *optional*): Class names by label. Without it, the labels that occur are the
            classes, named by their numbers.
        max_detections (`Sequence[int]`, defaults to `(1, 10, 100)`): Best-scored detections that count per image and
            class. Each limit k gives `mar_k`; all other keys use the largest.
        kwargs: Arguments of `evaluate.Metric`: `num_process`, `process_id`, `experiment_id`, `keep_in_memory`,
            `cache_dir`, `timeout`.

    Raises:
        ValueError: If two classes share a name, or a limit in `max_detections` is not a positive integer. From `add`
            and `add_batch`: if an example is malformed. From `compute`: if one `image_id` came with different objects.
    """

    def __init__(
        self,
        id2label: Mapping[int, str] | None = None,
        *,
        max_detections: Sequence[int] = (1, 10, 100),
        **kwargs: Any,
    ) -> None:
        self.max_detections = sorted({operator.index(limit) for limit in max_detections})
        if not self.max_detections or self.max_detections[0] < 1:
            raise ValueError(f"max_detections must be positive integers, at least one, got {tuple(max_detections)}.")
        self.id2label = None if id2label is None else {int(label): name for label, name in id2label.items()}
        if self.id2label is not None:
            _class_keys(self.id2label)
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        # Rows as bytes: lists would be gone through number by number, in Python, on their way to the file and back.
        rows = {"image_id": Value("int64"), "rows": Value("binary")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=Features({"predictions": rows, "references": rows}),
            reference_urls=["https://cocodataset.org/#detection-eval"],
        )

    def add(self, *, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        """Add the detections and the objects of one image."""
        prediction, reference = self._checked(prediction, reference)
        super().add(prediction=prediction, reference=reference)

    def add_batch(
        self, *, predictions: Sequence[Mapping[str, Any]] | None, references: Sequence[Mapping[str, Any]] | None
    ) -> None:
        """Add the detections and the objects of several images."""
        # `compute` passes None for what it was not given.
        if predictions is None or references is None:
            raise ValueError("CocoMetric needs both the predictions and the references of the same images.")
        if len(predictions) != len(references):
            raise ValueError(
                f"predictions and references must be of the same images, got {len(predictions)} and {len(references)}."
            )
        pairs = [self._checked(*pair) for pair in zip(predictions, references, strict=True)]
        super().add_batch(predictions=[found for found, _ in pairs], references=[truth for _, truth in pairs])

    def _checked(
        self, prediction: Mapping[str, Any], reference: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        found, truth = self._checked_prediction(prediction), self._checked_reference(reference)
        if found["image_id"] != truth["image_id"]:
            raise ValueError(
                "predictions and references must be in the same order, got the prediction of image "
                f"{found['image_id']} with the reference of image {truth['image_id']}."
            )
        return found, truth

    def _checked_prediction(self, example: Mapping[str, Any]) -> dict[str, Any]:
        image_id, where, boxes, labels = self._checked_boxes(example, "prediction")
        scores = _array(example, "scores", where, (len(boxes),))
        return {"image_id": image_id, "rows": np.column_stack([boxes, labels, scores]).tobytes()}

    def _checked_reference(self, example: Mapping[str, Any]) -> dict[str, Any]:
        image_id, where, boxes, labels = self._checked_boxes(example, "reference")
        areas, zeros = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), np.zeros(len(boxes))
        area = _array(example, "area", where, (len(boxes),), default=areas)
        iscrowd = _array(example, "iscrowd", where, (len(boxes),), default=zeros)
        return {"image_id": image_id, "rows": np.column_stack([boxes, labels, area, iscrowd]).tobytes()}

    def _checked_boxes(
        self, example: Mapping[str, Any], role: str
    ) -> tuple[int, str, NDArray[np.float64], NDArray[np.float64]]:
        """Image id, its name for messages, boxes `(K, 4)` and labels `(K,)`."""
        image_id = _image_id(example, role)
        where = f"the {role} of image {image_id}"
        boxes = _array(example, "boxes", where, (None, 4))
        inverted = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
        if inverted.any():
            raise ValueError(
                f"boxes of {where} must be xyxy in original pixels, got {boxes[inverted][0].tolist()}. Is it xywh?"
            )
        labels = _array(example, "labels", where, (len(boxes),))
        for label in sorted(set(labels.tolist())):
            if label != int(label) or label < 0 or (self.id2label is not None and label not in self.id2label):
                known = "whole numbers from 0" if self.id2label is None else f"in id2label, {self.id2label}"
                raise ValueError(f"labels of {where} must be {known}, got {label:g}.")
        return image_id, where, boxes, labels

    def _compute(self, *, predictions: list[dict[str, Any]], references: list[dict[str, Any]]) -> dict[str, float]:
        images: dict[int, tuple[bytes, bytes]] = {}
        for prediction, reference in zip(predictions, references, strict=True):
            image_id, rows = reference["image_id"], reference["rows"]
            _, known = images.setdefault(image_id, (prediction["rows"], rows))
            if known is not rows and not _same_objects(known, rows):
                raise ValueError(f"image_id {image_id} came twice with different objects: ids must be unique.")
        # Equal scores of different images rank in the order of the ids, whatever order the images arrived in.
        pairs = [images[image_id] for image_id in sorted(images)]
        found = _columns([prediction for prediction, _ in pairs], _PREDICTION_COLUMNS)
        truth = _columns([reference for _, reference in pairs], _REFERENCE_COLUMNS)

        if self.id2label is None:
            labels = np.union1d(found["labels"], truth["labels"]).astype(np.int64).tolist()
            id2label = {label: str(label) for label in labels}
        else:
            id2label = dict(sorted(self.id2label.items()))
        result = run_evaluator(len(pairs), list(id2label), found, truth, self.max_detections).eval or {}
        return _summary(result["precision"], result["recall"], _class_keys(id2label), self.max_detections)


def _image_id(example: Mapping[str, Any], role: str) -> int:
    try:
        # One number in any wrapping: labels of transformers hold a tensor of shape (1,).
        return int(np.int64(operator.index(np.asarray(example["image_id"]).item())))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(
            f"image_id of a {role} must be one integer of 64 bits, got {example.get('image_id', 'no such key')!r}."
        ) from None


def _array(
    example: Mapping[str, Any],
    key: str,
    where: str,
    shape: tuple[int | None, ...],
    default: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Read `example[key]`, or the default, as float64 of the given shape (`None`: any length)."""
    value = default if example.get(key) is None else example[key]
    if value is None:
        raise ValueError(f"{where} has no {key!r}, only {sorted(example)}.")
    if isinstance(value, torch.Tensor):
        # numpy has no bfloat16; as float16 it meets the check below.
        value = value.detach().cpu().to(torch.float16 if value.dtype == torch.bfloat16 else value.dtype).numpy()
    array = np.asarray(value)
    if array.dtype == np.float16:
        raise ValueError(
            f"{key} of {where} are in half precision, whose rounding makes ties and moves boxes. Convert the model's "
            "outputs to float32 before the sigmoid and the scaling to pixels."
        )
    array = array.astype(np.float64, copy=False)
    if array.size == 0:
        array = array.reshape(0, *shape[1:])
    if array.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True)):
        raise ValueError(f"{key} of {where} must have shape {shape}, got {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"{key} of {where} must be finite numbers, got {array[~np.isfinite(array)][0]}.")
    return array


def _same_objects(first: bytes, second: bytes) -> bool:
    """Whether two references of an image agree, to a thousandth of a pixel."""
    return len(first) == len(second) and np.allclose(np.frombuffer(first), np.frombuffer(second), atol=1e-3)


def _columns(images: Sequence[bytes], names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Chain the rows of N images: `image` (1 to N) and xywh `boxes`, beside the columns that follow the box."""
    table = np.frombuffer(b"".join(images)).reshape(-1, 4 + len(names))
    counts = [len(rows) // table.strides[0] for rows in images]
    columns = {name: table[:, 4 + index].copy() for index, name in enumerate(names)}
    columns["image"] = np.repeat(np.arange(1, len(images) + 1), counts)
    columns["boxes"] = np.hstack([table[:, :2], table[:, 2:4] - table[:, :2]])
    return columns


def run_evaluator(
    num_images: int,
    labels: Sequence[int],
    found: Mapping[str, NDArray[Any]],
    truth: Mapping[str, NDArray[Any]],
    max_detections: Sequence[int],
    iou_thresholds: Sequence[float] | None = None,
) -> hotcoco.COCOeval:
    """
    Run the COCO evaluator, `evaluate` and `accumulate`; no other place knows how it is fed.

    Args:
        num_images (`int`): N.
        labels (`Sequence[int]`): The C classes.
        found (`Mapping`): Columns of the detections: `image` (1 to N), `boxes` (xywh), `scores`, `labels`.
        truth (`Mapping`): Columns of the objects: `image`, `boxes`, `labels`, `area`, `iscrowd`.
        max_detections (`Sequence[int]`): Limits per image and class, rising.
        iou_thresholds (`Sequence[float]`, *optional*): By default COCO's ten.
    """
    # hotcoco numbers the annotations from 1: the COCO protocol takes a match with annotation 0 for no match.
    ground_truth = hotcoco.COCO.from_arrays(
        [{"id": image} for image in range(1, num_images + 1)],
        [{"id": label, "name": str(label)} for label in labels],
        truth["image"],
        truth["labels"].astype(np.int64),
        truth["boxes"],
        area=truth["area"],
        iscrowd=truth["iscrowd"].astype(np.int64),
    )
    detections = ground_truth.load_res(
        np.column_stack([found["image"], found["boxes"], found["scores"], found["labels"]]).astype(float)
    )
    evaluator = hotcoco.COCOeval(ground_truth, detections, "bbox")
    evaluator.params.max_dets = list(max_detections)
    if iou_thresholds is not None:
        evaluator.params.iou_thrs = list(iou_thresholds)
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator


def _summary(
    precision: NDArray[np.float64],  # (T, R, C, A, D), interpolated; -1: undefined
    recall: NDArray[np.float64],  # (T, C, A, D), the highest
    class_keys: Sequence[str],
    max_detections: Sequence[int],
) -> dict[str, float]:
    result = {
        "map": _mean(precision[..., 0, -1]),
        "map_50": _mean(precision[0, ..., 0, -1]),
        "map_75": _mean(precision[5, ..., 0, -1]),
    }
    result |= {f"map_{area}": _mean(precision[..., i, -1]) for i, area in enumerate(_AREAS, 1)}
    result |= {f"mar_{limit}": _mean(recall[..., 0, i]) for i, limit in enumerate(max_detections)}
    result |= {f"mar_{area}": _mean(recall[..., i, -1]) for i, area in enumerate(_AREAS, 1)}
    result |= {key: _mean(precision[:, :, i, 0, -1]) for i, key in enumerate(class_keys)}
    return result


def _mean(values: NDArray[np.float64]) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


def _class_keys(id2label: Mapping[int, str]) -> list[str]:
    """Name the per-class results, in the order of `id2label`, apart from the metric's own keys."""
    keys: dict[str, int] = {}
    for label, name in id2label.items():
        key = f"map_{name}_{label}" if f"map_{name}" in _OVERALL_KEYS else f"map_{name}"
        if key in keys:
            raise ValueError(
                f"Classes {keys[key]} and {label} of id2label would both be reported as {key!r}: rename one."
            )
        keys[key] = label
    return list(keys)
