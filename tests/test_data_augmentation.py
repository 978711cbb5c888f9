import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from dit_detection.data import DetectionAugmentation, DetectionTarget
from dit_detection.data.augmentation import MID_GREY, _jitter_colour, _zoom_in, _zoom_out
from dit_detection.data.mosaic import MARGIN, MAX_PASTED, copy_paste, mosaic
from dit_detection.data.target import Sample, crop

FLIP_ALWAYS = {"horizontal_flip": 1.0, "scale_probability": 0.0, "photometric": 0.0}


def make_target(boxes: list, height: int, width: int, iscrowd: list[int] | None = None) -> DetectionTarget:
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    sides = corners[:, 2:] - corners[:, :2]
    return {
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width)),
        "category": torch.arange(len(corners)),
        "area": sides.prod(dim=1),
        "iscrowd": torch.tensor(iscrowd or [0] * len(corners), dtype=torch.int64),
        "visible": torch.ones(len(corners)),
    }


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_image(height: int, width: int) -> tv_tensors.Image:
    return tv_tensors.Image(torch.randint(0, 256, (3, height, width), dtype=torch.uint8))


@st.composite
def images_with_boxes(draw: st.DrawFn) -> tuple[int, int, list[list[float]]]:
    height, width = draw(st.integers(8, 90)), draw(st.integers(8, 90))
    boxes = []
    for _ in range(draw(st.integers(0, 5))):
        x, y = draw(st.integers(0, width - 3)), draw(st.integers(0, height - 3))
        boxes.append([x, y, draw(st.integers(x + 3, width)), draw(st.integers(y + 3, height))])
    return height, width, boxes


@st.composite
def samples(draw: st.DrawFn, first_category: int = 0) -> Sample:
    """Any image and boxes: floating-point corners, thin boxes, overlaps, crowd regions, none at all."""
    height, width = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    fractions = st.floats(0, 1, width=32)
    boxes = []
    for _ in range(draw(st.integers(0, 4))):
        x, y, w, h = (draw(fractions) for _ in range(4))
        x, y = x * (width - 0.5), y * (height - 0.5)
        boxes.append([x, y, x + max(0.4, w * (width - x)), y + max(0.4, h * (height - y))])
    target = make_target(boxes, height, width, draw(st.lists(st.integers(0, 1), min_size=4, max_size=4))[: len(boxes)])
    target["category"] += first_category
    return make_image(height, width), target


@st.composite
def augmentations(draw: st.DrawFn) -> DetectionAugmentation:
    names = ("horizontal_flip", "vertical_flip", "scale_probability", "photometric", "mosaic", "copy_paste")
    shares = {name: draw(st.sampled_from([0.0, 0.5, 1.0])) for name in (*names, "min_visible")}
    scale = sorted(draw(st.tuples(st.floats(0.3, 3), st.floats(0.3, 3))))
    return DetectionAugmentation(scale=(scale[0], scale[1]), min_side=draw(st.sampled_from([0.1, 1, 5])), **shares)


@settings(max_examples=50, deadline=None)
@given(
    sample=samples(),
    others=st.tuples(samples(10), samples(20), samples(30)),
    augmentation=augmentations(),
    seed=st.integers(0, 2**31),
)
def test_objects_stay_inside_whole_and_aligned(
    sample: Sample, others: tuple[Sample, ...], augmentation: DetectionAugmentation, seed: int
) -> None:
    iscrowd = {}
    for _, target in (sample, *others):
        iscrowd |= dict(zip(target["category"].tolist(), target["iscrowd"].tolist(), strict=True))

    def draw_other(generator: torch.Generator) -> Sample:
        return others[int(torch.randint(3, (), generator=generator))]

    image, target = augmentation(*sample, seeded(seed), draw_other)
    assert image.dtype == torch.uint8
    height, width = image.shape[-2:]
    boxes = target["boxes"].as_subclass(torch.Tensor)
    assert target["boxes"].canvas_size == (height, width)
    assert boxes.isfinite().all()
    assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    assert ((sides >= augmentation.min_side).all(dim=1) | (target["visible"] == 1)).all()
    assert {len(values) for values in target.values()} == {len(boxes)}
    assert [iscrowd[category] for category in target["category"].tolist()] == target["iscrowd"].tolist()
    assert ((target["visible"] >= augmentation.min_visible) | (target["iscrowd"] == 1)).all()
    # All areas were those of the boxes; what is pasted over an object leaves less.
    assert (target["area"] > 0).all()
    assert (target["area"] <= sides.prod(dim=1) * 1.001 + 1e-3).all()
    if augmentation.copy_paste == 0:
        torch.testing.assert_close(target["area"], sides.prod(dim=1), rtol=1e-3, atol=1e-2)


