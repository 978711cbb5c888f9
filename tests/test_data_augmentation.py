import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from dit_detection.data import DetectionAugmentation, DetectionTarget
from dit_detection.data.augmentation import MID_GREY, _jitter_colour, _zoom_in, _zoom_out

FLIP_ALWAYS = {"horizontal_flip": 1.0, "scale_probability": 0.0, "photometric": 0.0}


def make_target(boxes: list, height: int, width: int, iscrowd: list[int] | None = None) -> DetectionTarget:
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    sides = corners[:, 2:] - corners[:, :2]
    return {
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width)),
        "category": torch.arange(len(corners)),
        "area": sides.prod(dim=1),
        "iscrowd": torch.tensor(iscrowd or [0] * len(corners), dtype=torch.int64),
    }


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


@settings(max_examples=150, deadline=None)
@given(case=images_with_boxes(), seed=st.integers(0, 2**31), crowd=st.booleans())
def test_objects_stay_inside_and_aligned(case: tuple[int, int, list], seed: int, crowd: bool) -> None:
    height, width, boxes = case
    torch.manual_seed(seed)
    target = make_target(boxes, height, width, [int(crowd)] * len(boxes))
    image, augmented = DetectionAugmentation(vertical_flip=0.5)(make_image(height, width), target)
    assert image.dtype == torch.uint8
    new_height, new_width = image.shape[-2:]
    new_boxes = augmented["boxes"]
    assert tuple(new_boxes.canvas_size) == (new_height, new_width)
    assert (new_boxes >= 0).all()
    assert (new_boxes <= torch.tensor([new_width, new_height] * 2)).all()
    sides = (new_boxes[:, 2:] - new_boxes[:, :2]).as_subclass(torch.Tensor)
    assert (sides >= 2).all()
    assert len(new_boxes) == len(augmented["category"]) == len(augmented["area"]) == len(augmented["iscrowd"])
    torch.testing.assert_close(augmented["area"], sides.prod(dim=1), rtol=1e-4, atol=1e-3)  # all areas were the boxes'
    if not crowd:
        assert (augmented["area"] >= 0.2499 * target["area"][augmented["category"]]).all()


@settings(max_examples=100, deadline=None)
@given(case=images_with_boxes(), seed=st.integers(0, 2**31))
def test_a_box_still_covers_what_was_painted_in_it(case: tuple[int, int, list], seed: int) -> None:
    height, width, boxes = case
    image = tv_tensors.Image(torch.full((3, height, width), MID_GREY, dtype=torch.uint8))
    target = make_target(boxes[:1], height, width)
    for x0, y0, x1, y1 in boxes[:1]:
        image[:, y0:y1, x0:x1] = 255
    torch.manual_seed(seed)
    image, augmented = DetectionAugmentation(vertical_flip=0.5, photometric=0, min_visible=0, min_side=0.5)(
        image, target
    )
    rows, columns = torch.nonzero(image[0] == 255, as_tuple=True)
    painted = []
    if len(rows):
        painted = [[columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]]
    assert augmented["boxes"].tolist() == painted


@pytest.mark.parametrize("direction", ["horizontal_flip", "vertical_flip"])
def test_flipping_twice_changes_nothing(direction: str) -> None:
    augmentation = DetectionAugmentation(**{**FLIP_ALWAYS, "horizontal_flip": 0.0, direction: 1.0})
    image, target = make_image(30, 40), make_target([[1, 2, 10, 20], [0, 0, 40, 30]], 30, 40)
    once, flipped = augmentation(image, target)
    twice, restored = augmentation(once, flipped)
    assert not torch.equal(once, image)
    assert torch.equal(twice, image)
    assert torch.equal(restored["boxes"], target["boxes"])
    # By hand, in an image of 40 x 30: x becomes 40 - x, or y becomes 30 - y.
    expected = [30, 2, 39, 20] if direction == "horizontal_flip" else [1, 10, 10, 28]
    assert flipped["boxes"][0].tolist() == expected


