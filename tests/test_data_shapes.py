import numpy as np
import pytest
from datasets import Image as ImageFeature

from dit_detection.data import class_names_of, draw_shapes_dataset, load_detection_dataset
from dit_detection.data.shapes import MAX_OBJECTS, SHAPES, _place, _rasterise


def test_splits_and_row_format() -> None:
    dataset = draw_shapes_dataset(5, 2, 1, image_size=64)
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 5, "validation": 2, "test": 1}
    assert class_names_of(dataset) == list(SHAPES)
    assert list(load_detection_dataset(dataset)["train"]["objects"]) == list(dataset["train"]["objects"])
    assert list(draw_shapes_dataset(0, 0, 1, image_size=64)) == ["test"]


def test_deterministic_and_a_larger_set_begins_with_the_smaller() -> None:
    def rows(*args: int, seed: int = 0) -> list[dict]:
        train = draw_shapes_dataset(*args, image_size=(48, 80), seed=seed)["train"]
        return train.cast_column("image", ImageFeature(decode=False)).to_list()

    assert rows(3, 0, 0) == rows(3, 1, 0) == rows(6, 0, 0)[:3]
    assert rows(3, 0, 0) != rows(3, 0, 0, seed=1)
    splits = draw_shapes_dataset(1, 1, 0, image_size=64)
    assert splits["train"][0]["image"].tobytes() != splits["validation"][0]["image"].tobytes()


def test_images_are_varied_and_boxes_lie_inside() -> None:
    train = draw_shapes_dataset(120, 0, 0, image_size=(64, 128), seed=3)["train"]
    counts = [len(objects["bbox"]) for objects in train["objects"]]
    assert min(counts) == 0
    assert max(counts) == MAX_OBJECTS
    assert {label for objects in train["objects"] for label in objects["category"]} == set(range(len(SHAPES)))
    relative = []
    for width, height, objects in zip(train["width"], train["height"], train["objects"], strict=True):
        assert 64 <= min(width, height) <= max(width, height) <= 128
        for x, y, w, h in objects["bbox"]:
            assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= width + 1e-9 and y + h <= height + 1e-9
            relative.append(max(w, h) / min(width, height))
    assert min(relative) < 0.1
    assert 0.5 < max(relative) <= 0.61
    assert train[0]["image"].size == (train[0]["width"], train[0]["height"])


@pytest.mark.parametrize("name", SHAPES)
def test_boxes_are_tight_around_what_is_drawn(name: str) -> None:
    size, num_inside = (100, 80), 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        rings = _place(rng, SHAPES[name](rng), size)
        mask, box = _rasterise(rings, size)
        pixels = mask.getbbox()  # whole ones, so up to a pixel larger
        assert np.abs(np.array(box) - pixels).max() < 1
        corners = [*rings[0].min(axis=0), *rings[0].max(axis=0)]
        if min(corners) >= 0 and (rings[0] <= size).all():
            num_inside += 1
            np.testing.assert_allclose(box, corners, atol=0.5)
    assert num_inside > 5


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="ask for at least one image"):
        draw_shapes_dataset(0, 0, 0)
    with pytest.raises(ValueError, match="image_size is 8"):
        draw_shapes_dataset(1, image_size=8)
