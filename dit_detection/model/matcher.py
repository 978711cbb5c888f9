# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""
Which anchor answers for which object. Shape letters: B images, A anchors, M objects, N objects of all images, K
candidates.

Tables of objects and anchors are made `CHUNK` entries at a time: whole, those of an image with thousands of objects
would fill the memory.
"""

import re
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from .boxes import broadcast_iou, share_inside

BACKGROUND = -1
IGNORE = -2
CHUNK = 2**21


@dataclass
class AnchorMatcher:
    """
    Assigns each anchor an object, background, or nothing to learn.

    Args:
        method (`str`): `"max_iou"` (RetinaNet, arXiv 1708.02002) or `"atss"` (arXiv 1912.02424).
        num_anchors_per_cell (`int`): Anchors at every cell, consecutive in the list of anchors.
        foreground_iou, background_iou, allow_low_quality_matches: See [`DiTDetectionConfig`]; for `max_iou`.
        atss_candidates (`int`): See [`DiTDetectionConfig`]; for `atss`.
    """

    method: str
    num_anchors_per_cell: int
    foreground_iou: float = 0.5
    background_iou: float = 0.4
    allow_low_quality_matches: bool = True
    atss_candidates: int = 9

    def __call__(
        self, anchors: Tensor, level_sizes: list[int], boxes: Tensor, exists: Tensor, iscrowd: Tensor, valid: Tensor
    ) -> Tensor:
        """
        Args:
            anchors (`torch.Tensor` of shape `(A, 4)`): xyxy, input pixels, finest level first.
            level_sizes (`list[int]`): Anchors of each level; they add up to A.
            boxes (`torch.Tensor` of shape `(B, M, 4)`): Objects, xyxy, input pixels.
            exists (`torch.Tensor` of shape `(B, M)`, bool): False for the rows that fill up the rectangle.
            iscrowd (`torch.Tensor` of shape `(B, M)`, bool): Regions of uncounted objects. They match nothing, but the
                background anchors that lie at least half inside one are ignored.
            valid (`torch.Tensor` of shape `(B, A)`, bool): Anchors outside the padding; the others are ignored.

        Returns:
            `torch.Tensor` of shape `(B, A)`, int64: index into an image's `boxes`, `BACKGROUND` or `IGNORE`.
        """
        return _match_anchors(anchors, level_sizes, boxes, exists, iscrowd, valid, *astuple(self))

    def match(
        self, anchors: Tensor, level_sizes: list[int], boxes: Tensor, exists: Tensor, iscrowd: Tensor, valid: Tensor
    ) -> Tensor:
        """What calling the matcher does, in the open: `torch.compile` sees only the call."""
        objects = exists & ~iscrowd
        if self.method == "atss":
            matched = self._match_atss(anchors, level_sizes, boxes, objects, valid)
        else:
            rows = [
                self._match_max_iou(anchors * in_image[:, None], boxes_of_image, is_object.nonzero().squeeze(1))
                for boxes_of_image, is_object, in_image in zip(boxes, objects, valid, strict=True)
            ]
            matched = torch.stack(rows)
        for image, crowd in (exists & iscrowd).nonzero().tolist():
            inside = (matched[image] == BACKGROUND) & (share_inside(anchors, boxes[image, crowd]) >= 0.5)
            matched[image].masked_fill_(inside, IGNORE)
        return matched.masked_fill(~valid, IGNORE)

    def _match_max_iou(self, anchors: Tensor, boxes: Tensor, objects: Tensor) -> Tensor:
        """`(A,)` for the objects `(N,)` of one image. Anchors in the padding come without area: they overlap none."""
        best_iou, best_object = anchors.new_zeros(len(anchors)), objects.new_zeros(len(anchors))
        low_quality = torch.zeros_like(best_iou, dtype=torch.bool)
        anchors = anchors.T.contiguous().T  # coordinate after coordinate: faster to read
        for chunk in _chunks(objects, len(anchors)):
            iou = broadcast_iou(boxes[chunk, None], anchors)  # (N, A)
            chunk_iou, chunk_object = iou.max(dim=0)
            better = chunk_iou > best_iou
            best_iou = torch.where(better, chunk_iou, best_iou)
            best_object = torch.where(better, chunk[chunk_object], best_object)
            # Every anchor that ties for an object's best IoU. Objects that overlap no anchor at all (best IoU 0) are
            # left out: every anchor would tie.
            best_of_object = iou.amax(dim=1, keepdim=True)
            low_quality |= (iou == best_of_object.masked_fill(best_of_object == 0, 2.0)).any(dim=0)
        matched = torch.where(best_iou >= self.foreground_iou, best_object, IGNORE)
        matched = matched.masked_fill(best_iou < self.background_iou, BACKGROUND)
        if self.allow_low_quality_matches:
            matched = torch.where(low_quality, best_object, matched)
        return matched

    def _match_atss(
        self, anchors: Tensor, level_sizes: list[int], boxes: Tensor, objects: Tensor, valid: Tensor
    ) -> Tensor:
        """`(B, A)` for the objects of all images together."""
        matched = torch.full_like(valid, BACKGROUND, dtype=torch.int64)
        image, index = objects.nonzero(as_tuple=True)  # each (N,)
        if len(image) == 0:
            return matched
        boxes = boxes[image, index]  # (N, 4)

        claims, chances = [], []
        for chunk in _chunks(torch.arange(len(boxes), device=boxes.device), self._num_cells(level_sizes)):
            candidates, iou, usable = self._candidates(anchors, level_sizes, boxes[chunk], valid, image[chunk])
            count = usable.sum(dim=1, keepdim=True)
            mean = iou.sum(dim=1, keepdim=True) / count.clamp(min=1)
            variance = ((iou - mean).square() * usable).sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
            centers = ((anchors[:, :2] + anchors[:, 2:]) / 2)[candidates]  # (N, K, 2)
            inside = ((centers > boxes[chunk, None, :2]) & (centers < boxes[chunk, None, 2:])).all(dim=2)
            row, column = (inside & (iou > 0) & (iou >= mean + variance.sqrt())).nonzero(as_tuple=True)
            claims.append((chunk[row], candidates[row, column], iou[row, column]))
            chances.append(iou.amax(dim=1))

        # An anchor that several objects claim goes to the one it overlaps most, then to the first.
        claimant, anchor, iou = (torch.cat(parts) for parts in zip(*claims, strict=True))
        place = image[claimant] * len(anchors) + anchor
        wins = iou == iou.new_zeros(matched.numel()).scatter_reduce(0, place, iou, "amax")[place]
        matched.view(-1).scatter_reduce_(0, place[wins], index[claimant[wins]], "amin", include_self=False)

        # Objects left without an anchor adopt one. Those with the best chance choose first, so the order of the
        # objects does not matter.
        has_anchor = torch.zeros_like(objects)
        has_anchor[image[claimant], matched[image[claimant], anchor]] = True
        chance, order = torch.cat(chances).sort(descending=True, stable=True)
        orphans = order[~has_anchor[image[order], index[order]] & (chance > 0)]
        for chunk in _chunks(orphans, self._num_cells(level_sizes)):
            candidates, iou, _ = self._candidates(anchors, level_sizes, boxes[chunk], valid, image[chunk])
            for position, orphan in enumerate(chunk.tolist()):
                image_matched, image_valid = matched[image[orphan]], valid[image[orphan]]
                if not _adopt(index[orphan], candidates[position], iou[position], image_matched):
                    all_iou = broadcast_iou(boxes[orphan], anchors) * image_valid
                    _adopt(index[orphan], torch.arange(len(anchors), device=boxes.device), all_iou, image_matched)
        return matched

    def _num_cells(self, level_sizes: list[int]) -> int:
        """Of the finest level."""
        return max(level_sizes) // self.num_anchors_per_cell

    def _candidates(
        self, anchors: Tensor, level_sizes: list[int], boxes: Tensor, valid: Tensor, image: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        On each level, all anchors of the cells nearest to the centres of boxes `(N, 4)` of images `(N,)`.

        Returns:
            Each `(N, K)`: indices of the anchors, rising, their IoU, and whether they lie outside the padding.
            IoU is 0 in the padding. The nearest cell has the anchors with the highest IoU of a level, because it is
            nearest both across and down; so a box that overlaps no candidate overlaps no anchor.
        """
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        per_cell, first, levels = self.num_anchors_per_cell, 0, []
        for size in level_sizes:
            cells = torch.arange(first, first + size, per_cell, device=anchors.device)
            cell_x, cell_y = ((anchors[cells, :2] + anchors[cells, 2:]) / 2).unbind(1)
            distance = (centers[:, :1] - cell_x).square() + (centers[:, 1:] - cell_y).square()  # (N, cells)
            distance.masked_fill_(~valid[:, cells][image], float("inf"))
            nearest = distance.topk(min(self.atss_candidates, len(cells)), largest=False).indices  # (N, k)
            members = cells[nearest.sort(dim=1).values][:, :, None] + torch.arange(per_cell, device=anchors.device)
            levels.append(members.flatten(1))
            first += size
        candidates = torch.cat(levels, dim=1)
        usable = valid[image[:, None], candidates]
        return candidates, broadcast_iou(boxes[:, None], anchors[candidates]) * usable, usable


