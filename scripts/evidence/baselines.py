"""
The detectors of others, with random weights: fed the same images, asked for the same detections.

Shape letters: B images, M objects, H W pixels of the canvas.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_convert
from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config, RTDetrImageProcessor

from .evaluation import MAX_DETECTIONS, Batch, Detections
from .settings import Settings


class RetinaNet(nn.Module):
    """
    torchvision's RetinaNet on a ResNet-50 with a feature pyramid, every layer trained.

    Without pretrained weights torchvision trains them all, batch norms too, which it otherwise freezes.

    Args:
        num_labels (`int`): Classes.
        anchor_scale (`float`): Of its anchors, which from 32 pixels upwards are meant for images of 800.
    """

    def __init__(self, num_labels: int, anchor_scale: float = 1.0) -> None:
        super().__init__()
        sizes = tuple(
            tuple(anchor_scale * 4 * stride * 2 ** (octave / 3) for octave in range(3))
            for stride in (8, 16, 32, 64, 128)
        )
        self.model = retinanet_resnet50_fpn(
            weights=None,
            weights_backbone=None,
            num_classes=num_labels,  # scored one by one: there is no class for the background
            anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
            score_thresh=0.0,  # mAP counts all detections
            detections_per_img=MAX_DETECTIONS,
        )
        self.model.transform.resize = lambda image, target=None: (image, target)  # images come on their canvas
        # Under autocast the head gives bfloat16: too coarse for scores and boxes.
        self.model.head.register_forward_hook(lambda head, inputs, outputs: _to_float(outputs))

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        return sum(self.model(self._images(batch), corner_targets(batch)).values(), torch.zeros(()))

    def predict(self, batch: Batch) -> Detections:
        """What is found, in original pixels."""
        return to_original(self.model(self._images(batch)), batch)

    def _images(self, batch: Batch) -> list[Tensor]:
        return list((batch["pixel_values"] + 1) / 2)  # in [0, 1]: it normalises by itself


class DFine(nn.Module):
    """
    transformers' D-FINE in the form N, which is of the size of our small detector, with its denoising queries.

    200 queries where the published form has 300: they are the best of its cells, of which the canvas has 240.

    Args:
        num_labels (`int`): Classes.

    Source: transformers' `convert_d_fine_original_pytorch_checkpoint_to_hf.py`, `dfine_n_coco`.
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        backbone = HGNetV2Config(
            stem_channels=[3, 16, 16],
            stage_in_channels=[16, 64, 256, 512],
            stage_mid_channels=[16, 32, 64, 128],
            stage_out_channels=[64, 256, 512, 1024],
            stage_num_blocks=[1, 1, 2, 1],
            stage_numb_of_layers=[3, 3, 3, 3],
            hidden_sizes=[128, 256, 512, 1024],
            use_learnable_affine_block=True,
            out_indices=[3, 4],
        )
        config = DFineConfig(
            backbone_config=backbone,
            freeze_backbone_batch_norms=False,  # frozen at random weights they would normalise nothing
            num_feature_levels=2,
            feat_strides=[16, 32],
            encoder_in_channels=[512, 1024],
            encoder_hidden_dim=128,
            encoder_ffn_dim=512,
            encode_proj_layers=[1],
            hidden_expansion=0.34,
            depth_mult=0.5,
            d_model=128,
            decoder_in_channels=[128, 128],
            decoder_ffn_dim=512,
            decoder_n_points=[6, 6],
            decoder_layers=3,
            num_queries=200,
            num_labels=num_labels,
        )
        self.model = DFineForObjectDetection(config)
        self.processor = RTDetrImageProcessor()  # the one that it is published with
        # Under autocast: matching and losses compare small numbers.
        loss_function = self.model.loss_function
        self.model.loss_function = lambda *args, **kwargs: loss_function(*_to_float(args), **_to_float(kwargs))

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        return self.model(_unit_pixels(batch), labels=relative_targets(batch)).loss

    def predict(self, batch: Batch) -> Detections:
        """What is found, in original pixels."""
        return self.post_process(self.model(_unit_pixels(batch)), batch)

    def post_process(self, outputs: Any, batch: Batch) -> Detections:
        """Its outputs → what is found, in original pixels."""
        height, width = batch["pixel_values"].shape[-2:]
        found = self.processor.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=[(height, width)] * len(batch["labels"])
        )
        best = [{name: values[:MAX_DETECTIONS] for name, values in image.items()} for image in found]
        return to_original(best, batch)


def make_baseline(settings: Settings, num_labels: int) -> RetinaNet | DFine:
    """The untrained detector of a baseline's arm, random weights drawn by the seed."""
    torch.manual_seed(settings.seed)
    return {"retinanet": RetinaNet, "d_fine": DFine}[settings.arm](num_labels, **settings.model)


def corner_targets(batch: Batch) -> list[dict[str, Tensor]]:
    """What torchvision trains on, per image: `boxes` `(M, 4)`, xyxy, pixels of the canvas, and `labels` `(M,)`."""
    device = batch["pixel_values"].device
    targets = []
    for labels in batch["labels"]:
        is_object = labels["iscrowd"] == 0
        height, width = labels["size"].tolist()
        boxes = labels["boxes"][is_object] * torch.tensor([width, height, width, height])
        boxes = box_convert(boxes, "cxcywh", "xyxy")
        targets.append({"boxes": boxes.to(device), "labels": labels["class_labels"][is_object].to(device)})
    return targets


def relative_targets(batch: Batch) -> list[dict[str, Tensor]]:
    """What a DETR trains on, per image: `boxes` `(M, 4)`, cxcywh in [0, 1] of the canvas, and `class_labels`."""
    height, width = batch["pixel_values"].shape[-2:]
    return [
        {
            "boxes": box_convert(target["boxes"], "xyxy", "cxcywh")
            / torch.tensor([width, height, width, height], device=target["boxes"].device),
            "class_labels": target["labels"],
        }
        for target in corner_targets(batch)
    ]


def to_original(found: Detections, batch: Batch) -> Detections:
    """Detections in pixels of the canvas → in original pixels, clipped to the image."""
    results = []
    for image, labels in zip(found, batch["labels"], strict=True):
        (height, width), size = labels["orig_size"].tolist(), labels["size"].tolist()
        scale = torch.tensor([width / size[1], height / size[0]] * 2)
        boxes = image["boxes"].cpu().float() * scale
        boxes = boxes.clamp(min=torch.zeros(4), max=torch.tensor([width, height, width, height]))
        results.append({"boxes": boxes, "scores": image["scores"].cpu(), "labels": image["labels"].cpu()})
    return results


def _unit_pixels(batch: Batch) -> Tensor:
    return (batch["pixel_values"] + 1) / 2  # its processor scales to [0, 1] and normalises no further


def _to_float(values: Any) -> Any:
    """Tensors of less than 32 bits in a tuple, list or dict → float32."""
    if isinstance(values, dict):
        return {name: _to_float(value) for name, value in values.items()}
    if isinstance(values, tuple | list):
        return type(values)(map(_to_float, values))
    is_half = isinstance(values, Tensor) and values.dtype in (torch.bfloat16, torch.float16)
    return values.float() if is_half else values
