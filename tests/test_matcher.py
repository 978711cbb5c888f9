import pytest
import torch
from torchvision.models.detection._utils import Matcher as TorchvisionMatcher
from torchvision.ops import box_iou

from dit_detection.model import matcher as matcher_module
from dit_detection.model.anchors import make_anchors
from dit_detection.model.matcher import BACKGROUND, IGNORE, AnchorMatcher

SHAPES, STRIDES, RATIOS = [(16, 16), (8, 8), (4, 4)], [8, 16, 32], [0.5, 1.0, 2.0]
SIZES = [[4.0 * stride, 5.0 * stride] for stride in STRIDES]
PER_CELL = 6
LEVEL_SIZES = [16 * 16 * PER_CELL, 8 * 8 * PER_CELL, 4 * 4 * PER_CELL]
ANCHORS = make_anchors(SHAPES, STRIDES, SIZES, RATIOS)  # of a canvas of 128 x 128 pixels


def match(method, boxes, anchors=ANCHORS, level_sizes=None, per_cell=PER_CELL, iscrowd=None, valid=None, **settings):
    level_sizes = LEVEL_SIZES if level_sizes is None else level_sizes
    iscrowd = torch.zeros(len(boxes), dtype=torch.bool) if iscrowd is None else torch.tensor(iscrowd)
    valid = torch.ones(len(anchors), dtype=torch.bool) if valid is None else valid
    exists = torch.ones_like(iscrowd)
    matcher = AnchorMatcher(method, per_cell, **settings)
    return matcher(anchors, level_sizes, boxes[None], exists[None], iscrowd[None], valid[None])[0]


