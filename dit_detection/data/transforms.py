from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from .augmentation import DetectionAugmentation, DetectionTarget
from .image_reading import DECODING_ERRORS, decode_image, to_rgb


class DetectionTransform:
    """
    What a model is fed, from rows of a data set: decoded, augmented if wanted, and through the image processor.

    Use it as `dataset = transform.attach(dataset)`; each access to a row then yields `pixel_values`, `pixel_mask` and
    `labels`. It can be pickled, so `DataLoader` workers may run it.

    Args:
        image_processor (`Callable`): A transformers image processor that takes images and COCO annotations, as DETR's.
        augmentation (`DetectionAugmentation`, *optional*): For training; leave it out at evaluation.
    """

    def __init__(
        self, image_processor: Callable[..., Mapping[str, Any]], augmentation: DetectionAugmentation | None = None
    ) -> None:
        self.image_processor = image_processor
        self.augmentation = augmentation

    def attach(self, dataset: Dataset) -> Dataset:
        """
        The data set with this transform applied to each row that is read.

        Unlike `dataset.with_transform`, it leaves the decoding of images to the transform, which can tell whether an
        EXIF orientation belongs to the annotated image (`datasets` always applies it) and which file is broken.
        """
        return dataset.cast_column("image", ImageFeature(decode=False)).with_transform(self)

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """
        Prepare some rows.

        Args:
            batch (`dict[str, list]`): Columns of the row format (`row_format.py`); images encoded or decoded.

        Returns:
            `dict[str, list]`: One entry per row in each of "pixel_values", "labels" and, if the image processor makes
            one, "pixel_mask".

        Raises:
            ValueError: An image cannot be read or has not the size that was annotated; the message names it.
        """
        images, annotations = [], []
        for index in range(len(batch["image"])):
            row = {column: batch[column][index] for column in ("image", "image_id", "width", "height", "objects")}
            image = F.pil_to_tensor(_read_image(row))
            objects = row["objects"]
            if self.augmentation is not None:
                augmented, target = self.augmentation(tv_tensors.Image(image), _to_target(objects, image))
                image, objects = augmented.as_subclass(torch.Tensor), _from_target(target)
            images.append(image)
            annotations.append(
                {"image_id": row["image_id"], "annotations": _coco_annotations(row["image_id"], objects)}
            )
        encoded = self.image_processor(
            images=images, annotations=annotations, input_data_format="channels_first", return_tensors="pt"
        )
        return {name: list(encoded[name]) for name in ("pixel_values", "pixel_mask", "labels") if name in encoded}


def _read_image(row: dict[str, Any]) -> Image.Image:
    image, width, height = row["image"], row["width"], row["height"]
    name = (image["path"] if isinstance(image, dict) else getattr(image, "filename", None)) or "(no file name)"
    try:
        if isinstance(image, dict):
            return to_rgb(decode_image(image, width, height))
        if image.size != (width, height):
            raise ValueError(
                f"it is {image.size[0]} x {image.size[1]} pixels, but annotated as {width} x {height}; if its EXIF "
                "orientation turned it, use `transform.attach(dataset)` instead of `dataset.with_transform(transform)`"
            )
        return to_rgb(image)
    except DECODING_ERRORS as error:
        raise ValueError(
            f"Image {name!r} (image_id {row['image_id']}) cannot be used: {error}. Repair or remove it."
        ) from error


def _to_target(objects: dict[str, list[Any]], image: torch.Tensor) -> DetectionTarget:
    boxes = torch.tensor(objects["bbox"], dtype=torch.float32).reshape(-1, 4)
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    return {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:])),
        "category": torch.tensor(objects["category"], dtype=torch.int64),
        "area": torch.tensor(objects["area"], dtype=torch.float32),
        "iscrowd": torch.tensor(objects["iscrowd"], dtype=torch.int64),
    }


def _from_target(target: DetectionTarget) -> dict[str, list[Any]]:
    boxes = target["boxes"].as_subclass(torch.Tensor)
    return {
        "bbox": torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist(),
        "category": target["category"].tolist(),
        "area": target["area"].tolist(),
        "iscrowd": target["iscrowd"].tolist(),
    }


def _coco_annotations(image_id: int, objects: dict[str, list[Any]]) -> list[dict[str, Any]]:
    columns = zip(objects["bbox"], objects["category"], objects["area"], objects["iscrowd"], strict=True)
    return [
        {"image_id": image_id, "category_id": category, "iscrowd": iscrowd, "area": area, "bbox": bbox}
        for bbox, category, area, iscrowd in columns
    ]
