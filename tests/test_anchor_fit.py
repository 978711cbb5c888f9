import math

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from dit_detection import DiTDetectionConfig
from dit_detection.anchor_fit import (
    AnchorSetting,
    best_anchor_ious,
    boxes_of,
    coverage,
    fit_anchors,
    fit_to_splits,
)
from dit_detection.data.statistics import SplitTable
from dit_detection.model.anchors import make_anchors

RETINANET = AnchorSetting.from_config(DiTDetectionConfig())
NONE = torch.zeros(0, 4), torch.zeros(0, 2)


def random_objects(count, seed, sides=(1.0, 400.0), canvas=(384, 512)):
    """Boxes of all sizes and shapes, in images that fill the canvas or a part of it."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.stack([torch.randint(5, side + 1, (count,), generator=generator) for side in canvas], dim=1)
    low, high = map(math.log, sides)
    wh = torch.exp(torch.rand(count, 2, generator=generator) * (high - low) + low).minimum(sizes.flip(1))
    corner = torch.rand(count, 2, generator=generator) * (sizes.flip(1) - wh)
    return torch.cat([corner, corner + wh], dim=1), sizes


def clusters(groups, seed=0, jitter=0.03):
    """Boxes of a few (√area, height / width), everywhere on a canvas of 512 x 512, and their images' sizes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.tensor([(s / r**0.5, s * r**0.5) for s, r, n in groups for _ in range(n)]).reshape(-1, 2)
    shapes = shapes * (1 + jitter * torch.randn(shapes.shape, generator=generator)).clamp(0.8, 1.2)
    corner = torch.rand(len(shapes), 2, generator=generator) * (512 - shapes)
    return torch.cat([corner, corner + shapes], dim=1), torch.full((len(shapes), 2), 512)


def brute_force(boxes, sizes, setting, canvas=(384, 512)):
    shapes = [tuple(math.ceil(side / stride) for side in canvas) for stride in setting.strides]
    anchors = make_anchors(shapes, setting.strides, setting.anchor_sizes, setting.aspect_ratios).double()
    # Rounded: an anchor centred on the very edge of its image is outside, whatever float32 makes of its corners.
    centers = ((anchors[:, :2] + anchors[:, 2:]) / 2).round(decimals=3)
    best = []
    for box, size in zip(boxes.double(), sizes, strict=True):
        # As the model has it: no anchors in the padding, but for those of the first finest cells.
        valid = (centers < size.flip(0).clamp(min=setting.strides[0])).all(dim=1)
        best.append(box_iou(box[None], anchors[valid]).max() if valid.any() else torch.tensor(0.0))
    return torch.stack(best).double()


@pytest.mark.parametrize(
    "setting",
    [
        RETINANET,
        AnchorSetting((8, 16, 32), ((20.0,), (40.0,), (80.0,)), (1.0,)),
        AnchorSetting((16,), ((3.0, 250.0),), (0.2, 1.0, 6.0)),
        AnchorSetting((64, 128), ((70.0,), (300.0,)), (0.5, 2.0)),  # images that hold no cell of a level
    ],
)
def test_best_ious_are_those_of_all_anchors(setting):
    boxes, sizes = random_objects(150, seed=1)
    nasty = [(0, 0, 512, 384), (0, 0, 1, 1), (511, 383, 512, 384), (0, 191, 512, 192), (248, 0, 264, 384)]
    boxes = torch.cat([boxes, torch.tensor(nasty, dtype=torch.float32)])
    sizes = torch.cat([sizes, torch.tensor([(384, 512)] * len(nasty))])
    boxes = torch.cat([boxes, torch.tensor([(10.0, 0, 90, 3), (0, 10, 2, 40)])])
    sizes = torch.cat([sizes, torch.tensor([(3, 512), (384, 2)])])
    ious, _ = best_anchor_ious(boxes, sizes, setting)
    torch.testing.assert_close(ious, brute_force(boxes, sizes, setting), rtol=0, atol=1e-5)


def test_the_best_prototype_is_named_in_the_order_of_make_anchors():
    setting = AnchorSetting((8, 16), ((16.0, 24.0), (64.0, 96.0)), (0.5, 2.0))
    # Centred on a cell of its level: level 1, ratio 2, size 64 comes after 4 prototypes of level 0, 2 of ratio 0.5.
    width, height = 64 / 2**0.5, 64 * 2**0.5
    box = torch.tensor([[200 - width / 2, 200 - height / 2, 200 + width / 2, 200 + height / 2]])
    ious, prototype = best_anchor_ious(box, torch.tensor([[512, 512]]), setting)
    assert ious.item() == pytest.approx(1, abs=1e-6) and prototype.item() == 6


def test_chunks_change_nothing(monkeypatch):
    boxes, sizes = random_objects(50, seed=2)
    whole = best_anchor_ious(boxes, sizes, RETINANET)
    monkeypatch.setattr("dit_detection.anchor_fit.CHUNK", 7)
    for first, second in zip(whole, best_anchor_ious(boxes, sizes, RETINANET), strict=True):
        assert torch.equal(first, second)


def test_coverage_by_hand():
    assert coverage(torch.tensor([0.5, 0.4, 0.9, 0.2])) == {
        "objects": 4,
        "covered": 0.5,
        "mean_iou": pytest.approx(0.5),
    }
    assert coverage(torch.zeros(0)) == {"objects": 0, "covered": -1.0, "mean_iou": -1.0}