def random_boxes(count, seed, low=4.0, high=80.0):
    """Objects that lie mostly on the canvas, with fractions of pixels."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.rand(count, 2, generator=generator) * (high - low) + low
    centers = torch.rand(count, 2, generator=generator) * 128
    return torch.cat([centers - sides / 2, centers + sides / 2], dim=1)


def nasty_boxes():
    """Equal boxes, boxes on anchors, on cell corners and centres, beyond the edge, a hair wide, larger than all."""
    return torch.stack(
        [
            *([torch.tensor([20.0, 20, 52, 52])] * 2),
            *ANCHORS[[0, 700, 1600]],
            torch.tensor([48.0, 48, 80, 80]),
            torch.tensor([52.0, 52, 84, 84]),
            torch.tensor([100.0, 100, 164, 164]),
            torch.tensor([60.0, 10, 60.01, 90]),
            torch.tensor([-200.0, -200, 400, 400]),
        ]
    )


# max_iou


@pytest.mark.parametrize("allow_low_quality_matches", [False, True])
def test_max_iou_by_hand(allow_low_quality_matches):
    # Objects are 10 x 10 at x = 0 and x = 20. Anchors are 10 x 10 too, shifted by s: IoU = (10 - s) / (10 + s).
    boxes = torch.tensor([[0.0, 0, 10, 10], [20.0, 0, 30, 10]])
    shifts = torch.tensor([0.0, 2, 4, 6, 24, 26, 40])
    anchors = torch.stack([shifts, torch.zeros(7), shifts + 10, torch.full((7,), 10.0)], dim=1)
    # anchor         0     1     2     3     4     5     6
    # object 0       1   2/3   3/7   1/4     0     0     0
    # object 1       0     0     0     0   3/7   1/4     0
    # 1/2 .. 1 is matched, 2/5 .. 1/2 ignored, below is background; anchor 4 is the best that object 1 has.
    expected = [0, 0, IGNORE, BACKGROUND, 1 if allow_low_quality_matches else IGNORE, BACKGROUND, BACKGROUND]
    matched = match("max_iou", boxes, anchors, [7], 1, allow_low_quality_matches=allow_low_quality_matches)
    assert matched.tolist() == expected


@pytest.mark.parametrize("allow_low_quality_matches", [False, True])
@pytest.mark.parametrize(("foreground", "background"), [(0.5, 0.4), (0.7, 0.3), (0.5, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("boxes", [random_boxes(1, 0), random_boxes(40, 1), random_boxes(600, 2), nasty_boxes()])
def test_max_iou_equals_torchvision(allow_low_quality_matches, foreground, background, boxes):
    theirs = TorchvisionMatcher(foreground, background, allow_low_quality_matches)
    matched = match(
        "max_iou",
        boxes,
        foreground_iou=foreground,
        background_iou=background,
        allow_low_quality_matches=allow_low_quality_matches,
    )
    assert torch.equal(matched, theirs(box_iou(boxes, ANCHORS)))
    assert (matched >= 0).any() or not allow_low_quality_matches


def test_ties_go_to_the_first_object_and_to_every_anchor():
    # Two equal objects; anchors 0 and 1 overlap both by half a box: IoU 1/3, the best there is.
    boxes = torch.tensor([[10.0, 0, 20, 10]] * 2)
    anchors = torch.tensor([[5.0, 0, 15, 10], [15.0, 0, 25, 10], [18.0, 0, 28, 10]])
    assert match("max_iou", boxes, anchors, [3], 1).tolist() == [0, 0, BACKGROUND]


def test_an_object_that_overlaps_no_anchor_matches_none():
    outside = torch.tensor([[1000.0, 1000, 1010, 1010]])
    # torchvision's fault: the best IoU is 0, which every anchor has.
    assert (TorchvisionMatcher(0.5, 0.4, True)(box_iou(outside, ANCHORS)) == 0).all()
    for method in ("max_iou", "atss"):
        assert (match(method, outside) == BACKGROUND).all()
        inside = torch.tensor([[20.0, 20, 52, 52]])
        assert torch.equal(match(method, torch.cat([inside, outside])), match(method, inside))


@pytest.mark.parametrize("method", ["max_iou", "atss"])
def test_no_objects_is_all_background(method):
    assert (match(method, torch.zeros(0, 4)) == BACKGROUND).all()


@pytest.mark.parametrize("method", ["max_iou", "atss"])
def test_chunks_make_no_difference(method, monkeypatch):
    boxes = torch.cat([random_boxes(600, 3), nasty_boxes(), random_boxes(100, 3)])
    at_once = match(method, boxes)
    assert len(boxes) * len(ANCHORS) < matcher_module.CHUNK
    for chunk in (7 * len(ANCHORS), 100 * 256, 1):  # 256 cells on the finest level
        monkeypatch.setattr(matcher_module, "CHUNK", chunk)
        assert torch.equal(match(method, boxes), at_once)


@pytest.mark.parametrize("method", ["max_iou", "atss"])
@pytest.mark.parametrize("count", [30, 400])
def test_the_order_of_objects_does_not_matter(method, count):
    boxes = random_boxes(count, 4, low=1.0, high=20.0)  # crowded, so that objects compete for anchors
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    matched, shuffled = match(method, boxes), match(method, boxes[order])
    assert torch.equal(torch.where(shuffled >= 0, order[shuffled.clamp(min=0)], shuffled), matched)


# crowds and padding


@pytest.mark.parametrize("method", ["max_iou", "atss"])
def test_crowds_match_nothing_and_hide_the_background_half_inside_them(method):
    # The crowd covers x = 0 .. 15: of anchors at 0, 10, 11 and 40, 10 x 10 each, it holds 1, 1/2, 2/5 and nothing.
    anchors = torch.tensor([[0.0, 0, 10, 10], [10.0, 0, 20, 10], [11.0, 0, 21, 10], [40.0, 0, 50, 10]])
    boxes = torch.tensor([[0.0, 0, 15, 10], [40.0, 0, 50, 10]])
    matched = match(method, boxes, anchors, [4], 1, iscrowd=[True, False])
    assert matched.tolist() == [IGNORE, IGNORE, BACKGROUND, 1]
    # Alone, and together with an object on the very same place, which keeps its anchor.
    assert match(method, boxes[:1], anchors, [4], 1, iscrowd=[True]).tolist() == [
        IGNORE,
        IGNORE,
        BACKGROUND,
        BACKGROUND,
    ]
    boxes = torch.tensor([[0.0, 0, 15, 10], [40.0, 0, 50, 10], [0.0, 0, 10, 10]])
    assert match(method, boxes, anchors, [4], 1, iscrowd=[True, True, False]).tolist() == [
        2,
        IGNORE,
        BACKGROUND,
        IGNORE,
    ]


@pytest.mark.parametrize("method", ["max_iou", "atss"])
def test_padding_never_matches(method):
    centers = (ANCHORS[:, :2] + ANCHORS[:, 2:]) / 2
    valid = (centers < torch.tensor([96.0, 40.0])).all(dim=1)
    boxes = torch.cat(
        [random_boxes(50, 5), torch.tensor([[90.0, 30, 127, 127], [100.0, 50, 128, 100]]), nasty_boxes()]
    )
    matched = match(method, boxes, valid=valid)
    assert (matched[~valid] == IGNORE).all()
    assert (matched[valid] != IGNORE).any()
    assert (matched[valid] >= 0).any()
    assert (match(method, boxes, valid=torch.zeros_like(valid)) == IGNORE).all()


def test_atss_does_not_look_at_padding():
    # The anchors that are left match as if the others were not there at all.
    valid = (ANCHORS[:, 0] + ANCHORS[:, 2]) / 2 < 64
    boxes = random_boxes(30, 6)
    anchors = make_anchors([(16, 8), (8, 4), (4, 2)], STRIDES, SIZES, RATIOS)
    alone = match("atss", boxes, anchors, [size // 2 for size in LEVEL_SIZES])
    assert torch.equal(torch.sort(ANCHORS[valid][:, 0]).values, torch.sort(anchors[:, 0]).values)
    assert torch.equal(match("atss", boxes, valid=valid)[valid], alone)


# atss


def plain_atss(anchors, level_sizes, per_cell, boxes, k):
    """ATSS (arXiv 1912.02424, algorithm 1) as it is written, one object, level and candidate at a time."""
    iou = box_iou(boxes, anchors)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    claims = {}  # anchor → (IoU, object)
    for index, box in enumerate(boxes):
        middle = (box[:2] + box[2:]) / 2
        candidates, first = [], 0
        for size in level_sizes:
            cells = list(range(first, first + size, per_cell))
            cells.sort(key=lambda cell: float((centers[cell] - middle).norm()))
            candidates += [cell + anchor for cell in cells[:k] for anchor in range(per_cell)]
            first += size
        overlaps = iou[index, candidates]
        threshold = overlaps.mean() + overlaps.std()
        for anchor in candidates:
            x, y = centers[anchor]
            inside = box[0] < x < box[2] and box[1] < y < box[3]
            claim = (float(iou[index, anchor]), index)
            if inside and iou[index, anchor] >= threshold and claim > claims.get(anchor, (0.0, -1)):
                claims[anchor] = claim
    matched = torch.full((len(anchors),), BACKGROUND)
    for anchor, (_, index) in claims.items():
        matched[anchor] = index
    return matched


@pytest.mark.parametrize("k", [9, 1, 400])
@pytest.mark.parametrize(("seed", "low", "high"), [(7, 16.0, 80.0), (8, 40.0, 200.0), (9, 8.0, 12.0)])
def test_atss_is_the_papers(k, seed, low, high):
    boxes = random_boxes(12, seed, low, high)
    expected = plain_atss(ANCHORS, LEVEL_SIZES, PER_CELL, boxes, k)
    matched = match("atss", boxes, atss_candidates=k)
    # Ours also adopts: where the paper leaves an object without an anchor, exactly one more is matched to it.
    orphans = set(range(len(boxes))) - set(expected.tolist())
    for orphan in orphans:
        assert (matched == orphan).sum() == 1
    adopted = torch.isin(matched, torch.tensor(sorted(orphans), dtype=torch.int64))
    assert (expected[adopted] == BACKGROUND).all()
    assert torch.equal(matched.masked_fill(adopted, BACKGROUND), expected)
    assert (expected >= 0).any()


def test_atss_by_hand():
    # Four cells of 10 pixels with one 10 x 10 anchor each, centred on x = 5, 15, 25, 35; the object spans 0 .. 20.
    # The k = 3 nearest cells are 0 and 1 (5 away) and 2 (15 away), with IoU 1/2, 1/2, 0: mean 1/3, deviation
    # sqrt((1/36 + 1/36 + 1/9) / 2) = 0.29, threshold 0.62: nothing passes, and cell 0 adopts the object.
    anchors = make_anchors([(1, 4)], [10], [[10.0]], [1.0])
    boxes = torch.tensor([[0.0, 0, 20, 10]])
    assert match("atss", boxes, anchors, [4], 1, atss_candidates=3).tolist() == [0, -1, -1, -1]
    # All four: IoU 1/2, 1/2, 0, 0 is mean 1/4 and deviation sqrt(4/16 / 3) = 0.29, threshold 0.54: the same.
    assert match("atss", boxes, anchors, [4], 1, atss_candidates=4).tolist() == [0, -1, -1, -1]
    # Spanning 1 .. 14 instead: IoU 9/14, 4/19, 0 is mean 0.28, deviation 0.33, threshold 0.61 < 0.64: cell 0.
    boxes = torch.tensor([[1.0, 0, 14, 10]])
    assert match("atss", boxes, anchors, [4], 1, atss_candidates=3).tolist() == [0, -1, -1, -1]


@pytest.mark.parametrize("seed", range(5))
def test_no_object_that_overlaps_a_free_anchor_stays_without_one(seed):
    tiny = random_boxes(60, seed, low=0.5, high=3.0)
    matched = match("atss", torch.cat([tiny, random_boxes(20, seed), nasty_boxes()]))
    assert set(range(60)) <= set(matched.tolist())


def test_two_orphans_share_out_what_there_is():
    # Both objects lie between the centres (11, 10) and (30, 10), inside both anchors, so neither claims one. Object 1
    # is larger and overlaps anchor 0 more; object 0 then takes anchor 1, though it overlaps it less.
    anchors = torch.tensor([[0.0, 0, 22, 20], [18.0, 0, 42, 20]])
    boxes = torch.tensor([[18.5, 8, 20.5, 10], [18.0, 6, 21.0, 9]])
    iou = box_iou(boxes, anchors)
    assert (iou.argmax(dim=1) == 0).all()
    assert iou[1, 0] > iou[0, 0] > iou[0, 1] > 0
    assert match("atss", boxes, anchors, [2], 1).tolist() == [1, 0]
    assert match("atss", boxes.flip(0), anchors, [2], 1).tolist() == [0, 1]
    # A third finds every anchor taken and stays without; nobody loses one for it.
    boxes = torch.cat([boxes, torch.tensor([[18.5, 9, 19.5, 10]])])
    assert match("atss", boxes, anchors, [2], 1).tolist() == [1, 0]


@pytest.mark.parametrize("method", ["max_iou", "atss"])
def test_thousands_of_objects_on_one_place(method):
    boxes = torch.tensor([[40.0, 40, 60, 60]]).repeat(2000, 1) + torch.linspace(0, 1, 2000)[:, None]
    matched = match(method, boxes)
    assert (matched >= 0).sum() >= (1 if method == "max_iou" else 100)
    assert matched.max() < 2000
