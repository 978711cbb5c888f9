import copy
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from dit_detection.model import losses as losses_module
from dit_detection.model.anchors import make_anchors
from dit_detection.model.box_coder import BoxCoder
from dit_detection.model.losses import DetectionLoss
from dit_detection.model.matcher import IGNORE, AnchorMatcher

SHAPES, STRIDES = [(8, 8), (4, 4), (2, 2)], [8, 16, 32]  # of a canvas of 64 x 64 pixels
NUM_ANCHORS, LEVEL_SIZES = 9 * 84, [9 * 64, 9 * 16, 9 * 4]


def make_target(boxes, class_labels, iscrowd=None):
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    iscrowd = [False] * len(boxes) if iscrowd is None else iscrowd
    return {
        "boxes": boxes,
        "class_labels": torch.as_tensor(class_labels, dtype=torch.int64),
        "iscrowd": torch.as_tensor(iscrowd, dtype=torch.bool),
    }


def random_target(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 50 - 5
    sides = torch.rand(count, 2, generator=generator) * 40 + 1
    return make_target(torch.cat([corners, corners + sides], dim=1), torch.randint(3, (count,), generator=generator))


EMPTY = make_target([], [])
CASES = {
    "objects": [random_target(5, 0), random_target(1, 1)],
    "an image without objects": [random_target(5, 0), EMPTY],
    "no objects at all": [EMPTY, EMPTY],
    "no anchor touched": [make_target([[500, 500, 520, 520]], [1]), make_target([[-90, -90, -80, -80]], [0])],
    "crowds only": [make_target([[0, 0, 64, 64]], [1], [True]), make_target([[10, 10, 30, 30]], [2], [True])],
    "2000 objects": [random_target(2000, 2), EMPTY],
    "out of the image": [make_target([[-300, -300, 400, 400], [50, 50, 90, 70]], [0, 1]), EMPTY],
    "a hair": [make_target([[10, 10, 10.01, 50], [30, 30, 30.01, 30.01]], [0, 1]), EMPTY],
    "the same twice": [make_target([[10, 10, 40, 40]] * 2, [0, 1]), EMPTY],
}
SETTINGS = [
    {"matcher": matcher, "class_loss": class_loss, "box_loss": box_loss}
    for matcher, class_loss, box_loss in [
        ("atss", "focal", "giou"),
        ("max_iou", "focal", "smooth_l1"),
        ("atss", "cross_entropy", "smooth_l1"),
        ("max_iou", "cross_entropy", "giou"),
    ]
]


def stack(targets):
    """Targets of single images → rectangles, one row longer than the longest."""
    num_rows = max(len(target["boxes"]) for target in targets) + 1
    rectangles = {
        "boxes": torch.zeros(len(targets), num_rows, 4),
        "class_labels": torch.full((len(targets), num_rows), -100),
        "iscrowd": torch.zeros(len(targets), num_rows, dtype=torch.bool),
    }
    for image, target in enumerate(targets):
        for key, rectangle in rectangles.items():
            rectangle[image, : len(target["boxes"])] = target[key]
    return rectangles


def head_outputs(batch_size=2, scale=2.0, seed=0):
    torch.manual_seed(seed)
    logits = (torch.randn(batch_size, NUM_ANCHORS, 3) * scale).requires_grad_()
    deltas = (torch.randn(batch_size, NUM_ANCHORS, 4) * scale / 4).requires_grad_()
    return logits, deltas


def loss_of(config):
    matcher = AnchorMatcher(config.matcher, config.num_anchors_per_cell)
    return DetectionLoss(config, matcher)


def detection_loss(config, logits, deltas, targets, valid=None):
    anchors = make_anchors(SHAPES, STRIDES, config.anchor_sizes, config.aspect_ratios)
    valid = torch.ones(len(targets), NUM_ANCHORS, dtype=torch.bool) if valid is None else valid
    return loss_of(config)(logits, deltas, anchors, LEVEL_SIZES, valid, stack(targets))


def matched_of(config, targets):
    anchors = make_anchors(SHAPES, STRIDES, config.anchor_sizes, config.aspect_ratios)
    valid = torch.ones(len(targets), NUM_ANCHORS, dtype=torch.bool)
    rectangles = stack(targets)
    exists = rectangles["class_labels"] >= 0
    matcher = loss_of(config).matcher
    return anchors, matcher(anchors, LEVEL_SIZES, rectangles["boxes"], exists, rectangles["iscrowd"], valid)


# values


def one_hot_targets(matched, targets):
    """The dense table of class targets that `DetectionLoss` does without."""
    table = torch.zeros(len(targets), NUM_ANCHORS, 3)
    for image, target in enumerate(targets):
        for anchor in (matched[image] >= 0).nonzero().squeeze(1):
            table[image, anchor, target["class_labels"][matched[image, anchor]]] = 1
    return table


@pytest.mark.parametrize("case", ["objects", "an image without objects", "crowds only"])
@pytest.mark.parametrize("matcher", ["atss", "max_iou"])
@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 1.5), (0.5, 0.0)])
def test_focal_loss_equals_torchvision(tiny_config, case, matcher, scale, alpha, gamma):
    config = tiny_config(matcher=matcher, focal_alpha=alpha, focal_gamma=gamma)
    targets = CASES[case]
    logits, deltas = head_outputs(scale=scale)
    _, matched = matched_of(config, targets)
    table = one_hot_targets(matched, targets)
    dense = sigmoid_focal_loss(logits.double(), table.double(), alpha=alpha, gamma=gamma)
    expected = (dense.sum(dim=2) * (matched != IGNORE)).sum(dim=1)
    losses = detection_loss(config, logits, deltas, targets).loss_class
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    ours, theirs = torch.autograd.grad(losses.sum(), logits)[0], torch.autograd.grad(expected.sum(), logits)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_a_score_of_zero_has_a_gradient_at_any_gamma(tiny_config, gamma):
    # sigmoid(-200) is 0 in float32, where sigmoid ** gamma rises infinitely fast if gamma is below 1.
    logits, deltas = head_outputs()
    wild = torch.where(logits > 0, 200.0, -200.0).detach().requires_grad_()
    losses = detection_loss(tiny_config(focal_gamma=gamma), wild, deltas, CASES["objects"])
    (gradient,) = torch.autograd.grad(losses.loss_class.sum(), wild)
    assert torch.isfinite(losses.loss_class).all()
    assert torch.isfinite(gradient).all()
    assert (gradient[wild < 0].abs().amax() > 0) and (gradient[wild > 0].amax() > 0)


