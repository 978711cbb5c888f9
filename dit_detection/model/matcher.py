# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""
Which anchor answers for which object. Shape letters: A anchors, M objects, K candidates.

Objects are looked at `CHUNK` at a time: the (M, A) table of an image with thousands of objects would fill the memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.ops import box_iou

BACKGROUND = -1
IGNORE = -2
CHUNK = 256


class AnchorMatcher:
    """
    Assigns each anchor an object, background, or nothing to learn.

    Args:
        method (`str`): `"max_iou"` (RetinaNet, arXiv 1708.02002) or `"atss"` (arXiv 1912.02424).
        num_anchors_per_cell (`int`): Anchors at every cell, consecutive in the list of anchors.
        foreground_iou, background_iou, allow_low_quality_matches: See [`DiTDetectionConfig`]; for `max_iou`.
        atss_candidates (`int`): See [`DiTDetectionConfig`]; for `atss`.
    """

    def __init__(
        self,
        method: str,
        num_anchors_per_cell: int,
        foreground_iou: float = 0.5,
        background_iou: float = 0.4,
        allow_low_quality_matches: bool = True,
        atss_candidates: int = 9,
    ) -> None:
        self.method = method
        self.num_anchors_per_cell = num_anchors_per_cell
        self.foreground_iou = foreground_iou
        self.background_iou = background_iou
        self.allow_low_quality_matches = allow_low_quality_matches
        self.atss_candidates = atss_candidates

    @torch.no_grad()
    def __call__(
        self, anchors: Tensor, level_sizes: list[int], boxes: Tensor, iscrowd: Tensor, valid: Tensor
    ) -> Tensor:
        """
        Args:
            anchors (`torch.Tensor` of shape `(A, 4)`): xyxy, input pixels, finest level first.
            level_sizes (`list[int]`): Anchors of each level; they add up to A.
            boxes (`torch.Tensor` of shape `(M, 4)`): Objects of one image, xyxy, input pixels; M may be 0.
            iscrowd (`torch.Tensor` of shape `(M,)`, bool): Regions of uncounted objects. They match nothing, but the
                background anchors that lie at least half inside one are ignored.
            valid (`torch.Tensor` of shape `(A,)`, bool): Anchors outside the padding; the others are ignored.

        Returns:
            `torch.Tensor` of shape `(A,)`, int64: index into `boxes`, `BACKGROUND` or `IGNORE`.
        """
        objects = (~iscrowd).nonzero().squeeze(1)
        if self.method == "atss":
            matched = self._match_atss(anchors, level_sizes, boxes[objects], valid)
        else:
            matched = self._match_max_iou(anchors, boxes[objects], valid)
        if len(objects) < len(boxes):
            if len(objects):
                matched = torch.where(matched >= 0, objects[matched.clamp(min=0)], matched)
            for crowd in boxes[iscrowd]:
                inside = (matched == BACKGROUND) & (_share_inside(anchors, crowd) >= 0.5)
                matched = matched.masked_fill(inside, IGNORE)
        return matched.masked_fill(~valid, IGNORE)

    def _match_max_iou(self, anchors: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        best_iou, best_object = anchors.new_zeros(len(anchors)), valid.new_zeros(len(anchors), dtype=torch.int64)
        low_quality = torch.zeros_like(valid)
        for start, iou in _chunked_iou(boxes, anchors, valid):
            chunk_iou, chunk_object = iou.max(dim=0)
            better = chunk_iou > best_iou
            best_iou = torch.where(better, chunk_iou, best_iou)
            best_object = torch.where(better, chunk_object + start, best_object)
            # Every anchor that ties for an object's best IoU. Objects that overlap no anchor at all (best IoU 0) are
            # left out: every anchor would tie.
            best_of_object = iou.amax(dim=1, keepdim=True)
            low_quality |= ((iou == best_of_object) & (best_of_object > 0)).any(dim=0)
        matched = torch.where(best_iou >= self.foreground_iou, best_object, IGNORE)
        matched = matched.masked_fill(best_iou < self.background_iou, BACKGROUND)
        if self.allow_low_quality_matches:
            matched = torch.where(low_quality, best_object, matched)
        return matched

    def _match_atss(self, anchors: Tensor, level_sizes: list[int], boxes: Tensor, valid: Tensor) -> Tensor:
        best_iou, best_object = (
            anchors.new_zeros(len(anchors)),
            valid.new_full((len(anchors),), BACKGROUND, dtype=torch.int64),
        )
        for start, iou in _chunked_iou(boxes, anchors, valid):
            chunk = boxes[start : start + len(iou)]
            candidates = self._nearest_cells(anchors, level_sizes, chunk, valid)  # (M, K)
            candidate_iou = iou.gather(1, candidates)
            usable = valid[candidates]
            count = usable.sum(dim=1, keepdim=True).clamp(min=1)
            mean = (candidate_iou * usable).sum(dim=1, keepdim=True) / count
            variance = ((candidate_iou - mean).square() * usable).sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
            centers = ((anchors[:, :2] + anchors[:, 2:]) / 2)[candidates]  # (M, K, 2)
            inside = ((centers > chunk[:, None, :2]) & (centers < chunk[:, None, 2:])).all(dim=2)
            positive = usable & inside & (candidate_iou > 0) & (candidate_iou >= mean + variance.sqrt())
            # An anchor that several objects claim goes to the one it overlaps most.
            claimed = torch.zeros_like(iou).scatter_(1, candidates, candidate_iou * positive)
            chunk_iou, chunk_object = claimed.max(dim=0)
            better = chunk_iou > best_iou
            best_iou = torch.where(better, chunk_iou, best_iou)
            best_object = torch.where(better, chunk_object + start, best_object)
        return self._adopt_orphans(best_object, anchors, boxes, valid)

    def _nearest_cells(self, anchors: Tensor, level_sizes: list[int], boxes: Tensor, valid: Tensor) -> Tensor:
        """On each level, all anchors of the cells nearest to each object's centre: `(M, K)` anchor indices."""
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        per_cell, first, candidates = self.num_anchors_per_cell, 0, []
        for size in level_sizes:
            cells = torch.arange(first, first + size, per_cell, device=anchors.device)
            cell_centers = (anchors[cells, :2] + anchors[cells, 2:]) / 2
            distance = (centers[:, None] - cell_centers).square().sum(dim=2)  # (M, cells)
            distance = distance.masked_fill(~valid[cells], float("inf"))
            nearest = distance.topk(min(self.atss_candidates, len(cells)), largest=False).indices  # (M, k)
            members = cells[nearest][:, :, None] + torch.arange(per_cell, device=anchors.device)
            candidates.append(members.flatten(1))
            first += size
        return torch.cat(candidates, dim=1)

    def _adopt_orphans(self, matched: Tensor, anchors: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        """
        Give each object without an anchor the free anchor that it overlaps most, if it overlaps any.

        Those with the best chance choose first, so the order of the objects does not matter.
        """
        has_anchor = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        has_anchor[matched[matched >= 0]] = True
        orphans = (~has_anchor).nonzero().squeeze(1)
        free = valid & (matched < 0)
        chances = [iou.amax(dim=1) for _, iou in _chunked_iou(boxes[orphans], anchors, free)]
        if chances:
            orphans = orphans[torch.cat(chances).argsort(descending=True)]
        for orphan in orphans:
            iou = box_iou(boxes[orphan][None], anchors)[0]
            iou = iou.masked_fill(~valid | (matched >= 0), 0)
            best = iou.argmax()
            matched[best] = torch.where(iou[best] > 0, orphan, matched[best])
        return matched


def _chunked_iou(boxes: Tensor, anchors: Tensor, valid: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the first object's index and the `(M, A)` IoUs of each chunk of objects; 0 for anchors in the padding."""
    for start in range(0, len(boxes), CHUNK):
        yield start, box_iou(boxes[start : start + CHUNK], anchors) * valid


def _share_inside(anchors: Tensor, region: Tensor) -> Tensor:
    """The share of each anchor's area that lies in a region: `(A, 4)`, `(4,)` → `(A,)`."""
    overlap = (torch.minimum(anchors[:, 2:], region[2:]) - torch.maximum(anchors[:, :2], region[:2])).clamp(min=0)
    sides = anchors[:, 2:] - anchors[:, :2]
    return overlap.prod(dim=1) / sides.prod(dim=1)