@settings(max_examples=50, deadline=None)
@given(case=images_with_boxes(), seed=st.integers(0, 2**31))
def test_a_box_still_covers_what_was_painted_in_it(case: tuple[int, int, list], seed: int) -> None:
    height, width, boxes = case
    image = tv_tensors.Image(torch.full((3, height, width), MID_GREY, dtype=torch.uint8))
    target = make_target(boxes[:1], height, width)
    for x0, y0, x1, y1 in boxes[:1]:
        image[:, y0:y1, x0:x1] = 255
    augmentation = DetectionAugmentation(vertical_flip=0.5, photometric=0, min_visible=0, min_side=0.5)
    image, augmented = augmentation(image, target, seeded(seed))
    rows, columns = torch.nonzero(image[0] == 255, as_tuple=True)
    painted = []
    if len(rows):
        painted = [[columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]]
    assert augmented["boxes"].tolist() == painted


@settings(max_examples=40, deadline=None)
@given(case=images_with_boxes(), seed=st.integers(0, 2**31))
def test_mosaic_moves_boxes_with_their_pixels(case: tuple[int, int, list], seed: int) -> None:
    height, width, boxes = case
    four = []
    for index in range(4):
        # Nothing is scaled: all images have the size of the first. Each object has a grey level of its own.
        image = tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8))
        target = make_target(boxes[index : index + 1], height, width)
        target["category"] += 10 + index
        for x0, y0, x1, y1 in boxes[index : index + 1]:
            image[:, y0:y1, x0:x1] = 10 + index
        four.append((image, target))
    image, target = mosaic(four, seeded(seed))
    assert image.shape == (3, height, width)
    found = dict(zip(target["category"].tolist(), target["boxes"].tolist(), strict=True))
    for level in range(10, 14):
        rows, columns = torch.nonzero(image[0] == level, as_tuple=True)
        if len(rows):
            expected = [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]
            assert found.pop(level) == expected
    assert not found
    # Drawn by hand: of an image that fills its tile nothing is grey.
    assert not (image == MID_GREY).any()


def test_mosaic_scales_other_sizes_to_the_canvas() -> None:
    first = make_image(40, 40), make_target([], 40, 40)
    # Twice as wide and high: scaled by half, so the whole-image box has sides of at most 40 and a quarter of the area.
    large = tv_tensors.Image(torch.full((3, 80, 80), 7, dtype=torch.uint8)), make_target([[0, 0, 80, 80]], 80, 80)
    image, target = mosaic([first, large, large, large], seeded(1))
    assert image.shape == (3, 40, 40)
    sides = (target["boxes"][:, 2:] - target["boxes"][:, :2]).as_subclass(torch.Tensor)
    torch.testing.assert_close(target["visible"], sides.prod(dim=1) / 1600)
    torch.testing.assert_close(target["area"], sides.prod(dim=1))
    assert (image == 7).all(dim=0).sum() >= sides.prod(dim=1).sum()


