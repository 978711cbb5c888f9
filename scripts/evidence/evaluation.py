"""One evaluation for every detector: the same images in, the same metric out."""

from collections.abc import Callable
from typing import Any

import datasets
import torch
from torch import Tensor
from torchvision.ops import box_iou

from dit_detection import (
    CocoMetric,
    DetectionDataset,
    DiTDetectionImageProcessor,
    DiTForObjectDetection,
    collate_detection,
    id2label_of,
)

BATCH_SIZE = 8
MAX_DETECTIONS = 100
# Candidates that soft-NMS looks at: it compares all of a class with each other.
MAX_BEFORE_SOFT_NMS = 300

Batch = dict[str, Any]
Detections = list[dict[str, Tensor]]  # per image scores (M,), labels (M,) and boxes (M, 4), xyxy, original pixels


def evaluate(
    predict: Callable[[Batch], Detections],
    rows: datasets.Dataset,
    processor: DiTDetectionImageProcessor,
    device: str = "cpu",
) -> dict[str, float]:
    """
    COCO's metrics of a detector on rows, against the annotations as they are in the data set.

    Args:
        predict (`Callable`): A batch as `collate_detection` makes it → what is found in each of its images.
        rows (`datasets.Dataset`): In the row format.
        processor ([`DiTDetectionImageProcessor`]): As in training.
        device (`str`): Where `predict` wants its images.
    """
    metric = CocoMetric(id2label_of(rows), keep_in_memory=True)
    dataset = DetectionDataset(rows, processor)
    for start in range(0, len(rows), BATCH_SIZE):
        indices = range(start, min(start + BATCH_SIZE, len(rows)))
        batch = collate_detection([dataset[index] for index in indices])
        batch |= {name: batch[name].to(device) for name in ("pixel_values", "pixel_mask")}
        with torch.inference_mode():
            found = predict(batch)
        for row, image in zip(dataset.rows.select(indices), found, strict=True):
            objects = row["objects"]
            boxes = torch.tensor(objects["bbox"], dtype=torch.float64).reshape(-1, 4)
            metric.add(
                prediction={"image_id": row["image_id"], **{name: value.cpu() for name, value in image.items()}},
                reference={
                    "image_id": row["image_id"],
                    "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
                    "labels": objects["category"],
                    "area": objects["area"],
                    "iscrowd": objects["iscrowd"],
                },
            )
    return metric.compute()


def predictor(
    model: DiTForObjectDetection, processor: DiTDetectionImageProcessor, post: dict[str, Any]
) -> Callable[[Batch], Detections]:
    """
    Our detector for `evaluate`, in float32.

    Args:
        post (`dict`): `nms_threshold`, or `soft_nms_sigma` for soft-NMS in its place; empty for the processor's own.
    """
    model.eval()

    def predict(batch: Batch) -> Detections:
        outputs = model(batch["pixel_values"], batch["pixel_mask"])
        sizes = torch.stack([labels["orig_size"] for labels in batch["labels"]])
        if "soft_nms_sigma" not in post:
            return processor.post_process_object_detection(outputs, 0.0, sizes, **post)
        # IoU is at most 1: all stay.
        found = processor.post_process_object_detection(
            outputs, 0.0, sizes, nms_threshold=1.0, max_detections=MAX_BEFORE_SOFT_NMS
        )
        return [soft_nms(image, post["soft_nms_sigma"]) for image in found]

    return predict


def soft_nms(found: dict[str, Tensor], sigma: float) -> dict[str, Tensor]:
    """
    The best 100 detections of an image after Gaussian soft-NMS: overlap lowers a score and removes nothing.

    Args:
        found (`dict`): `scores` `(M,)`, `labels` `(M,)` and `boxes` `(M, 4)`, xyxy.
        sigma (`float`): The larger, the less an overlap costs.

    Source: Soft-NMS (arXiv 1704.04503), equation 3.
    """
    ious = box_iou(found["boxes"], found["boxes"])
    ious[found["labels"][:, None] != found["labels"]] = 0
    decay = torch.exp(-(ious**2) / sigma)
    scores, final = found["scores"].clone(), torch.zeros_like(found["scores"])
    order: list[int] = []
    for _ in range(min(MAX_DETECTIONS, len(scores))):
        best = int(scores.argmax())
        order.append(best)
        final[best] = scores[best]
        scores = scores * decay[best]
        scores[order] = -1.0
    return {"scores": final[order], "labels": found["labels"][order], "boxes": found["boxes"][order]}