@pytest.mark.parametrize("chunk", [1, 100])
@pytest.mark.parametrize("overrides", SETTINGS[:3])
def test_chunks_make_no_difference(tiny_config, monkeypatch, overrides, chunk):
    config = tiny_config(**overrides, class_weights=[0.5, 1.0, 2.0])
    logits, deltas = head_outputs()
    whole = detection_loss(config, logits, deltas, CASES["objects"]).loss_class
    monkeypatch.setattr(losses_module, "CPU_CHUNK", chunk)
    pieces = detection_loss(config, logits, deltas, CASES["objects"]).loss_class
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-6)
    ours, expected = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (pieces, whole))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("class_weights", [None, [0.5, 1.0, 4.0]])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_cross_entropy_equals_torch_with_a_factor_per_class(tiny_config, class_weights, scale):
    config = tiny_config(class_loss="cross_entropy", class_weights=class_weights, matcher="max_iou")
    targets = CASES["objects"]
    logits, deltas = head_outputs(scale=scale)
    _, matched = matched_of(config, targets)
    table = one_hot_targets(matched, targets)
    weight = None if class_weights is None else torch.tensor(class_weights)
    dense = F.binary_cross_entropy_with_logits(logits, table, weight=weight, reduction="none")
    expected = (dense.sum(dim=2) * (matched != IGNORE)).sum(dim=1)
    losses = detection_loss(config, logits, deltas, targets).loss_class
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-4)


def test_class_loss_by_hand(tiny_config):
    # One 16 x 16 anchor a cell, two cells; the object is the first anchor. Logit 0 is score 1/2 everywhere, so each of
    # the six entries has cross entropy log 2; the object's entry times 1/4 * (1/2)^2, the other five 3/4 * (1/2)^2.
    l1 = {"box_loss": "smooth_l1", "smooth_l1_beta": 0}
    config = tiny_config(strides=[16], anchor_sizes=[[16.0]], aspect_ratios=[1.0], **l1)
    anchors = make_anchors([(1, 2)], [16], [[16.0]], [1.0])
    target = make_target([[0, 0, 16, 16]], [2])
    deltas = torch.zeros(1, 2, 4)
    deltas[0, 0] = torch.tensor([0.5, -0.25, 0.0, 1.0])
    losses = loss_of(config)(
        torch.zeros(1, 2, 3), deltas, anchors, [2], torch.ones(1, 2, dtype=torch.bool), stack([target])
    )
    assert losses.num_matched.tolist() == [1]
    torch.testing.assert_close(losses.loss_class, torch.tensor([(0.25 + 5 * 0.75) * 0.25 * 0.6931472]))
    torch.testing.assert_close(losses.loss_bbox, torch.tensor([2.0 * 1.75]))  # box_loss_weight is 2


