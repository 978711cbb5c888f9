# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""What the detector is trained on. Shape letters: B images, A anchors, C classes, M objects, P matched anchors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from .box_coder import BoxCoder
from .configuration_dit_detection import DiTDetectionConfig
from .matcher import IGNORE, AnchorMatcher

# Entries of the class table that eager mode works on at a time. On a CPU, what fits the cache: 2.5 times faster.
# Elsewhere few launches, and yet not several tables in memory.
CPU_CHUNK, CHUNK = 2**17, 2**25


@dataclass
class ImageLosses:
    """Summed, weighted losses of each image, each `(B,)` float32, and how many of its anchors were matched."""

    loss_class: Tensor
    loss_bbox: Tensor
    num_matched: Tensor

    def per_matched_anchor(self, num_items_in_batch: Tensor | int | None = None) -> dict[str, Tensor]:
        """
        The batch's losses per matched anchor of the global batch.

        Averaging gradients over processes, as DDP, FSDP and DeepSpeed do, then gives the sum over all their images
        divided by the matched anchors of all their images: what one process makes of the same images.

        Args:
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Matched anchors of everything that makes one
                optimizer step, all processes and all batches of gradient accumulation. Each process then divides its
                sum by it, and the caller multiplies by the number of processes, as `Trainer` does. By default this
                batch is the step: matches are counted over the processes, in a collective call that every process
                must make, and each divides by their *mean* count.
        """
        if num_items_in_batch is None:
            num_matched, num_processes = self.num_matched.sum().float(), 1
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(num_matched)
                num_processes = dist.get_world_size()
            num_matched = num_matched.clamp(min=1) / num_processes
        else:
            num_matched = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=self.loss_class.device)
            num_matched = num_matched.clamp(min=1)
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
        targets: dict[str, Tensor],
    ) -> ImageLosses:
        """
        Args:
            logits (`torch.Tensor` of shape `(B, A, C)`), deltas (`torch.Tensor` of shape `(B, A, 4)`): The head's.
            anchors (`torch.Tensor` of shape `(A, 4)`): xyxy, input pixels.
            level_sizes (`list[int]`): Anchors of each level.
            valid (`torch.Tensor` of shape `(B, A)`, bool): Anchors outside the padding.
            targets: As `make_targets` gives them: `boxes` `(B, M, 4)` xyxy, input pixels; `class_labels` `(B, M)`,
                negative in the rows that fill up the rectangle; `iscrowd` `(B, M)` bool. M is at least 1. Perhaps
                `matched_idxs` `(B, A)`, what `match` made of them.
        """
        logits, deltas = logits.float(), deltas.float()
        boxes, class_labels = targets["boxes"], targets["class_labels"]
        matched = targets.get("matched_idxs")  # (B, A)
        if matched is None:
            matched = self.match(anchors, level_sizes, valid, targets)
        is_matched = matched >= 0
        classes = torch.where(is_matched, class_labels.gather(1, matched.clamp(min=0)), matched)  # (B, A)
        return ImageLosses(
            loss_class=self.config.class_loss_weight * self._class_loss(logits, classes),
            loss_bbox=self.config.box_loss_weight * self._box_loss(deltas, anchors, matched, boxes),
            num_matched=is_matched.sum(dim=1),
        )

    def match(self, anchors: Tensor, level_sizes: list[int], valid: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """`(B, A)`: each anchor's object, `BACKGROUND` or `IGNORE`. It does not depend on what the head predicts."""
        boxes, exists, iscrowd = targets["boxes"], targets["class_labels"] >= 0, targets["iscrowd"]
        return self.matcher(anchors, level_sizes, boxes, exists, iscrowd, valid)

    def _class_loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """`(B,)` sums over anchors and classes; `classes` `(B, A)` is negative where there is no object."""
        config = self.config
        weights = None if config.class_weights is None else logits.new_tensor(config.class_weights)
        if config.class_loss == "cross_entropy":
            return ClassLoss.apply(logits, classes, weights, 1.0, 1.0, 0.0)
        return ClassLoss.apply(
            logits, classes, weights, config.focal_alpha, 1 - config.focal_alpha, config.focal_gamma
        )

    def _box_loss(self, deltas: Tensor, anchors: Tensor, matched: Tensor, boxes: Tensor) -> Tensor:
        """`(B,)` sums over matched anchors."""
        batch_size, num_anchors = matched.shape
        first_object = boxes.shape[1] * torch.arange(batch_size, device=boxes.device)[:, None]
        objects = (matched.clamp(min=0) + first_object).flatten()
        is_matched = matched.flatten() >= 0
        # Compiled, all B · A anchors: a fixed shape, and one pass over them. In eager mode each of the forty
        # operations is a pass, so they see the P matched anchors alone.
        rows = slice(None) if torch.compiler.is_compiling() else is_matched.nonzero().squeeze(1)
        is_matched = is_matched[rows, None]
        anchors = anchors.repeat(batch_size, 1)[rows]
        # Where there is no object, numbers whose loss and gradient are finite.
        boxes = torch.where(is_matched, boxes.flatten(0, 1)[objects[rows]], anchors)
        losses = self._box_losses(torch.where(is_matched, deltas.flatten(0, 1)[rows], 0.0), anchors, boxes)
        of_anchors = losses.new_zeros(batch_size * num_anchors)
        of_anchors[rows] = torch.where(is_matched.squeeze(1), losses, 0.0)
        return of_anchors.view(batch_size, num_anchors).sum(dim=1)

    def _box_losses(self, deltas: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """`(P,)` losses from `(P, 4)` deltas, anchors and objects."""
        if self.config.box_loss == "giou":
            return generalized_box_iou_loss(self.box_coder.decode(deltas, anchors), boxes, reduction="none")
        targets = self.box_coder.encode(boxes, anchors)
        return F.smooth_l1_loss(deltas, targets, reduction="none", beta=self.config.smooth_l1_beta).sum(dim=1)


class ClassLoss(torch.autograd.Function):
    """
    Focal loss (arXiv 1708.02002), or cross entropy (`gamma=0`), summed over the anchors and classes of each image.

    Nearly every entry of the (B, A, C) table is background: its loss is taken for all entries from the logits alone,
    then corrected at the matched anchors. No one-hot targets; and of the table nothing is kept for the backward pass,
    which works the gradient out from the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        classes: Tensor,
        weights: Tensor | None,
        object_weight: float,
        background_weight: float,
        gamma: float,
    ) -> Tensor:
        """
        Args:
            ctx: autograd's.
            logits (`torch.Tensor` of shape `(B, A, C)`): Float32.
            classes (`torch.Tensor` of shape `(B, A)`, int64): The object's class, `BACKGROUND` or `IGNORE`.
            weights (`torch.Tensor` of shape `(C,)`, *optional*): A factor per class.
            object_weight, background_weight, gamma (`float`): Balance and focus.

        Returns:
            `torch.Tensor` of shape `(B,)`.
        """
        ctx.save_for_backward(logits, classes, weights)
        ctx.settings = object_weight, background_weight, gamma
        sums = []
        for rows, targets in _chunks(logits, classes):
            losses = _entry_loss(rows, background_weight, gamma)  # (n, C)
            column = targets.clamp(min=0)[:, None]
            at_target = rows.gather(1, column)
            as_object = _entry_loss(-at_target, object_weight, gamma)
            correction = as_object - _entry_loss(at_target, background_weight, gamma)  # (n, 1)
            if weights is not None:
                losses, correction = losses * weights, correction * weights[column]
            loss = losses.sum(dim=1) + torch.where(targets >= 0, correction.squeeze(1), 0.0)
            sums.append(torch.where(targets == IGNORE, 0.0, loss))
        return torch.cat(sums).view_as(classes).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the logits, `(B, A, C)`."""
        logits, classes, weights = ctx.saved_tensors
        object_weight, background_weight, gamma = ctx.settings
        factors = torch.where(classes == IGNORE, 0.0, grad_output[:, None])  # (B, A)
        gradient = torch.empty_like(logits)
        for rows, targets, factor, target_gradient in _chunks(logits, classes, factors, gradient):
            slopes = _entry_slope(rows, background_weight, gamma)  # (n, C)
            column = targets.clamp(min=0)[:, None]
            as_object = -_entry_slope(-rows.gather(1, column), object_weight, gamma)
            slopes.scatter_(1, column, torch.where(targets[:, None] >= 0, as_object, slopes.gather(1, column)))
            if weights is not None:
                slopes *= weights
            target_gradient.copy_(slopes.mul_(factor[:, None]))
        return gradient, None, None, None, None, None


def _chunks(logits: Tensor, *tables: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of the logits and of other tables, `(B, A, ...)`, with images and anchors as one axis."""
    chunk = CPU_CHUNK if logits.device.type == "cpu" else CHUNK
    # Compiled, the operations become one pass: nothing is gained by pieces.
    size = logits.shape[0] * logits.shape[1] if torch.compiler.is_compiling() else max(1, chunk // logits.shape[2])
    return zip(*(table.flatten(0, 1).split(size) for table in (logits, *tables)), strict=True)


def _entry_loss(signed: Tensor, weight: float, gamma: float) -> Tensor:
    """Loss of single scores, any shape: of logits as background, or of the negative logits as object."""
    loss = F.softplus(signed)
    if gamma:
        loss *= signed.sigmoid().pow_(gamma)
    return loss.mul_(weight)


def _entry_slope(signed: Tensor, weight: float, gamma: float) -> Tensor:
    """The derivative of `_entry_loss`; written out, because autograd's is infinite where the score is 0, gamma < 1."""
    score = signed.sigmoid()
    if not gamma:
        return score.mul_(weight)
    slope = F.softplus(signed).mul_(1 - score).mul_(gamma).add_(score)
    return slope.mul_(score.pow_(gamma)).mul_(weight)
