"""COCO's mAP against pycocotools, and what the Trainer keeps of an evaluation."""

import contextlib
import io
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dit_detection import DetectionTrainer, DetectionTrainingArguments, DiTDetectionImageProcessor
from dit_detection.metrics import CocoMetric

from .measure import Pair, Row, Settings
from .precision import make_detector

NUM_CLASSES = 80
Examples = list[dict[str, Any]]


def rows(settings: Settings) -> Iterator[Row]:
    """The whole metric from arrays per image to numbers."""
    share, name = (10, "a tenth of a COCO-val-sized set") if settings.quick else (1, "a COCO-val-sized set")
    yield Row(f"evaluation: add_batch + compute / pycocotools, {name}", partial(coco_map, 5000 // share), aim=20.0)
    name = "evaluation: batch of 8, memory kept by the Trainer, 4 anchors per cell / 1"
    yield Row(name, partial(kept_by_trainer, settings.device), memory_aim=1.0)


def coco_map(num_images: int) -> Pair:
    """Both sides start from numpy arrays per image and end in the same numbers, which are compared first."""
    predictions, references = synthetic_coco(num_images)

    def ours() -> dict[str, float]:
        metric = CocoMetric(keep_in_memory=True)
        metric.add_batch(predictions=predictions, references=references)
        return metric.compute()

    def theirs() -> dict[str, float]:
        return pycocotools_map(predictions, references)

    found, expected = ours(), theirs()
    for key, value in expected.items():
        if abs(found[key] - value) > 1e-12:
            raise RuntimeError(f"{key}: {found[key]} of CocoMetric, {value} of pycocotools.")
    return Pair(ours, theirs, flops=False)


def kept_by_trainer(device: str) -> Pair:
    """What `prediction_step` hands to the Trainer, which keeps it to the end of the evaluation."""

    def step(aspect_ratios: list[float]) -> Any:
        model, batch = make_detector("small, 320 px", 320, device, 8, aspect_ratios=aspect_ratios)
        for index, labels in enumerate(batch["labels"]):
            labels |= {
                "image_id": torch.tensor([index], device=device),
                "orig_size": torch.tensor([320, 320], device=device),
                "iscrowd": torch.zeros(8, dtype=torch.long, device=device),
                "area": torch.full((8,), 1000.0, device=device),
            }
        args = DetectionTrainingArguments(eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
        args.use_cpu = device == "cpu"
        trainer = DetectionTrainer(model.eval(), args, processing_class=DiTDetectionImageProcessor(size=320))
        return lambda: trainer.prediction_step(model, batch, prediction_loss_only=False)

    more, fewer = step([0.5, 1.0, 2.0, 3.0]), step([1.0])
    return Pair(more, fewer, kept_bytes=(_bytes(more()), _bytes(fewer())))


def _bytes(kept: Any) -> int:
    if isinstance(kept, torch.Tensor):
        return kept.nbytes
    return sum(map(_bytes, kept)) if kept is not None else 0


def synthetic_coco(num_images: int) -> tuple[Examples, Examples]:
    """
    Images with 7.2 objects and 80 detections each: 36 k and 400 k at 5,000 images. Most objects are found, with boxes
    and labels that are a little off, among many strays.
    """
    rng = np.random.default_rng(0)
    predictions, references = [], []
    for image_id in range(num_images):
        count = int(rng.poisson(7.2))
        corners, sides = rng.uniform(0, 400, (count, 2)), rng.lognormal(4, 1, (count, 2)).clip(4, 300)
        boxes, labels = np.hstack([corners, corners + sides]), rng.integers(0, NUM_CLASSES, count)
        references.append(
            {"image_id": image_id, "boxes": boxes, "labels": labels, "iscrowd": (rng.random(count) < 0.02).astype(int)}
        )

        copies = np.repeat(np.arange(count), 3)
        close = boxes[copies] + rng.normal(0, 0.08, (len(copies), 4)) * np.tile(sides[copies], 2)
        strays = max(80 - len(copies), 0)
        corners = rng.uniform(0, 400, (strays, 2))
        found = np.vstack([close, np.hstack([corners, corners + rng.lognormal(4, 1, (strays, 2)).clip(4, 300)])])
        found[:, 2:] = np.maximum(found[:, :2] + 1, found[:, 2:])
        guesses = np.where(rng.random(len(copies)) < 0.8, labels[copies], rng.integers(0, NUM_CLASSES, len(copies)))
        predictions.append(
            {
                "image_id": image_id,
                "boxes": found,
                "labels": np.concatenate([guesses, rng.integers(0, NUM_CLASSES, strays)]),
                "scores": rng.random(len(found)).astype(np.float32),
            }
        )
    return predictions, references


def pycocotools_map(predictions: Examples, references: Examples) -> dict[str, float]:
    """The reference implementation on the same arrays, with the metric's names for its numbers."""
    truth = COCO()
    truth.dataset = {
        "images": [{"id": reference["image_id"]} for reference in references],
        "categories": [{"id": label} for label in range(NUM_CLASSES)],
        "annotations": [
            {
                "image_id": reference["image_id"],
                "category_id": int(label),
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": int(iscrowd),
            }
            for reference in references
            for (left, top, right, bottom), label, iscrowd in zip(
                reference["boxes"].tolist(), reference["labels"], reference["iscrowd"], strict=True
            )
        ],
    }
    for number, annotation in enumerate(truth.dataset["annotations"], 1):
        annotation["id"] = number
    boxes = np.vstack([prediction["boxes"] for prediction in predictions])
    columns = [
        np.repeat([p["image_id"] for p in predictions], [len(p["scores"]) for p in predictions]),
        boxes[:, :2],
        boxes[:, 2:] - boxes[:, :2],
        np.concatenate([prediction["scores"] for prediction in predictions]),
        np.concatenate([prediction["labels"] for prediction in predictions]),
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(np.column_stack(columns)), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    names += ("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")
    return dict(zip(names, evaluator.stats.tolist(), strict=True))
