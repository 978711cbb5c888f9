"""
What the demo page keeps of an image: the model runs once; thresholds and classes are applied whenever they change.

Shape letters: K candidates, C classes.
"""

import io
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data.image_reading import read_image
from ..inference.prediction_formats import Prediction, prediction_of, write_predictions
from ..visualize import draw_detections

# No lower threshold can be chosen, so candidates that stay below it are not kept.
MIN_THRESHOLD = 0.01
# Long side of the picture that is shown, in pixels: enough for a wide screen, and quick to draw again.
PREVIEW_SIDE = 1280


@dataclass(eq=False)
class RawOutputs:
    """
    What the model said of one image, before thresholds and NMS.

    Args:
        logits (`torch.Tensor` of shape `(1, K, C)`): Before the sigmoid; only candidates above `MIN_THRESHOLD`.
        pred_boxes (`torch.Tensor` of shape `(1, K, 4)`): cxcywh in [0, 1].
    """

    logits: Tensor
    pred_boxes: Tensor


@dataclass(eq=False)
class SeenImage:
    """
    An image that the model has seen.

    Args:
        path (`str`): The file that was read.
        name (`str`): As people know it.
        width (`int`), height (`int`): Pixels, upright.
        preview (`bytes`): A JPEG of it, the long side `PREVIEW_SIDE` pixels.
        outputs ([`RawOutputs`]): Of the model.
        preprocess_ms (`float`), model_ms (`float`): What image processor and model took, milliseconds.
    """

    path: str
    name: str
    width: int
    height: int
    preview: bytes
    outputs: RawOutputs
    preprocess_ms: float
    model_ms: float


@torch.inference_mode()
def look_at(model: Any, image_processor: Any, path: str, name: str) -> SeenImage:
    """
    Read an image and run the model on it.

    Raises:
        UnreadableImageError: The file is no image that can be read; the message continues the name.
    """
    image = read_image(path)
    start = time.perf_counter()
    inputs = image_processor(image, return_tensors="pt").to(model.device)
    processed = time.perf_counter()
    outputs = model(**inputs)
    logits, boxes = outputs.logits.float().cpu(), outputs.pred_boxes.float().cpu()  # waits for the device
    seen = time.perf_counter()
    is_kept = logits[0].amax(dim=1).sigmoid() > MIN_THRESHOLD
    raw = RawOutputs(logits[:, is_kept].clone(), boxes[:, is_kept].clone())
    times = {"preprocess_ms": (processed - start) * 1000, "model_ms": (seen - processed) * 1000}
    return SeenImage(path, name, image.width, image.height, _preview(image), raw, **times)


def find_objects(
    seen: SeenImage,
    image_processor: Any,
    class_names: Sequence[str],
    threshold: float,
    nms_threshold: float,
    labels: Collection[int],
    image_id: int = 1,
) -> Prediction:
    """
    The objects of the given classes, as `post_process_object_detection` finds them; the model is not run.

    Args:
        seen ([`SeenImage`]): By `look_at`.
        image_processor ([`DiTDetectionImageProcessor`]): Of the model.
        class_names (`Sequence[str]`): All C, in the order of the labels.
        threshold (`float`): Scores are above it; at least `MIN_THRESHOLD`.
        nms_threshold (`float`): IoU above which the lower-scored of two boxes of one class is dropped.
        labels (`Collection[int]`): The classes that are looked for. The most detections that are kept are theirs.
        image_id (`int`): For the prediction.
    """
    unwanted = torch.tensor([label not in labels for label in range(len(class_names))])
    outputs = RawOutputs(seen.outputs.logits.masked_fill(unwanted, -torch.inf), seen.outputs.pred_boxes)
    result = image_processor.post_process_object_detection(
        outputs,
        threshold=max(threshold, MIN_THRESHOLD),
        target_sizes=[(seen.height, seen.width)],
        nms_threshold=nms_threshold,
    )[0]
    return prediction_of(seen.name, image_id, seen.width, seen.height, **result, class_names=class_names)


def draw_objects(seen: SeenImage, prediction: Prediction, class_names: Sequence[str]) -> Image.Image:
    """The preview with the boxes over it."""
    preview = Image.open(io.BytesIO(seen.preview), formats=["JPEG"])
    scale = torch.tensor([preview.width / seen.width, preview.height / seen.height]).repeat(2)
    found = prediction["detections"]
    boxes = torch.tensor([item["box_xyxy"] for item in found]).reshape(-1, 4) * scale
    labels, scores = [item["label"] for item in found], [item["score"] for item in found]
    return draw_detections(preview, boxes, labels, scores, class_names=class_names)


def thumbnail(seen: SeenImage) -> Image.Image:
    """The preview once more, at a quarter of its sides."""
    image = Image.open(io.BytesIO(seen.preview), formats=["JPEG"])
    image.draft("RGB", (PREVIEW_SIDE // 4, PREVIEW_SIDE // 4))
    return image


def pack_predictions(predictions: Sequence[Prediction], format: str, class_names: Sequence[str]) -> tuple[str, bytes]:
    """
    A file's name and content, in a format of [`write_predictions`]; YOLO's folder becomes a zip archive.

    Raises:
        ValueError: The format cannot tell two of the images apart.
    """
    with TemporaryDirectory() as folder:
        path = write_predictions(predictions, Path(folder), format, class_names)
        if path.is_dir():
            path = Path(shutil.make_archive(str(path), "zip", path))
        return path.name, path.read_bytes()


def _preview(image: Image.Image) -> bytes:
    scale = PREVIEW_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Small images are enlarged, or the letters on the boxes would cover them.
    stream = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0).save(stream, "JPEG", quality=92)
    return stream.getvalue()
