import pickle
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from coco_folder import coco_content, write_coco
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from transformers import DetrImageProcessor

from dit_detection import DiTDetectionImageProcessor, DiTObjectDetectionOutput
from dit_detection.data import (
    DetectionAugmentation,
    DetectionDataset,
    DetectionIterableDataset,
    collate_detection,
    draw_shapes_dataset,
    load_detection_dataset,
)
from dit_detection.data.image_reading import to_rgb

CANVAS = {"height": 64, "width": 64}


def make_processor() -> DetrImageProcessor:
    return DetrImageProcessor(size={"max_height": 64, "max_width": 64}, do_pad=True, pad_size=CANVAS)


def test_labels_follow_the_rows(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][2]["iscrowd"] = 0  # DETR leaves crowd regions out
    dataset = load_detection_dataset(write_coco(tmp_path, content))["train"]
    row = DetectionDataset(dataset, make_processor())[1]
    assert set(row) == {"pixel_values", "pixel_mask", "labels"}
    assert row["pixel_values"].shape == (3, 64, 64)
    assert row["labels"]["image_id"].tolist() == [9]
    assert row["labels"]["class_labels"].tolist() == [1, 0]
    assert row["labels"]["orig_size"].tolist() == [30, 40]
    # The image of 40 x 30 becomes 64 x 48, a factor of 1.6, on a canvas of 64 x 64; DETR divides by the canvas.
    expected = torch.tensor([[6, 6, 10, 8], [35, 25, 10, 10]]) * 1.6 / 64
    torch.testing.assert_close(row["labels"]["boxes"], expected)


def test_what_the_image_processor_is_given(tmp_path: Path) -> None:
    calls = []

    def image_processor(**kwargs: Any) -> dict[str, Any]:
        calls.append(kwargs)
        return {"pixel_values": torch.stack(kwargs["images"]), "labels": kwargs["annotations"]}

    entry = DetectionDataset(load_detection_dataset(write_coco(tmp_path))["train"], image_processor)[1]
    assert set(entry) == {"pixel_values", "labels"}
    assert calls[0]["images"][0].shape == (3, 30, 40)
    assert calls[0]["images"][0].dtype == torch.uint8
    assert calls[0]["annotations"][0] == {
        "image_id": 9,
        "annotations": [
            {"image_id": 9, "category_id": 1, "iscrowd": 0, "area": 80, "bbox": [1, 2, 10, 8]},
            {"image_id": 9, "category_id": 0, "iscrowd": 1, "area": 50.5, "bbox": [30, 20, 10, 10]},
        ],
    }


def shapes(num_images: int) -> datasets.Dataset:
    return draw_shapes_dataset(num_images, 0, 0, image_size=(40, 70), seed=1)["train"]


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys() == {"pixel_values", "pixel_mask", "labels"}
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert torch.equal(first["pixel_mask"], second["pixel_mask"])
    assert first["labels"].keys() == second["labels"].keys()
    assert all(torch.equal(first["labels"][name], second["labels"][name]) for name in first["labels"])


def test_batches_have_the_shapes_of_the_canvas() -> None:
    dataset = DetectionDataset(shapes(6), make_processor(), DetectionAugmentation())
    batches = list(DataLoader(dataset, 4, collate_fn=collate_detection))
    assert [batch["pixel_values"].shape for batch in batches] == [(4, 3, 64, 64), (2, 3, 64, 64)]
    assert [batch["pixel_mask"].shape for batch in batches] == [(4, 64, 64), (2, 64, 64)]
    assert [len(batch["labels"]) for batch in batches] == [4, 2]


@pytest.mark.parametrize("others", [0.0, 0.5])
def test_an_entry_depends_on_seed_view_and_index_alone(others: float) -> None:
    rows = shapes(5)

    def make(seed: int) -> DetectionDataset:
        augmentation = DetectionAugmentation(mosaic=others, copy_paste=others)
        return DetectionDataset(rows, make_processor(), augmentation, seed=seed)

    dataset = make(3)
    expected = {(view, index): dataset.get_view(index, view) for view in (0, 1, 7) for index in range(5)}
    torch.manual_seed(123)
    other = pickle.loads(pickle.dumps(make(3)))
    for view, index in reversed(expected):
        assert_same(other.get_view(index, view), expected[view, index])
        other.set_epoch(view)
        assert_same(other[index], expected[view, index])
        assert_same(other.__getitems__([4, index])[1], expected[view, index])
    # Every view and every index has draws of its own, and so has every seed.
    assert len({entry["pixel_values"].numpy().tobytes() for entry in expected.values()}) == 15
    assert not torch.equal(make(4).get_view(0, 0)["pixel_values"], expected[0, 0]["pixel_values"])
    assert_same(dataset[-1], dataset[4])
    with pytest.raises(IndexError):
        dataset[5]


