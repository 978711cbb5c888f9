"""What other libraries make of our outputs, run as the examples in `scripts/examples` run it."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
import torch
from PIL import Image

from dit_detection import DiTDetectionConfig, DiTDetectionImageProcessor, DiTForObjectDetection
from dit_detection.commands import predict
from dit_detection.inference.batch_predictor import detect

EXAMPLES = Path(__file__).parents[1] / "scripts" / "examples"


def draw_squares(generator, size, count):
    """Red squares of 10 to 14 pixels on grey noise, apart from each other; their boxes are xyxy."""
    pixels = generator.integers(90, 130, (size, size, 3), dtype=np.uint8)
    boxes = []
    while len(boxes) < count:
        side = int(generator.integers(10, 15))
        left, top = (int(value) for value in generator.integers(0, size - side, 2))
        box = (left, top, left + side, top + side)
        apart = (box[0] > b[2] + 4 or box[2] + 4 < b[0] or box[1] > b[3] + 4 or box[3] + 4 < b[1] for b in boxes)
        if all(apart):
            boxes.append(box)
            pixels[box[1] : box[3], box[0] : box[2]] = (230, 40, 30)
    return Image.fromarray(pixels), boxes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A detector of such squares, trained for three seconds on images of 64 pixels."""
    torch.manual_seed(0)
    config = DiTDetectionConfig(
        in_channels=3,
        patch_size=8,
        pretrained_grid=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        neck_channels=16,
        strides=[8],
        anchor_sizes=[[12]],
        aspect_ratios=[1.0],
        head_channels=[16],
        id2label={0: "square"},
        label2id={"square": 0},
    )
    model, image_processor = DiTForObjectDetection(config).train(), DiTDetectionImageProcessor(size=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = np.random.default_rng(0)
    for _ in range(100):
        drawn = [draw_squares(generator, 64, generator.integers(0, 4)) for _ in range(16)]
        annotations = [
            {
                "image_id": index,
                "annotations": [
                    {"bbox": [left, top, right - left, bottom - top], "category_id": 0}
                    for left, top, right, bottom in boxes
                ],
            }
            for index, (_, boxes) in enumerate(drawn)
        ]
        batch = image_processor([image for image, _ in drawn], annotations=annotations, return_tensors="pt")
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("squares")
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def large_image(tmp_path_factory):
    """An image ten times as wide as the detector's canvas, and its boxes."""
    image, boxes = draw_squares(np.random.default_rng(99), 640, 24)
    path = tmp_path_factory.mktemp("large") / "aerial.png"
    image.save(path)
    return path, np.array(boxes)


def run_example(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def assert_all_found(boxes, expected):
    overlaps = sv.box_iou_batch(expected, np.asarray(boxes))
    assert len(boxes) == len(expected)
    assert (overlaps.max(axis=1) > 0.5).all()


@pytest.mark.slow
def test_tiles_find_what_one_resized_pass_misses(checkpoint, large_image, tmp_path, monkeypatch, capsys):
    path, expected = large_image
    arguments = [checkpoint, path, "--tile", 64, "--overlap", 16, "--output", tmp_path / "found.jpg"]
    names = run_example("tiled_inference.py", monkeypatch, *arguments)
    assert len(names["whole"]) == 0  # a square is one pixel there
    assert_all_found(names["tiled"].xyxy, expected)
    assert set(names["tiled"].data["class_name"]) == {"square"}
    assert "0 objects in the image as a whole, 24 in tiles" in capsys.readouterr().out
    with Image.open(tmp_path / "found.jpg") as picture:
        assert picture.size == (640, 640)


def test_sahi_slices_the_same_image(checkpoint, large_image, tmp_path, monkeypatch):
    path, expected = large_image
    run_example("sahi_inference.py", monkeypatch, checkpoint, path, "--slice", 64, "--output", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    corners = [[x, y, x + width, y + height] for x, y, width, height in (entry["bbox"] for entry in found)]
    assert_all_found(corners, expected)
    assert all(0.3 <= entry["score"] < 1 and entry["category_name"] == "square" for entry in found)


@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_supervision_takes_what_post_processing_gives(checkpoint, threshold):
    image, boxes = draw_squares(np.random.default_rng(5), 64, 3)
    model = DiTForObjectDetection.from_pretrained(checkpoint)
    image_processor = DiTDetectionImageProcessor.from_pretrained(checkpoint)
    [result] = detect(model, image_processor, [image], threshold)
    detections = sv.Detections.from_transformers(result, id2label=model.config.id2label)
    assert np.array_equal(detections.xyxy, result["boxes"].numpy())
    assert np.array_equal(detections.confidence, result["scores"].numpy())
    assert np.array_equal(detections.class_id, result["labels"].numpy())
    if threshold < 1:
        assert_all_found(detections.xyxy, np.array(boxes))
    else:
        assert len(detections) == 0


def test_coco_predictions_are_read_back_by_supervision(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    expected = {}
    for index, count in enumerate((3, 0, 2)):
        image, boxes = draw_squares(np.random.default_rng(index), 64, count)
        image.save(f"images/{index}.png")
        expected[f"images/{index}.png"] = np.array(boxes)
    predict.main([str(checkpoint), "images", "--output_dir", "out", "--format", "coco", "--num_workers", "0"])
    dataset = sv.DetectionDataset.from_coco(".", "out/coco.json")
    assert dataset.classes == ["square"]
    found = {str(Path(path).resolve().relative_to(tmp_path.resolve())): detections for path, _, detections in dataset}
    assert found.keys() == expected.keys()
    for path, boxes in expected.items():
        if len(boxes):
            assert_all_found(found[path].xyxy, boxes)
        else:
            assert len(found[path]) == 0


def test_coco_predictions_have_the_fields_that_fiftyone_and_label_studio_read(checkpoint, large_image, tmp_path):
    image, _ = draw_squares(np.random.default_rng(7), 64, 3)
    image.save(tmp_path / "small.png")
    sources = [str(large_image[0]), str(tmp_path / "small.png")]
    predict.main([str(checkpoint), *sources, "--output_dir", str(tmp_path), "--format", "coco", "--num_workers", "0"])
    content = json.loads((tmp_path / "coco.json").read_text())
    # fiftyone.utils.coco and label_studio_sdk.converter.imports.coco, which index by these.
    assert all(category.keys() >= {"id", "name"} for category in content["categories"])
    images = {entry["id"]: entry for entry in content["images"]}
    assert len(images) == 2 and all(isinstance(number, int) for number in images)
    assert all(entry.keys() >= {"file_name", "width", "height"} for entry in images.values())
    assert len(content["annotations"]) == 3
    for annotation in content["annotations"]:
        assert images[annotation["image_id"]]["file_name"].endswith("small.png")
        assert annotation["category_id"] == 1 and annotation["iscrowd"] == 0
        # "segmentation" would make Label Studio add a polygon to each box, and FiftyOne a mask.
        assert annotation.keys() == {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "score"}
        left, top, width, height = annotation["bbox"]
        assert 0 <= left < left + width <= 64 and 0 <= top < top + height <= 64


@pytest.mark.parametrize("name", ["tiled_inference", "sahi_inference"])
def test_examples_say_how_they_are_run(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert f"python scripts/examples/{name}.py my-detector" in text
