# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""
Images and annotations → tensors; outputs → boxes per image.

Shape letters: B images, K candidates, M objects, H W pixels of the canvas.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature, SizeDict
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import AnnotationFormat, ImageInput, PILImageResampling, validate_annotations
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import ModelOutput, TensorType, logging

from .boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, normalize_boxes, scale_boxes

logger = logging.get_logger(__name__)

# Detections per image that go into NMS, best first; as in torchvision's RetinaNet. At threshold 0 every anchor is one
# detection per class.
MAX_BEFORE_NMS = 1000


class DiTDetectionImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    r"""
    nms_threshold (`float`, *optional*, defaults to 0.6):
        Of two detections of one class that overlap by more than this IoU, the lower-scored one is dropped.
    max_detections (`int`, *optional*, defaults to 100):
        Detections that are kept per image, best first; 100 is what COCO counts.
    """

    nms_threshold: float
    max_detections: int


class DiTDetectionImageProcessor(TorchvisionBackend):
    """
    Fits each image into a fixed canvas: resized by its long side, padded at the bottom and right, pixels in [-1, 1].

    A fixed canvas, because then an image's result does not depend on what it is batched with. `size` may be an `int`
    (a square canvas), `{"max_height", "max_width"}` (any canvas), or another form of transformers' `size`; `pad_size`
    is the canvas of `size` unless given. Threads may share one.
    """

    valid_kwargs = DiTDetectionImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]
    do_convert_rgb = True
    do_resize = True
    size = {"max_height": 512, "max_width": 512}
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_pad = True
    nms_threshold = 0.6
    max_detections = 100

    def __init__(self, **kwargs: Unpack[DiTDetectionImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)

    def _standardize_kwargs(self, size: Any = None, **kwargs: Any) -> dict[str, Any]:
        if isinstance(size, int):
            size = {"max_height": size, "max_width": size}
        return super()._standardize_kwargs(size=size, **kwargs)

    def preprocess(
        self,
        images: ImageInput,
        annotations: dict[str, Any] | list[dict[str, Any]] | None = None,
        **kwargs: Unpack[DiTDetectionImageProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images: One image or a list: PIL in any mode, or numpy or torch with channels, from 0 to 255 unless
                `do_rescale` is off.
            annotations (`dict` or `list[dict]`, *optional*): Per image `image_id` and `annotations`, a list of COCO
                objects: `bbox` (xywh, original pixels), `category_id`, optionally `area` and `iscrowd`.

        Returns:
            `BatchFeature` with `pixel_values` `(B, 3, H, W)`, `pixel_mask` `(B, H, W)` (1 on the image) and, with
            annotations, `labels`: per image `class_labels` `(M,)`, `boxes` `(M, 4)` (cxcywh in [0, 1], relative to the
            image without padding), `area` `(M,)` (*original* pixels: the unit of COCO's size classes), `iscrowd`
            `(M,)`, `image_id` `(1,)`, `orig_size` `(2,)` and `size` `(2,)`: (height, width) before and after resizing.

        Raises:
            ValueError: If an array has more than 8 bits, images and annotations differ in number, or a box is not
                finite or has no area in its image.
        """
        return super().preprocess(images, annotations, **kwargs)

    def _preprocess(
        self,
        images: list[Tensor],
        annotations: dict[str, Any] | list[dict[str, Any]] | None = None,
        *,
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        do_pad: bool,
        pad_size: SizeDict | None,
        disable_grouping: bool | None,
        return_tensors: str | TensorType | None,
        **kwargs: Any,
    ) -> BatchFeature:
        if isinstance(annotations, dict):
            annotations = [annotations]
        if annotations is not None:
            if len(images) != len(annotations):
                raise ValueError(
                    f"The number of images ({len(images)}) and annotations ({len(annotations)}) do not match."
                )
            validate_annotations(AnnotationFormat.COCO_DETECTION, (AnnotationFormat.COCO_DETECTION,), annotations)

        for image in images:
            # 16 bits would become pixels of 513, not of 1, and nothing be found in them.
            if do_rescale and image.dtype != torch.uint8:
                highest = image.float().amax()
                if highest > 255:
                    raise ValueError(f"There is an image with values up to {highest:g}. Scale it to 0 to 255, 8 bits.")
                if image.is_floating_point() and highest <= 1:
                    logger.warning_once(
                        "There is an image with values up to 1, which becomes black: 0 to 255 are expected. Scale it, "
                        "or give do_rescale=False."
                    )
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        groups, positions = group_images_by_shape(images, disable_grouping=disable_grouping)
        for shape, stacked in groups.items():
            if do_resize:
                stacked = self.resize(stacked, size=size, resample=resample)
            groups[shape] = self.rescale_and_normalize(
                stacked, do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
        images = reorder_images(groups, positions)
        sizes = [tuple(image.shape[-2:]) for image in images]

        data: dict[str, Any] = {}
        if do_pad:
            if pad_size is None and size.max_height and size.max_width:
                pad_size = SizeDict(height=size.max_height, width=size.max_width)
            # 0 after normalisation: mid-grey.
            images, masks = self.pad(images, pad_size=pad_size, return_mask=True, disable_grouping=disable_grouping)
            data["pixel_mask"] = torch.stack(masks)
        data["pixel_values"] = torch.stack(images) if len({image.shape for image in images}) == 1 else images
        encoded = BatchFeature(data, tensor_type=return_tensors)
        if annotations is not None:
            encoded["labels"] = [
                BatchFeature(_as_labels(annotation, original_size, new_size), tensor_type=return_tensors)
                for annotation, original_size, new_size in zip(annotations, original_sizes, sizes, strict=True)
            ]
        return encoded

    def resize(self, image: Tensor, size: SizeDict, resample: Any = None, **kwargs: Any) -> Tensor:
        """As in transformers, but on a canvas no side of a very long and thin image becomes 0."""
        if size.max_height and size.max_width:
            height, width = image.shape[-2:]
            scale = min(size.max_height / height, size.max_width / width)
            size = SizeDict(height=max(1, round(height * scale)), width=max(1, round(width * scale)))
        return super().resize(image, size, resample, **kwargs)

    def post_process_object_detection(
        self,
        outputs: ModelOutput,
        threshold: float = 0.5,
        target_sizes: TensorType | list[tuple[int, int]] | None = None,
        nms_threshold: float | None = None,
        max_detections: int | None = None,
    ) -> list[dict[str, Tensor]]:
        """
        The model's output → the detections of each image: per-class scores above a threshold, after per-class NMS.

        Args:
            outputs ([`DiTObjectDetectionOutput`]): `logits` `(B, K, num_labels)` and `pred_boxes` `(B, K, 4)`.
            threshold (`float`): Scores must be above it.
            target_sizes (`torch.Tensor` of shape `(B, 2)` or `list[tuple[int, int]]`, *optional*): (height, width) of
                each original image. Without it boxes stay in [0, 1].
            nms_threshold (`float`, *optional*), max_detections (`int`, *optional*): By default the processor's own.

        Returns:
            Per image `scores` `(M,)` (float32, falling), `labels` `(M,)` (int64) and `boxes` `(M, 4)` (float32, xyxy,
            original pixels).

        Raises:
            ValueError: If `target_sizes` and the outputs differ in number, or `max_detections` is below 0.
        """
        scores = outputs.logits.float().sigmoid()
        boxes = box_cxcywh_to_xyxy(outputs.pred_boxes.float())
        sizes = None
        if target_sizes is not None:
            if len(target_sizes) != len(scores):
                raise ValueError(
                    "Make sure that you pass in as many target sizes as the batch dimension of the logits: got "
                    f"{len(target_sizes)} for {len(scores)} images."
                )
            sizes = torch.stack([torch.as_tensor(size) for size in target_sizes]).to(boxes)
        nms_threshold = self.nms_threshold if nms_threshold is None else nms_threshold
        max_detections = self.max_detections if max_detections is None else max_detections
        if max_detections < 0:
            raise ValueError(f"max_detections={max_detections} must be 0 or more.")

        results = []
        for index, (image_scores, image_boxes) in enumerate(zip(scores, boxes, strict=True)):
            flat = image_scores.flatten()
            order = (flat > threshold).nonzero().squeeze(1)
            if len(order) > MAX_BEFORE_NMS:  # sorting few is faster; ties with the last are kept, for the sort to cut
                order = order[flat[order] >= flat.topk(MAX_BEFORE_NMS).values[-1]]
            order = order[flat[order].argsort(descending=True, stable=True)[:MAX_BEFORE_NMS]]
            candidate, labels = order // scores.shape[2], order % scores.shape[2]
            kept_scores, kept_boxes = image_scores[candidate, labels], image_boxes[candidate]
            # In float64: torchvision separates the classes by shifting their boxes apart, which costs digits.
            keep = batched_nms(kept_boxes.cpu().double(), kept_scores.cpu().double(), labels.cpu(), nms_threshold)
            keep = keep[:max_detections].to(boxes.device)
            found = kept_boxes[keep] if sizes is None else scale_boxes(kept_boxes[keep], sizes[index])
            results.append({"scores": kept_scores[keep], "labels": labels[keep], "boxes": found})
        return results


def _as_labels(
    annotation: dict[str, Any], original_size: tuple[int, ...], new_size: tuple[int, ...]
) -> dict[str, Tensor]:
    """One image's COCO annotation → the labels that the model and the metric read."""
    objects = annotation["annotations"]
    height, width = original_size
    boxes = torch.zeros(len(objects), 4, dtype=torch.float64)
    for index, item in enumerate(objects):
        x, y, w, h = (float(value) for value in item["bbox"])
        is_inside = w > 0 and h > 0 and min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
        if not all(math.isfinite(value) for value in (x, y, w, h)) or not is_inside:
            raise ValueError(
                f"Object {index} of image_id {annotation['image_id']}: bbox {list(item['bbox'])} has no area inside "
                f"the image of {width} x {height} pixels. Expected (x, y, width, height) in original pixels, sides "
                f"above 0: correct it or leave the object out."
            )
        boxes[index] = torch.tensor([x, y, x + w, y + h], dtype=torch.float64)
    boxes = box_xyxy_to_cxcywh(normalize_boxes(boxes, torch.tensor(original_size)))
    areas = [
        float(item["area"]) if item.get("area") is not None else item["bbox"][2] * item["bbox"][3] for item in objects
    ]
    return {
        "image_id": torch.tensor([annotation["image_id"]], dtype=torch.int64),
        "class_labels": torch.tensor([item["category_id"] for item in objects], dtype=torch.int64),
        "boxes": boxes.float(),
        "area": torch.tensor(areas, dtype=torch.float32),
        "iscrowd": torch.tensor([int(item.get("iscrowd") or 0) for item in objects], dtype=torch.int64),
        "orig_size": torch.tensor(original_size, dtype=torch.int64),
        "size": torch.tensor(new_size, dtype=torch.int64),
    }