@pytest.mark.parametrize("box_loss", ["giou", "l1", "smooth_l1"])  # L1 is smooth L1 with a beta of 0
@pytest.mark.parametrize("case", ["objects", "out of the image", "a hair", "the same twice"])
def test_box_loss_equals_torch_and_torchvision(tiny_config, box_loss, case):
    fields = {"box_loss": "smooth_l1", "smooth_l1_beta": 0.0} if box_loss == "l1" else {"box_loss": box_loss}
    config = tiny_config(**fields, box_loss_weight=0.7)
    targets = CASES[case]
    logits, deltas = head_outputs()
    anchors, matched = matched_of(config, targets)
    losses = detection_loss(config, logits, deltas, targets)
    for image, target in enumerate(targets):
        found = matched[image] >= 0
        boxes, near = target["boxes"][matched[image][found]], anchors[found]
        if box_loss == "giou":
            expected = generalized_box_iou_loss(BoxCoder().decode(deltas[image][found], near), boxes, reduction="sum")
        else:
            loss = {"l1": F.l1_loss, "smooth_l1": lambda *a, **k: F.smooth_l1_loss(*a, **k, beta=1 / 9)}[box_loss]
            expected = loss(deltas[image][found], BoxCoder().encode(boxes, near), reduction="sum")
        torch.testing.assert_close(losses.loss_bbox[image], 0.7 * expected, rtol=1e-5, atol=1e-5)
    assert (matched >= 0).any()


def test_a_perfect_head_has_no_loss(tiny_config):
    config = tiny_config()
    targets = [random_target(3, 0)]
    anchors, matched = matched_of(config, targets)
    found = matched[0] >= 0
    logits, deltas = torch.full((1, NUM_ANCHORS, 3), -50.0), torch.zeros(1, NUM_ANCHORS, 4)
    objects = matched[0][found]
    logits[0, found.nonzero().squeeze(1), targets[0]["class_labels"][objects]] = 50.0
    deltas[0, found] = BoxCoder().encode(targets[0]["boxes"][objects], anchors[found])
    losses = detection_loss(config, logits, deltas, targets)
    assert (
        losses.loss_class.item() < 1e-3
    )  # float32: the sum over all entries minus what the objects' had as background
    assert losses.loss_bbox.item() < 1e-4


# invariants


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_finite_in_every_case(tiny_config, settings, case):
    config = tiny_config(**settings)
    logits, deltas = head_outputs(scale=100.0)
    targets, before = CASES[case], copy.deepcopy(CASES[case])
    inputs = logits.detach().clone(), deltas.detach().clone()
    losses = detection_loss(config, logits, deltas, targets)
    for loss in (*losses.per_matched_anchor().values(), *losses.per_image().values()):
        assert torch.isfinite(loss).all()
    sum(losses.per_matched_anchor().values()).backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(deltas.grad).all()  # a gradient, if only zeros: DDP waits for one
    assert torch.equal(logits, inputs[0])
    assert torch.equal(deltas, inputs[1])
    for target, old in zip(targets, before, strict=True):
        assert all(torch.equal(target[key], old[key]) for key in old)


def test_crowds_are_ignored_not_background(tiny_config):
    # Everything lies inside the crowd's region but anchors that stick out of it by half.
    config = tiny_config()
    logits, deltas = head_outputs()
    losses = detection_loss(config, logits, deltas, [CASES["crowds only"][0], EMPTY])
    gradient = torch.autograd.grad(losses.loss_class.sum(), logits)[0]
    _, matched = matched_of(config, [CASES["crowds only"][0], EMPTY])
    assert losses.num_matched.tolist() == [0, 0]
    assert torch.equal((gradient != 0).any(dim=2), matched != IGNORE)
    assert (matched[0] == IGNORE).sum() > NUM_ANCHORS / 2


