# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""What the detector is trained on. Shape letters: B images, A anchors, C classes, M objects, P matched anchors."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from .box_coder import BoxCoder
from .configuration_dit_detection import DiTDetectionConfig
from .matcher import IGNORE, AnchorMatcher


@dataclass
class ImageLosses:
    """Summed, weighted losses of each image, each `(B,)` float32, and how many of its anchors were matched."""

    loss_class: Tensor
    loss_bbox: Tensor
    num_matched: Tensor

    def per_matched_anchor(self) -> dict[str, Tensor]:
        """
        The batch's losses per matched anchor, counted over all processes.

        Each process divides by the processes' *mean* count: averaging gradients over processes, as DDP and FSDP do,
        then gives the sum over the global batch divided by its number of matched anchors. A collective call: every
        process must make it.
        """
        num_matched = self.num_matched.sum().float()
        num_processes = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(num_matched)
            num_processes = dist.get_world_size()
        num_matched = num_matched.clamp(min=1) / num_processes
        return {"loss_class": self.loss_class.sum() / num_matched, "loss_bbox": self.loss_bbox.sum() / num_matched}

    def per_image(self) -> dict[str, Tensor]:
        """Each `(B,)`: an image's losses per matched anchor of its own, whatever it is batched with."""
        num_matched = self.num_matched.clamp(min=1)
        return {"loss_class": self.loss_class / num_matched, "loss_bbox": self.loss_bbox / num_matched}


class DetectionLoss:
    """
    Matches anchors to objects and sums the class loss over all anchors, the box loss over the matched ones.

    All in float32, whatever the head computes in. Has no state and changes none of its inputs.
    """

    def __init__(self, config: DiTDetectionConfig, matcher: AnchorMatcher) -> None:
        self.config = config
        self.matcher = matcher
        self.box_coder = BoxCoder()

    def __call__(
        self,
        logits: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        level_sizes: list[int],
        valid: Tensor,
        targets: list[dict[str, Tensor]],
    ) -> ImageLosses:
        """
        Args:
            logits (`torch.Tensor` of shape `(B, A, C)`), deltas (`torch.Tensor` of shape `(B, A, 4)`): The head's.
            anchors (`torch.Tensor` of shape `(A, 4)`): xyxy, input pixels.
            level_sizes (`list[int]`): Anchors of each level.
            valid (`torch.Tensor` of shape `(B, A)`, bool): Anchors outside the padding.
            targets: Per image `boxes` `(M, 4)` xyxy, input pixels; `class_labels` `(M,)`; `iscrowd` `(M,)` bool.
        """
        logits, deltas = logits.float(), deltas.float()
        matched = torch.stack(
            [
                self.matcher(anchors, level_sizes, target["boxes"], target["iscrowd"], image_valid)
                for target, image_valid in zip(targets, valid, strict=True)
            ]
        )  # (B, A)
        image, anchor = (matched >= 0).nonzero(as_tuple=True)  # each (P,)
        # One list of all objects in the batch; each image's first object is at its offset.
        counts = [len(target["boxes"]) for target in targets]
        offsets = torch.tensor([0, *counts[:-1]], device=matched.device).cumsum(0)
        found = matched[image, anchor] + offsets[image]
        classes = torch.cat([target["class_labels"] for target in targets])[found]
        boxes = torch.cat([target["boxes"] for target in targets])[found]

        class_sums = self._class_loss(logits, matched, image, anchor, classes)
        box_losses = self._box_loss(deltas[image, anchor], anchors[anchor], boxes)
        return ImageLosses(
            loss_class=self.config.class_loss_weight * class_sums,
            loss_bbox=self.config.box_loss_weight * class_sums.new_zeros(len(logits)).index_add(0, image, box_losses),
            num_matched=(matched >= 0).sum(dim=1),
        )

    def _class_loss(self, logits: Tensor, matched: Tensor, image: Tensor, anchor: Tensor, classes: Tensor) -> Tensor:
        """
        `(B,)` sums over anchors and classes.

        Nearly every entry of the (B, A, C) table is background: its loss is taken for all entries from the logits
        alone, then corrected at the P matched ones. No one-hot targets, a third of torchvision's time.
        """
        background = self._entry_loss(logits, is_object=False)
        at_matched = logits[image, anchor, classes]
        correction = self._entry_loss(at_matched, is_object=True) - self._entry_loss(at_matched, is_object=False)
        if self.config.class_weights is not None:
            weights = logits.new_tensor(self.config.class_weights)
            background, correction = background * weights, correction * weights[classes]
        background = background.sum(dim=2) * (matched != IGNORE)
        return background.sum(dim=1).index_add(0, image, correction)

    def _entry_loss(self, logits: Tensor, is_object: bool) -> Tensor:
        """Loss of single class scores, any shape, whose target is 1 (`is_object`) or 0."""
        signed = -logits if is_object else logits
        cross_entropy = F.softplus(signed)
        if self.config.class_loss == "cross_entropy":
            return cross_entropy
        alpha, gamma = self.config.focal_alpha, self.config.focal_gamma
        return (alpha if is_object else 1 - alpha) * signed.sigmoid() ** gamma * cross_entropy

    def _box_loss(self, deltas: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """`(P,)` losses from `(P, 4)` deltas, anchors and objects."""
        if self.config.box_loss == "giou":
            return generalized_box_iou_loss(self.box_coder.decode(deltas, anchors), boxes, reduction="none")
        targets = self.box_coder.encode(boxes, anchors)
        if self.config.box_loss == "l1":
            return F.l1_loss(deltas, targets, reduction="none").sum(dim=1)
        return F.smooth_l1_loss(deltas, targets, reduction="none", beta=self.config.smooth_l1_beta).sum(dim=1)
