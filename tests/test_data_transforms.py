import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_folder import coco_content, write_coco
from PIL import Image
from torch.utils.data import DataLoader
from transformers import DetrImageProcessor

from dit_detection.data import (
    DetectionAugmentation,
    DetectionTransform,
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
    row = DetectionTransform(make_processor()).attach(dataset)[1]
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

    rows = DetectionTransform(image_processor).attach(load_detection_dataset(write_coco(tmp_path))["train"])[:2]
    assert set(rows) == {"pixel_values", "labels"}
    assert calls[0]["images"][1].shape == (3, 30, 40)
    assert calls[0]["images"][1].dtype == torch.uint8
    assert calls[0]["annotations"][1] == {
        "image_id": 9,
        "annotations": [
            {"image_id": 9, "category_id": 1, "iscrowd": 0, "area": 80, "bbox": [1, 2, 10, 8]},
            {"image_id": 9, "category_id": 0, "iscrowd": 1, "area": 50.5, "bbox": [30, 20, 10, 10]},
        ],
    }


def test_batches_with_augmentation_from_workers() -> None:
    dataset = draw_shapes_dataset(6, 0, 0, image_size=(40, 70), seed=1)["train"]
    transform = pickle.loads(pickle.dumps(DetectionTransform(make_processor(), DetectionAugmentation())))
    batches = []
    for num_workers in (0, 1, 1):
        torch.manual_seed(0)
        loader = DataLoader(transform.attach(dataset), 4, collate_fn=collate_detection, num_workers=num_workers)
        batches.append(list(loader))
    assert [batch["pixel_values"].shape for batch in batches[0]] == [(4, 3, 64, 64), (2, 3, 64, 64)]
    assert [batch["pixel_mask"].shape for batch in batches[0]] == [(4, 64, 64), (2, 64, 64)]
    assert [len(batch["labels"]) for batch in batches[0]] == [4, 2]
    assert torch.equal(batches[1][0]["pixel_values"], batches[2][0]["pixel_values"])


def test_without_augmentation_two_reads_are_equal() -> None:
    rows = DetectionTransform(make_processor()).attach(draw_shapes_dataset(1, 0, 0, image_size=64)["train"])
    assert torch.equal(rows[0]["pixel_values"], rows[0]["pixel_values"])


def test_decoded_images_give_the_same() -> None:
    dataset = draw_shapes_dataset(2, 0, 0, image_size=64)["train"]
    transform = DetectionTransform(make_processor())
    attached, plain = transform.attach(dataset), dataset.with_transform(transform)
    assert torch.equal(attached[1]["pixel_values"], plain[1]["pixel_values"])


def test_broken_image_is_named(tmp_path: Path) -> None:
    rows = DetectionTransform(make_processor()).attach(load_detection_dataset(write_coco(tmp_path))["train"])
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
    transform = DetectionTransform(make_processor())
    with pytest.raises(ValueError, match=r"a\.png' \(image_id 7\) .* it is 20 x 30 pixels, but annotated as 40 x 30"):
        transform.attach(dataset)[0]
    with pytest.raises(ValueError, match=r"image_id 7.* use `transform.attach\(dataset\)` instead"):
        dataset.with_transform(transform)[0]


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
    transform = DetectionTransform(processor)
    dataset = load_detection_dataset(tmp_path)["train"]
    red = transform.attach(dataset)[0]["pixel_values"][0]
    if as_seen:
        assert (red[:20] == 1).all() and (red[20:] == 0).all()
        assert torch.equal(dataset.with_transform(transform)[0]["pixel_values"][0], red)
    else:
        assert (red[:, :20] == 1).all() and (red[:, 20:] == 0).all()
        with pytest.raises(ValueError, match="annotated as 40 x 30; if its EXIF orientation turned it"):
            dataset.with_transform(transform)[0]


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
    rows = DetectionTransform(make_processor(), DetectionAugmentation()).attach(
        load_detection_dataset(tmp_path)["train"]
    )
    assert rows[1]["pixel_values"].shape == (3, 64, 64)


def test_collator_without_mask() -> None:
    features = [{"pixel_values": torch.zeros(3, 4, 4), "labels": {"image_id": index}} for index in range(2)]
    batch = collate_detection(features)
    assert set(batch) == {"pixel_values", "labels"}
    assert batch["labels"] == [{"image_id": 0}, {"image_id": 1}]


def test_collator_refuses_different_sizes() -> None:
    features = [{"pixel_values": torch.zeros(3, 4, side), "labels": {}} for side in (4, 6)]
    with pytest.raises(ValueError, match=r"shapes: \[\(3, 4, 4\), \(3, 4, 6\)\]. Let the image processor pad"):
        collate_detection(features)
