"""Head, matching, loss and post-processing against torchvision's RetinaNet on the same inputs: 640 px, 80 classes."""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.ops import box_iou

from dit_detection import DiTDetectionConfig, DiTDetectionImageProcessor
from dit_detection.model.anchors import make_anchors
from dit_detection.model.box_coder import BoxCoder
from dit_detection.model.boxes import box_xyxy_to_cxcywh, normalize_boxes
from dit_detection.model.head import AnchorHead
from dit_detection.model.losses import DetectionLoss
from dit_detection.model.matcher import AnchorMatcher

from .measure import Pair, Row, Settings, count_parameters

PIXELS, NUM_LABELS = 640, 80
# 76,725 and 14,400 anchors.
LEVELS = {"5 levels": [8, 16, 32, 64, 128], "1 level": [16]}
# The first is what torchvision's RetinaNet does.
LOSSES: dict[str, dict[str, Any]] = {
    "max-IoU, focal, L1": {"matcher": "max_iou", "box_loss": "smooth_l1", "smooth_l1_beta": 0.0},
    "ATSS, focal, GIoU": {"matcher": "atss", "box_loss": "giou"},
}


def rows(settings: Settings) -> Iterator[Row]:
    """What follows the backbone."""
    device = settings.device
    for name, strides in LEVELS.items():
        yield Row(f"head, {name}, batch 1", partial(head, strides, device), aim=1.0)
        for loss in LOSSES:
            build = partial(matching_and_loss, strides, loss, device)
            yield Row(f"matching and loss, forward + backward: {loss}, {name}, 8 x 100 boxes", build, aim=2.0)
        for scores in ("sparse", "dense"):
            build = partial(post_processing, strides, scores, device)
            yield Row(f"post-processing: {scores} scores, {name}, batch 8", build, aim=2.0)
    for loss in LOSSES:
        if settings.quick and not loss.startswith("ATSS"):  # torchvision's side takes half a minute
            continue
        build = partial(matching_and_loss, LEVELS["5 levels"], loss, device, batch_size=1, num_boxes=2000)
        yield Row(f"matching and loss, forward + backward: {loss}, 5 levels, 2,000 boxes", build, memory_aim=1.0)


def head_config(strides: list[int], **overrides: Any) -> DiTDetectionConfig:
    """A head of torchvision's widths on these levels: 256 channels, 9 anchors per cell."""
    return DiTDetectionConfig(
        strides=strides, patch_size=strides[0], num_labels=NUM_LABELS, box_loss_weight=1.0, **overrides
    )


