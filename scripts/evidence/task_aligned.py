"""
TOOD's task-aligned matching and loss, measured against ATSS in the sweep `matcher`.

Shape letters: B images, A anchors, C classes, M objects.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from dit_detection.model.boxes import broadcast_iou
from dit_detection.model.configuration_dit_detection import DiTDetectionConfig
from dit_detection.model.losses import DetectionLoss, ImageLosses
from dit_detection.model.matcher import AnchorMatcher

# As published: anchors of an object, exponents of score and IoU, weight of GIoU.
TOP_K = 13
ALPHA, BETA = 1.0, 6.0
BOX_LOSS_WEIGHT = 2.0


class TaskAlignedLoss(DetectionLoss):
    """
    Objects take the anchors whose prediction is best in class and place at once; the score is to say how good.

    For one process without gradient accumulation: `Trainer` divides by the matched anchors that it has counted for
    ours, and this takes that back. Crowd regions are background.

    Args:
        config ([`DiTDetectionConfig`]), matcher ([`AnchorMatcher`]): Of the loss whose place it takes.
        num_other_steps (`int`): First steps with that loss, as predictions say nothing yet.

    Source: TOOD (arXiv 2108.07755), on the head as it is. Candidates are the anchors with their centre in the object.
    """

    def __init__(self, config: DiTDetectionConfig, matcher: AnchorMatcher, num_other_steps: int = 0) -> None:
        super().__init__(config, matcher)
        self.num_other_steps = num_other_steps

    def __call__(
        self,
        logits: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        level_sizes: list[int],
        valid: Tensor,
        targets: dict[str, Tensor],
    ) -> ImageLosses:
        """As of [`DetectionLoss`]."""
        if self.num_other_steps > 0:
            self.num_other_steps -= 1
            return super().__call__(logits, deltas, anchors, level_sizes, valid, targets)
        logits = logits.float()
        boxes = self.box_coder.decode(deltas.float(), anchors)  # (B, A, 4)
        matched, quality = self.align(logits.detach(), boxes.detach(), anchors, valid, targets)  # (B, A) each
        wanted = torch.zeros_like(logits)
        column = targets["class_labels"].gather(1, matched.clamp(min=0))[:, :, None].clamp(min=0)
        wanted.scatter_(2, column, quality[:, :, None])
        losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        losses = losses * (wanted - logits.sigmoid()).abs().square() * valid[:, :, None]
        objects = targets["boxes"].gather(1, matched.clamp(min=0)[:, :, None].expand(-1, -1, 4))
        # Where nothing is matched, a box against itself.
        objects = torch.where(matched[:, :, None] >= 0, objects, boxes.detach())
        overlap_losses = generalized_box_iou_loss(boxes, objects, reduction="none") * quality
        # The caller divides by this number: what remains is a division by the sum of qualities.
        counted = targets.get("matched_idxs")
        counted = self.match(anchors, level_sizes, valid, targets) if counted is None else counted
        num_matched = (counted >= 0).sum(dim=1)
        factor = num_matched.sum().clamp(min=1) / quality.sum().clamp(min=1)
        return ImageLosses(
            loss_class=losses.sum(dim=(1, 2)) * factor,
            loss_bbox=BOX_LOSS_WEIGHT * overlap_losses.sum(dim=1) * factor,
            num_matched=num_matched,
        )

    def align(
        self, logits: Tensor, boxes: Tensor, anchors: Tensor, valid: Tensor, targets: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """
        Which object each anchor answers for, and how well it does.

        Args:
            logits (`torch.Tensor` of shape `(B, A, C)`), boxes (`torch.Tensor` of shape `(B, A, 4)`): What is
                predicted; xyxy, input pixels.
            anchors (`torch.Tensor` of shape `(A, 4)`): As the boxes.
            valid (`torch.Tensor` of shape `(B, A)`, bool): Anchors outside the padding.
            targets: As of [`DetectionLoss`].

        Returns:
            Each `(B, A)`: rows of the objects, or -1; and qualities, of each object up to the best IoU that it has,
            or 0.
        """
        centers = (anchors[:, :2] + anchors[:, 2:]) / 2
        matched = torch.full_like(valid, -1, dtype=torch.int64)
        quality = torch.zeros_like(valid, dtype=torch.float32)
        for image in range(len(boxes)):
            is_object = (targets["class_labels"][image] >= 0) & ~targets["iscrowd"][image]
            rows = is_object.nonzero().squeeze(1)  # (M,)
            if len(rows) == 0:
                continue
            objects, labels = targets["boxes"][image, rows], targets["class_labels"][image, rows]
            iou = broadcast_iou(objects[:, None], boxes[image])  # (M, A)
            metric = logits[image].sigmoid().T[labels] ** ALPHA * iou**BETA
            inside = ((centers > objects[:, None, :2]) & (centers < objects[:, None, 2:])).all(dim=2)
            metric = metric * inside * valid[image]
            best = metric.topk(min(TOP_K, metric.shape[1]), dim=1)
            is_chosen = torch.zeros_like(inside).scatter_(1, best.indices, best.values > 0)
            # An anchor that several objects choose goes to the one that its box overlaps most.
            winner = (iou + 1).mul(is_chosen).argmax(dim=0)  # (A,)
            is_chosen &= winner == torch.arange(len(rows), device=winner.device)[:, None]
            metric, iou = metric * is_chosen, iou * is_chosen
            share = metric / metric.amax(dim=1, keepdim=True).clamp(min=torch.finfo(metric.dtype).tiny)
            any_object = is_chosen.any(dim=0)
            matched[image] = torch.where(any_object, rows[winner], -1)
            quality[image] = (share * iou.amax(dim=1, keepdim=True)).amax(dim=0)
        return matched, quality