def test_threads_do_not_change_an_entry() -> None:
    rows = draw_shapes_dataset(4, 0, 0, image_size=(480, 640))["train"]
    dataset = DetectionDataset(rows, make_processor(), DetectionAugmentation())
    expected = [dataset[index] for index in range(4)]
    torch.set_num_threads(3)
    try:
        for index in range(4):
            assert_same(dataset[index], expected[index])
    finally:
        torch.set_num_threads(1)


# Spawned workers import everything anew, which takes half a minute.
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_workers_that_stay_hear_of_the_next_epoch(context: str) -> None:
    dataset = DetectionDataset(shapes(5), make_processor(), DetectionAugmentation(), seed=2)
    # Pickled once before: that must not put the epoch out of the workers' reach.
    copied = pickle.loads(pickle.dumps(dataset))
    loader = DataLoader(
        copied, 2, collate_fn=list, num_workers=2, persistent_workers=True, multiprocessing_context=context
    )
    for epoch in (0, 3):
        copied.set_epoch(epoch)
        entries = [entry for batch in loader for entry in batch]
        for index, entry in enumerate(entries):
            assert_same(entry, dataset.get_view(index, epoch))


def test_views_come_round() -> None:
    dataset = DetectionDataset(shapes(1), make_processor(), DetectionAugmentation(), num_views=2)
    dataset.set_epoch(5)
    assert dataset.view == 1
    assert_same(dataset[0], dataset.get_view(0, 1))
    assert not torch.equal(dataset[0]["pixel_values"], dataset.get_view(0, 0)["pixel_values"])


def test_without_augmentation_all_views_are_equal() -> None:
    dataset = DetectionDataset(shapes(1), make_processor())
    assert_same(dataset.get_view(0, 0), dataset.get_view(0, 9))