def test_padding_is_ignored(tiny_config):
    logits, deltas = head_outputs(1)
    valid = torch.zeros(1, NUM_ANCHORS, dtype=torch.bool)
    valid[0, ::2] = True
    losses = detection_loss(tiny_config(), logits, deltas, [EMPTY], valid)
    gradient = torch.autograd.grad(losses.loss_class.sum(), logits)[0]
    assert torch.equal((gradient != 0).any(dim=2), valid)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_order_of_objects_does_not_matter(tiny_config, settings):
    config = tiny_config(**settings)
    logits, deltas = head_outputs(1)
    target = random_target(60, 3)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = {key: value[order] for key, value in target.items()}
    losses = [detection_loss(config, logits, deltas, [t]) for t in (target, shuffled)]
    for key in ("loss_class", "loss_bbox", "num_matched"):
        torch.testing.assert_close(getattr(losses[0], key), getattr(losses[1], key), rtol=1e-6, atol=1e-6)


def test_an_images_loss_does_not_depend_on_its_batch(tiny_config):
    config = tiny_config()
    logits, deltas = head_outputs(3)
    targets = [random_target(4, 0), EMPTY, random_target(50, 1)]
    together = detection_loss(config, logits, deltas, targets).per_image()
    for image, target in enumerate(targets):
        alone = detection_loss(config, logits[image : image + 1], deltas[image : image + 1], [target]).per_image()
        for name in alone:
            torch.testing.assert_close(together[name][image : image + 1], alone[name], rtol=1e-6, atol=1e-6)


def test_weights_scale_the_losses(tiny_config):
    logits, deltas = head_outputs()
    one, other = (
        detection_loss(tiny_config(class_loss_weight=a, box_loss_weight=b), logits, deltas, CASES["objects"])
        for a, b in ((1, 1), (3, 0.5))
    )
    torch.testing.assert_close(other.loss_class, 3 * one.loss_class)
    torch.testing.assert_close(other.loss_bbox, 0.5 * one.loss_bbox)


def test_half_precision_heads_are_judged_in_float32(tiny_config):
    logits, deltas = head_outputs()
    for dtype in (torch.bfloat16, torch.float16):
        halves = logits.detach().to(dtype), deltas.detach().to(dtype)
        losses = detection_loss(tiny_config(), *halves, CASES["objects"])
        exact = detection_loss(tiny_config(), *(half.float() for half in halves), CASES["objects"])
        assert losses.loss_class.dtype == torch.float32
        assert torch.equal(losses.loss_class, exact.loss_class)
        assert torch.equal(losses.loss_bbox, exact.loss_bbox)


def test_normalised_by_the_matched_anchors_of_the_batch(tiny_config):
    logits, deltas = head_outputs()
    losses = detection_loss(tiny_config(), logits, deltas, CASES["objects"])
    count = losses.num_matched.sum()
    assert count > 2
    torch.testing.assert_close(losses.per_matched_anchor()["loss_bbox"], losses.loss_bbox.sum() / count)
    nothing = detection_loss(tiny_config(), logits, deltas, [EMPTY, EMPTY])
    assert torch.equal(nothing.per_matched_anchor()["loss_class"], nothing.loss_class.sum())


# two processes


def gradients_of(config, logits, deltas, targets):
    logits, deltas = logits.detach().requires_grad_(), deltas.detach().requires_grad_()
    sum(detection_loss(config, logits, deltas, targets).per_matched_anchor().values()).backward()
    return logits.grad, deltas.grad


def run_process(rank, store, config, parts, queue):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        gradients = gradients_of(config, *parts[rank])
        queue.put((rank, [gradient.numpy() for gradient in gradients]))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("targets", [[random_target(20, 0), EMPTY, random_target(2, 1)], [EMPTY] * 3])
def test_two_processes_together_take_the_gradient_of_one(tiny_config, tmp_path, targets):
    # DDP averages gradients over processes. Here one has two images and the other one, and no tensor is shared: the
    # mean is half of each process' own, and must be what the union of the three images gives.
    config = tiny_config()
    logits, deltas = head_outputs(3)
    expected = gradients_of(config, logits, deltas, targets)
    logits, deltas = logits.detach(), deltas.detach()
    parts = [(logits[:2], deltas[:2], targets[:2]), (logits[2:], deltas[2:], targets[2:])]
    # Forked: a new interpreter would take longer to import torch than all of this file's tests.
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    store = tmp_path / "store"
    processes = [context.Process(target=run_process, args=(rank, store, config, parts, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    for index, whole in enumerate(expected):
        mean = torch.cat([torch.from_numpy(results[rank][index]) for rank in range(2)]) / 2
        torch.testing.assert_close(mean, whole, rtol=1e-6, atol=1e-6)