def test_zoom_in_keeps_what_is_visible_enough() -> None:
    # The left half of an image of 40 x 20 is cut out. Boxes: inside; half visible; a fifth visible; the same as a
    # crowd region; outside.
    boxes = [[2, 2, 8, 8], [16, 4, 24, 14], [18, 0, 28, 10], [18, 0, 28, 10], [30, 5, 38, 15]]
    target = make_target(boxes, 20, 40, [0, 0, 0, 1, 0])
    target["area"] = torch.tensor([20.0, 60, 60, 60, 60])  # of masks, smaller than the boxes
    shifted = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(20, 20))
    kept = DetectionAugmentation()._clip(shifted, target)
    assert kept["boxes"].tolist() == [[2, 2, 8, 8], [16, 4, 20, 14], [18, 0, 20, 10]]
    assert kept["category"].tolist() == [0, 1, 3]
    assert kept["area"].tolist() == [20, 30, 12]
    assert kept["iscrowd"].tolist() == [0, 0, 1]


def test_zoom_sizes_and_canvas() -> None:
    image, target = make_image(30, 40), make_target([[0, 0, 40, 30]], 30, 40)
    cut, _ = _zoom_in(image, target["boxes"], 2.0)
    assert cut.shape == (3, 15, 20)
    placed, boxes = _zoom_out(image, target["boxes"], 0.5)
    assert placed.shape == (3, 60, 80)
    x0, y0, x1, y1 = (int(value) for value in boxes[0])
    assert (x1 - x0, y1 - y0) == (40, 30)
    assert torch.equal(placed[:, y0:y1, x0:x1], image)
    placed[:, y0:y1, x0:x1] = MID_GREY
    assert (placed == MID_GREY).all()


def test_image_without_objects() -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        _, target = DetectionAugmentation()(make_image(20, 30), make_target([], 20, 30))
        assert target["boxes"].shape == (0, 4)
        assert len(target["category"]) == len(target["area"]) == len(target["iscrowd"]) == 0


def test_image_of_one_pixel() -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        DetectionAugmentation(scale=(0.1, 10))(make_image(1, 1), make_target([], 1, 1))


def test_the_same_seed_gives_the_same_result_and_arguments_stay() -> None:
    augmentation = pickle.loads(pickle.dumps(DetectionAugmentation()))
    image, target = make_image(60, 80), make_target([[10, 10, 50, 50], [0, 0, 20, 20]], 60, 80)
    before = image.clone(), target["boxes"].clone(), target["area"].clone()
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(augmentation(image, target))
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
    monkeypatch.setattr("dit_detection.data.augmentation._uniform", lambda low, high: next(draws))
    expected = F.adjust_saturation(image / 255, factors[2])
    expected = F.adjust_contrast(expected, factors[1])
    expected = F.adjust_brightness(expected, factors[0]) * 255
    assert (_jitter_colour(image, 0.2).float() - expected).abs().max() <= 2


def test_hue_turns_as_in_torchvision(monkeypatch) -> None:
    image = tv_tensors.Image(torch.tensor([200, 100, 100], dtype=torch.uint8).reshape(3, 1, 1))
    draws = iter([0.0, 0.0, 0.0, 0.2])
    monkeypatch.setattr("dit_detection.data.augmentation._uniform", lambda low, high: next(draws))
    expected = F.adjust_hue(image, 0.02)
    assert (_jitter_colour(image, 0.2).int() - expected.int()).abs().max() <= 8
    grey = tv_tensors.Image(torch.full((3, 2, 2), 90, dtype=torch.uint8))
    draws = iter([0.0, 0.0, 0.0, 0.2])
    assert torch.equal(_jitter_colour(grey, 0.2), grey)


@pytest.mark.parametrize(
    ("name", "value"), [("horizontal_flip", 2), ("photometric", -0.1), ("scale", (2.0, 1.0)), ("min_side", 0)]
)
def test_wrong_arguments(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is "):
        DetectionAugmentation(**{name: value})  # type: ignore[arg-type]