@pytest.mark.parametrize(("name", "value"), [("num_views", 0), ("seed", -1)])
def test_wrong_arguments(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        DetectionDataset(shapes(1), make_processor(), **{name: value})


def entries_by_id(loader: Any) -> dict[int, dict[str, Any]]:
    entries = list(loader)
    by_id = {int(entry["labels"]["image_id"]): entry for entry in entries}
    assert len(by_id) == len(entries), "a row came twice"
    return by_id


def test_streamed_rows_come_once_and_alike_for_any_number_of_workers() -> None:
    rows = shapes(7)
    make = partial(DetectionIterableDataset, image_processor=make_processor(), seed=4)
    plain = entries_by_id(make(rows.to_iterable_dataset()))
    assert set(plain) == set(rows["image_id"])
    for index, entry in enumerate(DetectionDataset(rows, make_processor())):
        assert_same(plain[rows[index]["image_id"]], entry)

    epochs = []
    for num_workers in (0, 2):
        dataset = make(rows.to_iterable_dataset(num_shards=3).shuffle(0), augmentation=DetectionAugmentation())
        options = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
        loader = DataLoader(dataset, batch_size=None, collate_fn=lambda entry: entry, **options)
        for epoch in (0, 1):
            dataset.set_epoch(epoch)
            epochs.append(entries_by_id(loader))
    for image_id in plain:
        assert_same(epochs[0][image_id], epochs[2][image_id])
        assert_same(epochs[1][image_id], epochs[3][image_id])
        assert not torch.equal(epochs[0][image_id]["pixel_values"], epochs[1][image_id]["pixel_values"])
    assert list(epochs[0]) != list(epochs[1])  # the rows' own shuffle follows


def test_broken_image_is_named(tmp_path: Path) -> None:
    rows = DetectionDataset(load_detection_dataset(write_coco(tmp_path))["train"], make_processor())
    file = tmp_path / "images" / "b.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"b\.png' \(image_id 9\) cannot be used: .*truncated.* Repair or remove it"):
        rows[1]
    file.unlink()
    with pytest.raises(ValueError, match=r"b\.png' \(image_id 9\) cannot be used: .*No such file"):
        rows[1]
    assert rows[0]["labels"]["image_id"].tolist() == [7]


def test_image_that_changed_its_size_is_named(tmp_path: Path) -> None:
    dataset = load_detection_dataset(write_coco(tmp_path))["train"]
    Image.new("RGB", (20, 30)).save(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match=r"a\.png' \(image_id 7\) .* it is 20 x 30 pixels, but annotated as 40 x 30"):
        DetectionDataset(dataset, make_processor())[0]


@pytest.mark.parametrize("as_seen", [True, False])
def test_exif_orientation_follows_the_annotation(tmp_path: Path, as_seen: bool) -> None:
    # Stored 40 x 30 with a red left half. Orientation 6 turns it clockwise: seen as 30 x 40 with a red upper half.
    content = coco_content()
    content["images"] = [
        {"id": 9, "file_name": "a.png", "width": 30, "height": 40} if as_seen else content["images"][1]
    ]
    content["images"][0]["file_name"] = "a.png"
    content["annotations"] = content["annotations"][:1]
    write_coco(tmp_path, content)
    pixels = np.zeros((30, 40, 3), dtype=np.uint8)
    pixels[:, :20, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png", exif=exif)
    processor = DetrImageProcessor(do_resize=False, do_pad=False, do_normalize=False)
    red = DetectionDataset(load_detection_dataset(tmp_path)["train"], processor)[0]["pixel_values"][0]
    if as_seen:
        assert (red[:20] == 1).all() and (red[20:] == 0).all()
    else:
        assert (red[:, :20] == 1).all() and (red[:, 20:] == 0).all()


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("L", (2, 2), 77), (77, 77, 77)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("LA", (2, 2), (77, 0)), (77, 77, 77)),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 0)), (10, 20, 30)),
        (Image.new("RGB", (2, 2), (10, 200, 30)).quantize(4), (10, 200, 30)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.fromarray(np.full((2, 2), 0x8080, dtype=np.uint16)), (128, 128, 128)),
        (Image.fromarray(np.full((2, 2), 65535, dtype=np.int32)), (255, 255, 255)),
        (Image.fromarray(np.array([[0.0, 4], [2, 4]], dtype=np.float32)), (0, 0, 0)),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_every_mode_becomes_rgb(image: Image.Image, colour: tuple[int, int, int]) -> None:
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    assert converted.getpixel((0, 0)) == colour


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("LA", "png"), ("I;16", "png")]
)
def test_every_mode_goes_through(tmp_path: Path, mode: str, suffix: str) -> None:
    content = coco_content()
    for image in content["images"]:
        image["file_name"] = f"a.{suffix}"
    write_coco(tmp_path, content)
    image = Image.new("I;16", (40, 30)) if mode == "I;16" else Image.new("RGB", (40, 30), (200, 50, 90)).convert(mode)
    image.save(tmp_path / "images" / f"a.{suffix}")
    rows = DetectionDataset(load_detection_dataset(tmp_path)["train"], make_processor(), DetectionAugmentation())
    assert rows[1]["pixel_values"].shape == (3, 64, 64)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 2500), st.integers(1, 40)),
    is_wide=st.booleans(),
    canvas=st.tuples(st.integers(16, 700), st.integers(16, 60)),
    fractions=st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 4), max_size=5),
)
def test_boxes_come_back_from_the_canvas(
    size: tuple[int, int], is_wide: bool, canvas: tuple[int, int], fractions: list[tuple[float, ...]]
) -> None:
    width, height = size if is_wide else size[::-1]
    boxes = [
        (x * (width - 0.5), y * (height - 0.5), max(0.4, w * width * (1 - x)), max(0.4, h * height * (1 - y)))
        for x, y, w, h in fractions
    ]
    image_processor = DiTDetectionImageProcessor(size={"max_height": canvas[0], "max_width": canvas[1]})
    objects = [{"bbox": box, "category_id": 0, "area": 1.0, "iscrowd": 0} for box in boxes]
    encoded = image_processor(
        images=[torch.zeros(3, height, width, dtype=torch.uint8)],
        annotations=[{"image_id": 1, "annotations": objects}],
        input_data_format="channels_first",
        return_tensors="pt",
    )
    labels = encoded["labels"][0]
    assert labels["orig_size"].tolist() == [height, width]
    # A model that sees exactly these boxes, best first.
    logits = torch.linspace(9, 5, len(boxes)).reshape(1, -1, 1)
    outputs = DiTObjectDetectionOutput(logits=logits, pred_boxes=labels["boxes"][None])
    found = image_processor.post_process_object_detection(outputs, 0.1, labels["orig_size"][None], nms_threshold=1.0)
    expected = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    expected[:, 2:] = torch.minimum(expected[:, :2] + expected[:, 2:], torch.tensor([width, height]))
    assert found[0]["boxes"].shape == expected.shape
    assert ((found[0]["boxes"] - expected).abs() < 0.5).all()
    # What of the canvas the image covers, a mask tells, and both agree on it.
    assert encoded["pixel_mask"][0].any(dim=1).sum() == labels["size"][0]
    assert encoded["pixel_mask"][0].any(dim=0).sum() == labels["size"][1]


def test_a_stream_refuses_what_needs_other_images() -> None:
    stream = shapes(1).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"mosaic=0.5 and copy_paste=0.0, .* Set both to 0, or do without streaming"):
        DetectionIterableDataset(stream, make_processor(), DetectionAugmentation(mosaic=0.5))


def test_collator_without_mask() -> None:
    features = [{"pixel_values": torch.zeros(3, 4, 4), "labels": {"image_id": index}} for index in range(2)]
    batch = collate_detection(features)
    assert set(batch) == {"pixel_values", "labels"}
    assert batch["labels"] == [{"image_id": 0}, {"image_id": 1}]


def test_collator_refuses_different_sizes() -> None:
    features = [{"pixel_values": torch.zeros(3, 4, side), "labels": {}} for side in (4, 6)]
    with pytest.raises(ValueError, match=r"shapes: \[\(3, 4, 4\), \(3, 4, 6\)\]. Let the image processor pad"):
        collate_detection(features)
