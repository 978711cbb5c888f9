import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_folder import coco_content, write_coco, write_images, write_json
from PIL import Image

from dit_detection import (
    DetectionAugmentation,
    DetectionDataset,
    DiTDetectionImageProcessor,
    cli,
    load_detection_dataset,
)
from dit_detection.commands import preview
from dit_detection.commands.preview import draw_entry


def test_the_picture_is_what_the_model_is_fed(tmp_path: Path) -> None:
    rows = load_detection_dataset(write_coco(tmp_path))["train"]
    image_processor = DiTDetectionImageProcessor(size={"max_height": 60, "max_width": 80})
    # Image 9 of 40 x 30, doubled. Its objects: (1, 2) to (11, 10), and a crowd region (30, 20) to (40, 30).
    entry = DetectionDataset(rows, image_processor)[1]
    picture = np.asarray(draw_entry(entry, image_processor, ["cat", "dog"])).astype(int)
    assert picture.shape == (60, 80, 3)
    colour = np.array([40, 100, 200])
    changed = (picture != colour).any(axis=2)
    assert changed[4, 3] or changed[4, 4]
    rows_changed, columns_changed = np.nonzero(changed[:, :22])
    assert columns_changed.min() == 2 and rows_changed.max() in (19, 20)  # the box's left and lower edges
    assert not changed[41:, :58].any()  # left of the crowd region, below its tag
    assert changed[50, 60] and changed[40, 70]

    entry["labels"]["boxes"] = torch.zeros(0, 4)
    entry["labels"]["class_labels"] = entry["labels"]["iscrowd"] = torch.zeros(0, dtype=torch.int64)
    assert (np.asarray(draw_entry(entry, image_processor, ["cat", "dog"])) == colour).all()


def test_padding_is_striped(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] = content["annotations"][:1]
    rows = load_detection_dataset(write_coco(tmp_path, content))["train"]
    image_processor = DiTDetectionImageProcessor(size=40)
    picture = np.asarray(draw_entry(DetectionDataset(rows, image_processor)[0], image_processor, ["cat", "dog"]))
    assert (picture[:30] == [0, 100, 200]).all()
    assert set(np.unique(picture[30:])) == {205, 235}


def test_the_grid_shows_the_views_of_training(tmp_path: Path, monkeypatch, capsys) -> None:
    # A third image, which is set aside for validation: the others are counted as training counts them.
    content = coco_content()
    names = ("a.png", "b.png", "c.png")
    content["images"].append({"id": 11, "file_name": "c.png", "width": 40, "height": 30})
    write_images(tmp_path / "images", names)
    write_json(tmp_path / "annotations_train.json", content)
    output = tmp_path / "views.png"
    options = ["--num_images", "9", "--num_views", "2", "--image_size", "48", "64", "--seed", "7"]
    augmentation = '{"mosaic": 1.0, "copy_paste": 1.0}'
    drawn = []
    monkeypatch.setattr(preview, "draw_entry", lambda *arguments: drawn.append(arguments[0]) or draw_entry(*arguments))
    command = ["dit-detect", "preview", str(tmp_path), "--output", str(output), "--augmentation", augmentation]
    monkeypatch.setattr(sys, "argv", [*command, *options])
    cli.main()
    assert "2 images in 3 views" in capsys.readouterr().out
    with Image.open(output) as picture:
        assert picture.width > 3 * 480 > picture.height  # 3 columns, 2 rows of flat pictures

    rows = load_detection_dataset(tmp_path, validation_fraction=0.15, seed=7)["train"]
    image_processor = DiTDetectionImageProcessor(size={"max_height": 48, "max_width": 64})
    plain = DetectionDataset(rows, image_processor)
    augmented = DetectionDataset(rows, image_processor, DetectionAugmentation(mosaic=1, copy_paste=1), seed=7)
    expected = [plain[0], *(augmented.get_view(0, view) for view in (0, 1))]
    expected += [plain[1], *(augmented.get_view(1, view) for view in (0, 1))]
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(drawn, expected, strict=True))

    drawn.clear()
    preview.main([str(tmp_path), "--augmentation", "none", "--num_images", "1", "--output", str(output)])
    assert len(drawn) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "test"], "--split test: .* has train"),
        (["--num_images", "0"], "--num_images 0 --num_views 3: need 1 to 100 images"),
        (["--num_images", "101"], "--num_images 101 --num_views 3: need 1 to 100 images"),  # no JPEG is that high
        (["--image_size", "1", "2", "3"], "give a side in pixels, or height and width"),
        (["--augmentation", '{"mosaic": 2}'], "mosaic is 2; it must lie between 0 and 1"),
        (["--augmentation", '{"rotate": 2}'], "--augmentation has rotate; it takes horizontal_flip, "),
        (["--augmentation", "mosaic"], "--augmentation"),
        (["--augmentation", '{"mosaic": "yes"}'], "mosaic is 'yes'; it must lie between 0 and 1"),
        (["--augmentation", '{"scale": 2}'], "scale is 2; it must be"),
        (["--augmentation", '{"scale": ["small", 2]}'], r"scale is \['small', 2\]; it must be"),
        (["--augmentation", '{"min_side": "2"}'], "min_side is '2'; it must be above 0 pixels"),
        (["--output", "nowhere/views.png"], "there is no folder nowhere"),
        (["--output", "views.xyz"], "no picture has this suffix"),
        (["--output", "views.psd"], "no picture has this suffix"),  # can be read, but not written
        (["--format", "voc"], 'holds nothing of the format "voc"'),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_wrong_options(tmp_path: Path, capsys, options: list[str], message: str) -> None:
    write_coco(tmp_path)
    with pytest.raises(SystemExit):
        preview.main([str(tmp_path), *options])
    errors = capsys.readouterr().err
    assert re.search(message, errors), errors
