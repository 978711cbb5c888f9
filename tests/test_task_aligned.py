import sys
from pathlib import Path

import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou

sys.path.append(str(Path(__file__).parents[1]))

from scripts.evidence.task_aligned import ALPHA, BETA, TOP_K, TaskAlignedLoss


def random_case(seed, num_objects):
    """Logits, deltas, anchors, which are valid, and targets of two images; the last row of each is filling."""
    generator = torch.Generator().manual_seed(seed)
    corners = 100 * torch.rand(2, num_objects + 1, 2, generator=generator)
    boxes = torch.cat([corners, corners + 10 + 90 * torch.rand(2, num_objects + 1, 2, generator=generator)], dim=2)
    labels = torch.randint(0, 3, (2, num_objects + 1), generator=generator)
    labels[:, -1] = -1
    iscrowd = torch.zeros_like(labels, dtype=torch.bool)
    iscrowd[1, : num_objects // 2] = True
    centers = torch.cartesian_prod(torch.arange(8.0, 160, 16), torch.arange(8.0, 160, 16))
    anchors = torch.cat([centers - 16, centers + 16], dim=1)
    valid = torch.rand(2, len(anchors), generator=generator) < 0.9
    logits = torch.randn(2, len(anchors), 3, generator=generator, requires_grad=True)
    deltas = 0.3 * torch.randn(2, len(anchors), 4, generator=generator)
    targets = {"boxes": boxes, "class_labels": labels, "iscrowd": iscrowd}
    return logits, deltas.requires_grad_(), anchors, valid, targets


def aligned_one_by_one(scores, boxes, anchors, valid, targets):
    num_images, num_anchors = valid.shape
    matched, quality = -torch.ones(num_images, num_anchors).long(), torch.zeros(num_images, num_anchors)
    for image in range(num_images):
        chosen = {}
        for row, label in enumerate(targets["class_labels"][image].tolist()):
            if label < 0 or targets["iscrowd"][image, row]:
                continue
            left, top, right, bottom = targets["boxes"][image, row].tolist()
            metrics = {}
            for anchor in range(num_anchors):
                x, y = ((anchors[anchor, :2] + anchors[anchor, 2:]) / 2).tolist()
                if valid[image, anchor] and left < x < right and top < y < bottom:
                    iou = box_iou(targets["boxes"][image, row, None], boxes[image, anchor, None]).item()
                    metrics[anchor] = (scores[image, anchor, label].item() ** ALPHA * iou**BETA, iou)
            best = sorted(metrics, key=lambda anchor: -metrics[anchor][0])[:TOP_K]
            for anchor in best:
                if metrics[anchor][0] > 0 and (anchor not in chosen or chosen[anchor][2] < metrics[anchor][1]):
                    chosen[anchor] = (row, *metrics[anchor])
        for row in {row for row, _, _ in chosen.values()}:
            own = {anchor: found for anchor, found in chosen.items() if found[0] == row}
            best_metric, best_iou = (max(found[column] for found in own.values()) for column in (1, 2))
            for anchor, (_, metric, _) in own.items():
                matched[image, anchor], quality[image, anchor] = row, metric / best_metric * best_iou
    return matched, quality


@pytest.mark.parametrize("seed,num_objects", [(0, 1), (1, 8), (2, 30)])
def test_task_aligned_matching_and_loss_are_those_of_single_pairs(tiny_model, seed, num_objects):
    logits, deltas, anchors, valid, targets = random_case(seed, num_objects)
    model = tiny_model(num_labels=3)
    loss = TaskAlignedLoss(model.config, model.detection_loss.matcher)
    boxes, scores = loss.box_coder.decode(deltas, anchors).detach(), logits.detach().sigmoid()
    matched, quality = loss.align(logits.detach(), boxes, anchors, valid, targets)
    expected = aligned_one_by_one(scores, boxes, anchors, valid, targets)
    assert torch.equal(matched, expected[0])
    torch.testing.assert_close(quality, expected[1])
    assert (matched >= 0).any()

    targets["matched_idxs"] = torch.where(torch.arange(len(anchors)) < 7, 0, -1).expand(2, -1)
    found = loss(logits, deltas, anchors, [len(anchors)], valid, targets)
    total_class = total_box = 0.0
    for image, anchor in valid.nonzero().tolist():
        row = matched[image, anchor].item()
        for label in range(3):
            is_target = row >= 0 and label == targets["class_labels"][image, row]
            wanted = quality[image, anchor].item() if is_target else 0.0
            score = scores[image, anchor, label].double()
            entropy = -(wanted * score.log() + (1 - wanted) * (1 - score).log())
            total_class += (wanted - score) ** 2 * entropy
        if row >= 0:
            giou = generalized_box_iou(boxes[image, anchor, None], targets["boxes"][image, row, None])
            total_box += 2 * quality[image, anchor] * (1 - giou)
    per_anchor, divisor = found.per_matched_anchor(14), quality.sum().clamp(min=1)
    torch.testing.assert_close(per_anchor["loss_class"].item(), (total_class / divisor).item(), rtol=1e-4, atol=0)
    torch.testing.assert_close(per_anchor["loss_bbox"].item(), (total_box / divisor).item(), rtol=1e-4, atol=0)
    sum(per_anchor.values()).backward()
    assert logits.grad.isfinite().all() and deltas.grad.isfinite().all()


def test_images_without_objects_have_a_finite_loss_and_the_first_steps_are_the_other_loss(tiny_model):
    logits, deltas, anchors, valid, targets = random_case(3, 2)
    targets["class_labels"][:] = -1
    model = tiny_model(num_labels=3)
    other = model.detection_loss
    loss = TaskAlignedLoss(model.config, other.matcher, num_other_steps=1)
    given = (logits, deltas, anchors, [len(anchors)], valid)
    targets["matched_idxs"] = torch.full_like(valid, -1, dtype=torch.int64)
    assert torch.equal(loss(*given, targets).loss_class, other(*given, targets).loss_class)
    found = loss(*given, targets)
    assert not torch.equal(found.loss_class, other(*given, targets).loss_class)
    assert found.loss_class.isfinite().all() and (found.loss_class > 0).all()
    assert found.loss_bbox.tolist() == [0.0, 0.0]