def random_batch(strides: list[int], device: str, batch_size: int = 8, num_boxes: int = 100) -> SimpleNamespace:
    """Anchors, what a head might give for them, and objects of 12 to 300 pixels."""
    torch.manual_seed(0)
    config = head_config(strides)
    shapes = [(PIXELS // stride, PIXELS // stride) for stride in strides]
    anchors = make_anchors(shapes, strides, config.anchor_sizes, config.aspect_ratios)
    sides = (torch.rand(batch_size, num_boxes, 2) * 3.2 + 2.5).exp()
    centers = torch.rand(batch_size, num_boxes, 2) * PIXELS
    return SimpleNamespace(
        config=config,
        level_sizes=[height * width * config.num_anchors_per_cell for height, width in shapes],
        anchors=anchors.to(device),
        valid=torch.ones(batch_size, len(anchors), dtype=torch.bool, device=device),
        boxes=torch.cat([centers - sides / 2, centers + sides / 2], dim=2).clamp(0, PIXELS).to(device),
        class_labels=torch.randint(NUM_LABELS, (batch_size, num_boxes)).to(device),
        logits=(torch.randn(batch_size, len(anchors), NUM_LABELS) - 4.6).to(device),
        deltas=(torch.randn(batch_size, len(anchors), 4) * 0.1).to(device),
    )


def head(strides: list[int], device: str) -> Pair:
    """The convolutions, with group norm in both."""
    ours = AnchorHead(head_config(strides)).eval().to(device)
    theirs = RetinaNetHead(256, 9, NUM_LABELS, norm_layer=partial(nn.GroupNorm, 32)).eval().to(device)
    maps = [torch.randn(1, 256, PIXELS // stride, PIXELS // stride, device=device) for stride in strides]
    parameters = count_parameters(ours), count_parameters(theirs)
    return Pair(torch.no_grad()(lambda: ours(maps)), torch.no_grad()(lambda: theirs(maps)), parameters)


def matching_and_loss(
    strides: list[int], loss_name: str, device: str, batch_size: int = 8, num_boxes: int = 100
) -> Pair:
    """Matching, loss and the gradient of the head's outputs; RetinaNet's own on the other side."""
    batch = random_batch(strides, device, batch_size, num_boxes)
    logits, deltas = batch.logits.requires_grad_(), batch.deltas.requires_grad_()
    config = head_config(strides, **LOSSES[loss_name])
    loss = DetectionLoss(config, AnchorMatcher(config.matcher, config.num_anchors_per_cell))
    targets = {
        "boxes": batch.boxes,
        "class_labels": batch.class_labels,
        "iscrowd": torch.zeros_like(batch.class_labels, dtype=torch.bool),
    }
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    their_head = RetinaNetHead(256, 9, NUM_LABELS)
    per_image = [
        {"boxes": boxes, "labels": labels} for boxes, labels in zip(batch.boxes, batch.class_labels, strict=True)
    ]

    def ours() -> tuple[Tensor, ...]:
        losses = loss(logits, deltas, batch.anchors, batch.level_sizes, batch.valid, targets)
        return torch.autograd.grad(sum(losses.per_matched_anchor().values()), [logits, deltas])

    def theirs() -> tuple[Tensor, ...]:
        matched = [matcher(box_iou(target["boxes"], batch.anchors)) for target in per_image]
        outputs = {"cls_logits": logits, "bbox_regression": deltas}
        losses = their_head.compute_loss(per_image, outputs, [batch.anchors] * batch_size, matched)
        return torch.autograd.grad(sum(losses.values()), [logits, deltas])

    return Pair(ours, theirs)


def post_processing(strides: list[int], scores: str, device: str) -> Pair:
    """Outputs to boxes: threshold 0.05, NMS at 0.5, 100 detections. Ours with the top-k that the model does."""
    batch = random_batch(strides, device)
    processor, sizes = DiTDetectionImageProcessor(), torch.full((8, 2), float(PIXELS), device=device)
    retinanet = RetinaNet(_Channels(), NUM_LABELS, head=RetinaNetHead(256, 9, NUM_LABELS), detections_per_img=100)
    if scores == "sparse":  # a trained model: some 500 scores per image above the threshold
        clusters = torch.rand_like(batch.logits[:, :, :1]) < 0.003
        found = clusters & (torch.rand_like(batch.logits) < 0.03)
        logits = torch.where(found, batch.logits + 4, batch.logits / 4 - 5)
    else:  # a sixth of all
        logits = torch.randn_like(batch.logits) - 4

    def ours() -> Any:
        # As in `DiTForObjectDetection.forward`.
        best = logits.amax(dim=2).topk(batch.config.max_candidates).indices
        chosen = logits.gather(1, best[:, :, None].expand(-1, -1, NUM_LABELS))
        deltas = batch.deltas.gather(1, best[:, :, None].expand(-1, -1, 4))
        boxes = normalize_boxes(BoxCoder().decode(deltas, batch.anchors[best]), sizes)
        outputs = SimpleNamespace(logits=chosen, pred_boxes=box_xyxy_to_cxcywh(boxes))
        return processor.post_process_object_detection(outputs, 0.05, sizes, nms_threshold=0.5)

    def theirs() -> Any:
        outputs = {
            "cls_logits": logits.split(batch.level_sizes, dim=1),
            "bbox_regression": batch.deltas.split(batch.level_sizes, dim=1),
        }
        anchors = [batch.anchors.split(batch.level_sizes)] * 8
        return retinanet.postprocess_detections(outputs, anchors, [(PIXELS, PIXELS)] * 8)

    return Pair(torch.no_grad()(ours), torch.no_grad()(theirs))


class _Channels(nn.Module):
    """All that `RetinaNet` asks of a backbone when it is built."""

    out_channels = 256