@settings(max_examples=40, deadline=None)
@given(case=images_with_boxes(), source_case=images_with_boxes(), seed=st.integers(0, 2**31))
def test_pasted_objects_are_whole_and_cover_what_they_cover(
    case: tuple[int, int, list], source_case: tuple[int, int, list], seed: int
) -> None:
    height, width, boxes = case
    boxes = boxes[:2]
    # Two objects in channels 1 and 2; those of the source, of any number, in channel 0, all on black.
    image = tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8))
    for channel, (x0, y0, x1, y1) in enumerate(boxes, start=1):
        image[channel, y0:y1, x0:x1] = 255
    source_boxes = [box for box in source_case[2] if box[2] <= width and box[3] <= height]
    source = tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8))
    for x0, y0, x1, y1 in source_boxes:
        source[0, y0:y1, x0:x1] = 255
    source_target = make_target(source_boxes, height, width)
    source_target["category"] += 10
    pasted_image, target = copy_paste(
        (image, make_target(boxes, height, width)), (source, source_target), seeded(seed)
    )
    assert target["category"][: len(boxes)].tolist() == list(range(len(boxes)))
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        share = (pasted_image[index + 1] == 255).sum() / ((x1 - x0) * (y1 - y0))
        torch.testing.assert_close(target["visible"][index], share, atol=1e-5, rtol=0)
        assert target["boxes"][index].tolist() == [x0, y0, x1, y1]
    whole = 0
    for index in range(len(boxes), len(target["category"])):
        x0, y0, x1, y1 = target["boxes"][index].int().tolist()
        assert (pasted_image[0, y0:y1, x0:x1] == 255).all()
        whole += target["visible"][index].item() == 1
    small = any(2 * (x1 - x0) <= width and 2 * (y1 - y0) <= height for x0, y0, x1, y1 in source_boxes)
    assert whole >= small
    assert small or torch.equal(pasted_image, image)


def test_a_pasted_object_fades_into_its_surroundings() -> None:
    # White objects of 10 x 10 on white, pasted into black: the box is white, then 4 steps down to black.
    source = tv_tensors.Image(torch.full((3, 60, 60), 250, dtype=torch.uint8))
    black = tv_tensors.Image(torch.zeros(3, 60, 60, dtype=torch.uint8))
    sample, partner = (black, make_target([], 60, 60)), (source, make_target([[20, 20, 30, 30]], 60, 60))
    image, target = copy_paste(sample, partner, seeded(0))
    x0, y0, x1, y1 = target["boxes"][0].int().tolist()
    assert (x1 - x0, y1 - y0) == (10, 10)
    assert (image[:, y0:y1, x0:x1] == 250).all()
    assert image[0, y0, x0 - 6 : x0 + 1].tolist() == [0, 0, 50, 100, 150, 200, 250]
    assert image[0, y1 - 1 : y1 + 6, x0].tolist() == [250, 200, 150, 100, 50, 0, 0]
    assert not black.any()
    assert MARGIN == 4


def test_crowd_regions_and_large_objects_are_not_pasted() -> None:
    boxes = [[0, 0, 10, 10], [0, 0, 31, 10]]
    partner = make_image(60, 60), make_target(boxes, 60, 60, [1, 0])
    sample = make_image(60, 60), make_target([], 60, 60)
    image, target = copy_paste(sample, partner, seeded(0))
    assert torch.equal(image, sample[0]) and not len(target["category"])


def test_no_more_objects_are_pasted_than_said() -> None:
    corners = [[x, y, x + 4, y + 4] for x in range(0, 200, 20) for y in range(0, 200, 20)]
    partner = make_image(200, 200), make_target(corners, 200, 200)
    counts = set()
    for seed in range(40):
        _, target = copy_paste((make_image(200, 200), make_target([], 200, 200)), partner, seeded(seed))
        counts.add(len(target["category"]))
    assert counts == set(range(1, MAX_PASTED + 1))