# A name per copy of this file: the package and a checkpoint folder may both be loaded in one process.
@torch.library.custom_op(f"dit_detection::match_anchors_{re.sub(r'[^0-9a-zA-Z]', '_', __name__)}", mutates_args=())
def _match_anchors(
    anchors: Tensor,
    level_sizes: list[int],
    boxes: Tensor,
    exists: Tensor,
    iscrowd: Tensor,
    valid: Tensor,
    method: str,
    num_anchors_per_cell: int,
    foreground_iou: float,
    background_iou: float,
    allow_low_quality_matches: bool,
    atss_candidates: int,
) -> Tensor:
    """The matcher as one operation that `torch.compile` does not look into: its shapes depend on the data."""
    settings = (method, num_anchors_per_cell, foreground_iou, background_iou, allow_low_quality_matches)
    matcher = AnchorMatcher(*settings, atss_candidates)
    return matcher.match(anchors, level_sizes, boxes, exists, iscrowd, valid)


@_match_anchors.register_fake
def _(
    anchors: Tensor,
    level_sizes: list[int],
    boxes: Tensor,
    exists: Tensor,
    iscrowd: Tensor,
    valid: Tensor,
    *settings: object,
) -> Tensor:
    return torch.empty_like(valid, dtype=torch.int64)


def _adopt(index: Tensor, candidates: Tensor, iou: Tensor, matched: Tensor) -> bool:
    """Give an object the free candidate that it overlaps most, in `matched` `(A,)`; False if it overlaps none."""
    best_iou, best = (iou * (matched[candidates] == BACKGROUND)).max(dim=0)
    if best_iou > 0:
        matched[candidates[best]] = index
        return True
    return False


def _chunks(objects: Tensor, entries_per_object: int) -> tuple[Tensor, ...]:
    """Objects, so many at a time that a table of them has about `CHUNK` entries; none if there are no objects."""
    return objects.split(max(1, CHUNK // entries_per_object)) if len(objects) else ()