def test_planted_clusters_are_recovered():
    boxes, sizes = clusters([(30.0, 2.0, 150), (110.0, 2.0, 100), (220.0, 2.0, 50)])
    start = AnchorSetting((4, 8, 16), ((400.0,), (420.0,), (450.0,)), (0.3,))
    fitted = fit_anchors(boxes, sizes, start)
    assert sorted(size for level in fitted.anchor_sizes for size in level) == pytest.approx([30, 110, 220], rel=0.05)
    assert fitted.aspect_ratios[0] == pytest.approx(2.0, rel=0.05)
    assert fitted.strides == start.strides
    old, new = (coverage(best_anchor_ious(boxes, sizes, setting)[0]) for setting in (start, fitted))
    assert old["covered"] == 0 and new["covered"] == 1


def make_table(groups, seed=0, num_crowds=0):
    """A split of one image of 512 x 512, each object as in `clusters`, the first of them crowd regions."""
    boxes, _ = clusters(groups, seed)
    corners = boxes.double().numpy()
    count, side = len(boxes), np.full(1, 512)
    return SplitTable(
        name="train",
        dataset=None,
        image_ids=np.zeros(1, np.int64),
        widths=side,
        heights=side,
        rows=np.zeros(count, np.int64),
        bbox=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
        labels=np.zeros(count, np.int64),
        areas=np.ones(count),
        iscrowd=np.arange(count) < num_crowds,
        canvas_sizes=np.full((1, 2), 512.0),
    )


def test_a_fit_is_worth_it_where_both_splits_gain():
    start = AnchorSetting((8, 16), ((200.0,), (260.0,)), (1.0,))
    small = make_table([(40.0, 1.0, 100), (90.0, 1.0, 100)])
    for tables, expected in (
        ({"train": small}, True),
        ({"train": small, "validation": make_table([(40.0, 1.0, 30)], seed=1)}, True),
        # Covered before, and by the fitted ones no more: what they were not fitted to must not lose.
        ({"train": small, "validation": make_table([(230.0, 1.0, 30)], seed=1)}, False),
        ({"train": small, "validation": make_table([])}, True),
        ({"train": make_table([]), "validation": small}, False),
        ({"train": make_table([(230.0, 1.0, 50)])}, False),
    ):
        fitted, is_better = fit_to_splits(tables, start)
        assert is_better is expected
        assert (fitted == start) == (len(tables["train"].rows) == 0)


def test_crowd_regions_are_not_fitted_to():
    table = make_table([(300.0, 1.0, 200), (40.0, 1.0, 100)], num_crowds=200)
    assert len(boxes_of(table)[0]) == 100
    [sizes] = fit_to_splits({"train": table}, AnchorSetting((8,), ((200.0,),), (1.0,)))[0].anchor_sizes
    assert sizes == pytest.approx((40.0,), rel=0.05)


def test_planted_ratios_are_recovered():
    boxes, sizes = clusters([(60.0, 0.4, 100), (60.0, 2.5, 100)])
    fitted = fit_anchors(boxes, sizes, AnchorSetting((8,), ((60.0,),), (1.0, 1.1)))
    assert fitted.aspect_ratios == pytest.approx((0.4, 2.5), rel=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_a_fit_is_never_worse_than_its_start(seed):
    boxes, sizes = random_objects(300, seed, sides=(4.0, 380.0))
    for start in (RETINANET, AnchorSetting((8, 16, 32), ((24.0,), (56.0,), (112.0,)), (1.0,))):
        fitted = fit_anchors(boxes, sizes, start)
        old, new = (coverage(best_anchor_ious(boxes, sizes, setting)[0]) for setting in (start, fitted))
        assert new["covered"] >= old["covered"] - 0.001
        assert [len(level) for level in fitted.anchor_sizes] == [len(level) for level in start.anchor_sizes]
        assert len(fitted.aspect_ratios) == len(start.aspect_ratios)


def test_the_same_seed_gives_the_same_anchors(monkeypatch):
    monkeypatch.setattr("dit_detection.anchor_fit.MAX_FITTED", 100)
    boxes, sizes = random_objects(300, seed=3)
    assert fit_anchors(boxes, sizes, RETINANET, seed=5) == fit_anchors(boxes, sizes, RETINANET, seed=5)


@pytest.mark.parametrize("count", [1, 40])
def test_one_object_or_equal_ones(count):
    boxes = torch.tensor([[100.0, 120.0, 230.0, 170.0]]).repeat(count, 1)
    sizes = torch.full((count, 2), 512)
    fitted = fit_anchors(boxes, sizes, AnchorSetting((8, 16, 32), ((24.0,), (56.0,), (112.0,)), (1.0,)))
    ious, _ = best_anchor_ious(boxes, sizes, fitted)
    assert ious.min() > 0.85
    assert DiTDetectionConfig(**fitted.to_overrides()).num_anchors_per_cell == 1
    assert all(math.isfinite(size) for level in fitted.anchor_sizes for size in level)


def test_without_objects_the_setting_stays():
    assert fit_anchors(*NONE, RETINANET) is RETINANET
    assert len(best_anchor_ious(*NONE, RETINANET)[0]) == 0


def test_overrides_make_the_same_configuration_again():
    config = DiTDetectionConfig(strides=[16, 32], anchor_sizes=[[20, 31.25], [80, 100]], aspect_ratios=[0.5, 1.5])
    overrides = AnchorSetting.from_config(config).to_overrides()
    again = DiTDetectionConfig(**overrides)
    assert (again.strides, again.anchor_sizes, again.aspect_ratios) == (
        config.strides,
        config.anchor_sizes,
        config.aspect_ratios,
    )