def test_objects_that_are_covered_too_far_go() -> None:
    # A rectangle of 12 x 12 covers the object or not, by chance; if it stays, at least half of it is visible.
    partner = make_image(30, 30), make_target([[0, 0, 8, 8]], 30, 30)
    kept = set()
    for seed in range(30):
        augmentation = DetectionAugmentation(copy_paste=1, min_visible=0.5, scale_probability=0, photometric=0)
        target = make_target([[10, 10, 20, 20]], 30, 30)
        target["category"] += 5
        _, augmented = augmentation(make_image(30, 30), target, seeded(seed), lambda generator: partner)
        visible = dict(zip(augmented["category"].tolist(), augmented["visible"].tolist(), strict=True))
        assert visible[0] == 1
        kept.add(5 in visible)
        assert visible.get(5, 1) >= 0.5
    assert kept == {True, False}


def test_other_images_are_asked_for_only_where_they_are_needed() -> None:
    image, target = make_image(20, 20), make_target([], 20, 20)
    for name in ("mosaic", "copy_paste"):
        with pytest.raises(ValueError, match="mosaic and copy_paste need other images: give draw_other"):
            DetectionAugmentation(**{name: 0.1})(image, target, seeded(0))
    assert not DetectionAugmentation().needs_other_images


@pytest.mark.parametrize("direction", ["horizontal_flip", "vertical_flip"])
def test_flipping_twice_changes_nothing(direction: str) -> None:
    augmentation = DetectionAugmentation(**{**FLIP_ALWAYS, "horizontal_flip": 0.0, direction: 1.0})
    image, target = make_image(30, 40), make_target([[1, 2, 10, 20], [0, 0, 40, 30]], 30, 40)
    once, flipped = augmentation(image, target, seeded(0))
    twice, restored = augmentation(once, flipped, seeded(0))
    assert not torch.equal(once, image)
    assert torch.equal(twice, image)
    assert torch.equal(restored["boxes"], target["boxes"])
    # By hand, in an image of 40 x 30: x becomes 40 - x, or y becomes 30 - y.
    expected = [30, 2, 39, 20] if direction == "horizontal_flip" else [1, 10, 10, 28]
    assert flipped["boxes"][0].tolist() == expected


def test_a_cut_keeps_what_is_visible_enough() -> None:
    # The left half of an image of 40 x 20 is cut out. Boxes: inside; half visible; a fifth visible; the same as a
    # crowd region; outside.
    boxes = [[2, 2, 8, 8], [16, 4, 24, 14], [18, 0, 28, 10], [18, 0, 28, 10], [30, 5, 38, 15]]
    target = make_target(boxes, 20, 40, [0, 0, 0, 1, 0])
    target["area"] = torch.tensor([20.0, 60, 60, 60, 60])  # of masks, smaller than the boxes
    cut = crop(target, 0, 0, (20, 20))
    assert cut["category"].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(cut["visible"], torch.tensor([1, 0.5, 0.2, 0.2]))
    kept = DetectionAugmentation()._keep_visible(cut)
    assert kept["boxes"].tolist() == [[2, 2, 8, 8], [16, 4, 20, 14], [18, 0, 20, 10]]
    assert kept["category"].tolist() == [0, 1, 3]
    assert kept["area"].tolist() == [20, 30, 12]
    assert kept["iscrowd"].tolist() == [0, 0, 1]
    # A second cut: a quarter of the second object is left, of its half.
    assert crop(cut, 0, 0, (20, 18))["visible"][1] == 0.25


def test_a_small_object_that_nothing_cuts_stays() -> None:
    # Of 32 x 32 pixels, which become 512 x 512 afterwards: a side of 1.5 is 24 there.
    target = make_target([[5, 5, 25, 6.5]], 32, 32)
    kept = [DetectionAugmentation(**FLIP_ALWAYS)(make_image(32, 32), target, seeded(0))[1]]
    kept += [DetectionAugmentation(scale=(0.5, 0.9))(make_image(32, 32), target, seeded(seed))[1] for seed in range(5)]
    assert [len(found["boxes"]) for found in kept] == [1] * 6
    cut = crop(target, 10, 0, (32, 20))
    assert len(cut["boxes"]) == 1 and len(DetectionAugmentation()._keep_visible(cut)["boxes"]) == 0


