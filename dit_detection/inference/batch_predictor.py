"""A detector on one batch of images: in memory, or as a function that Ray Data, Spark and their like call."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..adapters import load_detector, load_image_processor
from ..data.image_reading import UnreadableImageError, read_image, to_rgb
from .prediction_formats import detections_of


def detect(
    model: Any,
    image_processor: Any,
    images: Sequence[Image.Image],
    threshold: float,
    nms_threshold: float | None = None,
) -> list[dict[str, Any]]:
    """Per image `scores` `(M,)`, `labels` `(M,)` and `boxes` `(M, 4)` (xyxy, pixels of that image), on the CPU."""
    if not images:
        return []
    inputs = image_processor(list(images), return_tensors="pt")
    sizes = [(image.height, image.width) for image in images]
    return detect_processed(model, image_processor, inputs, sizes, threshold, nms_threshold)


def detect_processed(
    model: Any,
    image_processor: Any,
    inputs: Any,
    sizes: Sequence[tuple[int, int]],
    threshold: float,
    nms_threshold: float | None = None,
) -> list[dict[str, Any]]:
    """`detect`, where the image processor did its part already; `sizes` are (height, width) of the images before."""
    with torch.inference_mode():
        outputs = model(**inputs.to(model.device))
    results = image_processor.post_process_object_detection(
        outputs, threshold=threshold, target_sizes=list(sizes), nms_threshold=nms_threshold
    )
    return [{name: values.cpu() for name, values in result.items()} for result in results]


def model_class_names(model: Any) -> list[str]:
    """Class names in the order of their labels."""
    return [model.config.id2label[label] for label in range(model.config.num_labels)]


class BatchPredictor:
    """
    A detector as a function from a batch of rows to their detections, for Ray Data:

        images = ray.data.read_binary_files("images/", include_paths=True)
        found = images.map_batches(
            BatchPredictor, fn_constructor_kwargs={"checkpoint": "my-detector"}, batch_size=16, concurrency=2
        )
        found.write_parquet("predictions/")

    and for Spark, where the function is called once per worker and part:

        def predict(frames):  # spark.read.format("binaryFile").load("images/").select("path", "content")
            predictor = BatchPredictor("my-detector")
            for frame in frames:
                batch = {"path": frame["path"].to_numpy(), "bytes": frame["content"].to_numpy()}
                yield pandas.DataFrame(predictor(batch))

        rows.mapInPandas(predict, "path string, labels array<string>, scores array<double>, "
                                  "boxes array<array<double>>, error string")

    An instance loads the model when it is made; a pickled one carries the arguments, and loads it where it arrives.

    Args:
        checkpoint (`str`): Folder or Hub id.
        threshold (`float`): Scores must be above it.
        nms_threshold (`float`, *optional*): By default the image processor's own.
        device (`str`, *optional*): By default CUDA's, if there is one, or else the CPU.
    """

    def __init__(
        self,
        checkpoint: str,
        threshold: float = 0.3,
        nms_threshold: float | None = None,
        device: str | None = None,
    ) -> None:
        self._arguments = (checkpoint, threshold, nms_threshold, device)
        self.threshold, self.nms_threshold = threshold, nms_threshold
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_detector(checkpoint).to(device).eval()
        self.image_processor = load_image_processor(checkpoint)
        self.class_names = model_class_names(self.model)

    def __reduce__(self) -> tuple[type["BatchPredictor"], tuple[Any, ...]]:
        return type(self), self._arguments

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """
        Detect objects in a batch of images.

        Args:
            batch (`Mapping[str, np.ndarray]`): Column "bytes" (encoded images) or "image" (8-bit arrays of shape
                `(H, W, 3)`, as of `ray.data.read_images`), and any others.

        Returns:
            `dict[str, np.ndarray]`: The other columns as they were and, one list per image, "labels" (names), "scores"
            and "boxes" (xyxy, pixels); "error" is why an image could not be read, else `None`.

        Raises:
            ValueError: There is neither column.
        """
        column = next((name for name in ("bytes", "image") if name in batch), None)
        if column is None:
            raise ValueError(f'The batch needs a column "bytes" or "image", but has {", ".join(batch)}.')
        images: list[Image.Image] = []
        errors: list[str | None] = []
        for value in batch[column]:
            try:
                images.append(read_image(bytes(value)) if column == "bytes" else _image_of(value))
                errors.append(None)
            except (UnreadableImageError, TypeError, ValueError) as error:
                errors.append(str(error))
        results = iter(detect(self.model, self.image_processor, images, self.threshold, self.nms_threshold))
        detections = [
            [] if error else detections_of(**next(results), class_names=self.class_names) for error in errors
        ]
        return {
            **{name: values for name, values in batch.items() if name != column},
            "labels": _column([[entry["label"] for entry in found] for found in detections]),
            "scores": _column([[entry["score"] for entry in found] for found in detections]),
            "boxes": _column([[entry["box_xyxy"] for entry in found] for found in detections]),
            "error": _column(errors),
        }


def _column(values: Sequence[Any]) -> np.ndarray:
    """An array with one object per row: numpy would make a matrix of lists that happen to be of one length."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def _image_of(value: Any) -> Image.Image:
    """
    A picture of an array.

    Raises:
        UnreadableImageError: It is none that can be one.
    """
    if not isinstance(value, np.ndarray):
        raise UnreadableImageError(f"is {type(value).__name__}, not an array. Give uint8 of shape (H, W, 3).")
    if value.dtype not in (np.uint8, np.uint16) or value.ndim not in (2, 3) or not value.size:
        raise UnreadableImageError(f"is {value.dtype} of shape {value.shape}. Give uint8 of shape (H, W, 3).")
    try:
        return to_rgb(Image.fromarray(value))
    except (TypeError, ValueError) as error:
        raise UnreadableImageError(f"is of shape {value.shape}. Give uint8 of shape (H, W, 3).") from error