def test_zoom_sizes_and_canvas() -> None:
    image, target = make_image(30, 40), make_target([[0, 0, 40, 30]], 30, 40)
    cut, _ = _zoom_in(image, target, 2.0, seeded(0))
    assert cut.shape == (3, 15, 20)
    placed, moved = _zoom_out(image, target, 0.5, seeded(0))
    assert placed.shape == (3, 60, 80)
    assert moved["boxes"].canvas_size == (60, 80)
    x0, y0, x1, y1 = (int(value) for value in moved["boxes"][0])
    assert (x1 - x0, y1 - y0) == (40, 30)
    assert torch.equal(placed[:, y0:y1, x0:x1], image)
    placed[:, y0:y1, x0:x1] = MID_GREY
    assert (placed == MID_GREY).all()


def test_image_without_objects() -> None:
    for seed in range(10):
        _, target = DetectionAugmentation()(make_image(20, 30), make_target([], 20, 30), seeded(seed))
        assert target["boxes"].shape == (0, 4)
        assert len(target["category"]) == len(target["area"]) == len(target["iscrowd"]) == 0


def test_image_of_one_pixel() -> None:
    for seed in range(10):
        DetectionAugmentation(scale=(0.1, 10))(make_image(1, 1), make_target([], 1, 1), seeded(seed))


def test_the_same_seed_gives_the_same_result_and_arguments_stay() -> None:
    augmentation = pickle.loads(pickle.dumps(DetectionAugmentation()))
    image, target = make_image(60, 80), make_target([[10, 10, 50, 50], [0, 0, 20, 20]], 60, 80)
    before = image.clone(), target["boxes"].clone(), target["area"].clone()
    results = []
    for seed in (3, 3, 4):
        results.append(augmentation(image, target, seeded(seed)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1]["boxes"], results[1][1]["boxes"])
    assert results[0][0].shape != results[2][0].shape
    assert torch.equal(image, before[0])
    assert torch.equal(target["boxes"], before[1])
    assert torch.equal(target["area"], before[2])


def test_colours_agree_with_torchvision(monkeypatch) -> None:
    image = tv_tensors.Image(torch.randint(60, 190, (3, 24, 24), dtype=torch.uint8))  # far from being cut off
    factors = (1.1, 0.9, 1.2)
    draws = iter([*(factor - 1 for factor in factors), 0.0])
    monkeypatch.setattr("dit_detection.data.augmentation._uniform", lambda low, high, generator: next(draws))
    expected = F.adjust_saturation(image / 255, factors[2])
    expected = F.adjust_contrast(expected, factors[1])
    expected = F.adjust_brightness(expected, factors[0]) * 255
    assert (_jitter_colour(image, 0.2, seeded(0)).float() - expected).abs().max() <= 2


def test_hue_turns_as_in_torchvision(monkeypatch) -> None:
    image = tv_tensors.Image(torch.tensor([200, 100, 100], dtype=torch.uint8).reshape(3, 1, 1))
    draws = iter([0.0, 0.0, 0.0, 0.2])
    monkeypatch.setattr("dit_detection.data.augmentation._uniform", lambda low, high, generator: next(draws))
    expected = F.adjust_hue(image, 0.02)
    assert (_jitter_colour(image, 0.2, seeded(0)).int() - expected.int()).abs().max() <= 8
    grey = tv_tensors.Image(torch.full((3, 2, 2), 90, dtype=torch.uint8))
    draws = iter([0.0, 0.0, 0.0, 0.2])
    assert torch.equal(_jitter_colour(grey, 0.2, seeded(0)), grey)


@pytest.mark.parametrize(
    ("name", "value"),
    [("horizontal_flip", 2), ("photometric", -0.1), ("scale", (2.0, 1.0)), ("min_side", 0), ("mosaic", 1.1)],
)
def test_wrong_arguments(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is "):
        DetectionAugmentation(**{name: value})  # type: ignore[arg-type]
