import io
import json
import logging
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from planted_problems import HEIGHT, NUM_TRAIN, NUM_VALIDATION, PLANTS, WIDTH, Planted, copy_image, cut_off, orient
from torchvision.ops import box_iou

from dit_detection import DiTDetectionConfig, DiTDetectionImageProcessor, cli
from dit_detection.commands import check, check_report
from dit_detection.data import load_detection_dataset
from dit_detection.data.findings import FINDINGS, NUM_KEPT, FindingLog
from dit_detection.data.inspection import find_same_place
from dit_detection.data.problems import ProblemLog
from dit_detection.data.reader import read_detection_dataset
from dit_detection.data.statistics import read_table
from dit_detection.small_dit import DETECTORS, SMALL_DIT, write_small_dit


@pytest.fixture
def planted(tmp_path):
    return Planted(tmp_path)


def run(source, *options):
    """The report and the exit code."""
    target = f"{source}/report.json"
    code = 0
    try:
        check.main([source, "--image_size", str(HEIGHT), str(WIDTH), "--json", target, *options])
    except SystemExit as exit:
        code = exit.code
    with open(target) as file:
        return json.load(file, parse_constant=pytest.fail), code


def kinds_of(report):
    return {finding["kind"]: finding for finding in report["findings"]}


def test_every_kind_is_planted():
    assert set(FINDINGS) <= set(PLANTS)


def test_a_clean_set_has_no_findings(planted, capsys):
    report, code = run(planted.write())
    assert report["findings"] == [] and code == 0 and report["training_would_start"]
    printed = capsys.readouterr().out
    assert "Nothing suspicious" in printed and "Training would start" in printed


@pytest.mark.parametrize("kind", PLANTS)
def test_what_is_planted_is_found_and_nothing_else(planted, kind, capsys):
    severity, count, plant = PLANTS[kind]
    plant(planted)
    report, code = run(planted.write())
    found = kinds_of(report)
    assert list(found) == [kind]
    assert (found[kind]["severity"], found[kind]["count"]) == (severity, count)
    told = 1 if kind == "classes without names" else count  # those of all classes together
    assert len(found[kind]["examples"]) == min(told, NUM_KEPT)
    assert code == (1 if severity == "error" else 0) and report["training_would_start"] == (code == 0)
    printed = capsys.readouterr().out
    assert f"{severity.upper()}: {kind}, {count} x" in printed and found[kind]["examples"][0]["where"] in printed


@pytest.mark.parametrize(
    "kind", ["missing image file", "empty box", "box outside the image", "image cannot be decoded"]
)
def test_on_invalid_drop_starts_unless_an_image_breaks_off(planted, kind):
    PLANTS[kind][2](planted)
    report, code = run(planted.write(), "--on_invalid", "drop")
    breaks_off = kind == "image cannot be decoded"
    assert kinds_of(report)[kind]["severity"] == ("error" if breaks_off else "warning")
    assert code == (1 if breaks_off else 0)


def test_a_jpeg_that_breaks_off_is_found_by_decoding_alone(planted):
    cut_off(planted)
    source = planted.write()
    report, code = run(source)
    assert code == 1 and "a.jpg" in kinds_of(report)["image cannot be decoded"]["examples"][0]["where"]
    assert run(source, "--fast")[1] == 0


def test_images_of_problems_are_shown_as_they_are_annotated(planted):
    orient(stored_upright=True)(planted)  # annotated as stored, whatever the EXIF orientation says
    planted.add([60, 5, 20, 4])
    problems, log = ProblemLog("error"), FindingLog()
    read_detection_dataset(planted.write(), problems)
    log.add_problems(problems)
    (example,) = log.findings["box outside the image"].examples
    assert check_report._open(example, {}).size == example.size == (WIDTH, HEIGHT)
    # Of another size than annotated: that may be what is wrong.
    assert check_report._open(replace(example, size=(7, 5)), {}).size == (HEIGHT, WIDTH)


def test_crowd_regions_are_no_training_objects(planted):
    for annotation in planted.splits["train"]["annotations"]:
        annotation["iscrowd"] = int(annotation["category_id"] == 20)
    report, _ = run(planted.write())
    assert list(kinds_of(report)) == ["class without training objects"]


def test_crowd_regions_are_no_doubles(planted):
    planted.add([2, 2, 20, 16])
    planted.splits["train"]["annotations"][-1]["iscrowd"] = 1
    report, _ = run(planted.write())
    assert report["findings"] == [] and report["splits"]["train"]["crowd_regions"] == 1


def test_leaks_tell_whether_the_objects_agree(planted):
    copy_image("train_3.png", "val_2.png")(planted)
    planted.add([40, 30, 10, 10], split="val", image_id=2)
    (example,) = kinds_of(run(planted.write())[0])["same image in two splits"]["examples"]
    assert example["split"] == "validation" and "train_3.png (train), with other objects" in example["what"]


def test_numbers_by_hand(planted):
    planted.keep(lambda a: a["image_id"] > 1 or a["category_id"] == 10)
    planted.add([0, 0, 40, 40], image_id=2)
    numbers = run(planted.write(), "--image_size", "96", "128")[0]["splits"]["train"]
    assert (numbers["images"], numbers["objects"]) == (24, 71)
    assert numbers["boxes_per_image"]["0%"] == 1 and numbers["boxes_per_image"]["50%"] == 3
    assert numbers["boxes_per_image"]["100%"] == 4
    assert numbers["classes"] == {"ant": 25, "bee": 23, "cow": 23}
    assert numbers["size_classes"] == {"small": 70, "medium": 1, "large": 0}
    # Doubled on the canvas: the largest is 40 x 40 of 64 x 48 pixels, the smallest 20 x 16.
    assert numbers["canvas_size"]["100%"] == 80 and numbers["canvas_short_side"]["0%"] == 32
    assert numbers["relative_size"]["100%"] == pytest.approx((1600 / 3072) ** 0.5, abs=1e-4)
    assert numbers["aspect_ratio"]["100%"] == 1.0 and numbers["aspect_ratio"]["0%"] == 0.8
    assert numbers["image_sizes"] == {"64 x 48": 24} and numbers["modes"] == {"RGB": 24}


def test_sizes_on_the_canvas_are_those_of_the_image_processor(planted):
    planted.splits["train"]["images"][0] |= {"width": 41, "height": 17}
    planted.save(planted.pixels(1).resize((41, 17)), "train_1.png")
    planted.keep(lambda a: a["image_id"] > 1)
    planted.add([10.5, 3, 20, 9])
    dataset = load_detection_dataset(planted.write())
    table = read_table("train", dataset["train"], (96, 100))
    row = dataset["train"][0]
    annotation = {"image_id": 1, "annotations": [{"bbox": row["objects"]["bbox"][0], "category_id": 0}]}
    processor = DiTDetectionImageProcessor(size={"max_height": 96, "max_width": 100})
    labels = processor(row["image"], annotation, return_tensors="pt")["labels"][0]
    assert table.canvas_sizes[0].tolist() == labels["size"].tolist()
    height, width = labels["size"].tolist()
    cx, cy, w, h = (labels["boxes"][0] * torch.tensor([width, height, width, height])).tolist()
    expected = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
    assert table.canvas_boxes[0].tolist() == pytest.approx(expected, abs=1e-3)


def test_same_place_is_every_pair_of_high_iou(planted):
    generator = np.random.default_rng(0)
    for image_id in (1, 2, 3):
        for box in generator.uniform([0, 0, 20, 20], [3, 3, 40, 40], (60, 4)):
            planted.add(box.round(2).tolist(), image_id=image_id)
    table = read_table("train", load_detection_dataset(planted.write())["train"], (HEIGHT, WIDTH))
    first, second, ious = find_same_place(table)
    boxes = torch.from_numpy(np.hstack([table.bbox[:, :2], table.bbox[:, :2] + table.bbox[:, 2:]]))
    same_image = torch.from_numpy(table.rows[:, None] == table.rows)
    expected = torch.triu((box_iou(boxes, boxes) > 0.9) & same_image, diagonal=1).nonzero()
    found = {frozenset(pair) for pair in zip(first.tolist(), second.tolist(), strict=True)}
    assert len(found) == len(first) == len(expected) > 5
    assert found == {frozenset(pair) for pair in expected.tolist()}
    assert ious.min() > 0.9


def test_json_has_everything_and_nothing_that_json_does_not_know(planted):
    planted.add([float("inf"), 5, 20, 4])
    report, _ = run(planted.write(), "--fit_anchors", str(planted.folder / "anchors.json"))
    assert set(report) == {
        "dataset",
        "canvas",
        "class_names",
        "splits",
        "findings",
        "anchors",
        "fitted_anchors",
        "training_would_start",
    }
    assert report["canvas"] == [HEIGHT, WIDTH] and report["class_names"] == ["ant", "bee", "cow"]
    assert list(report["splits"]) == ["train", "validation"]
    (finding,) = report["findings"]
    assert set(finding) == {"kind", "severity", "remedy", "count", "splits", "examples"}
    assert finding["examples"][0]["boxes"] == [[None, 5, 20, 4]]
    for splits in report["anchors"].values():
        assert set(splits["train"]) == {"all", "small", "medium", "large"}


def cells_of(path, columns=4):
    """The pictures of a grid whose images have the shape of the test's."""
    grid = Image.open(path).convert("RGB")
    width, height, gap, caption = 480, 360, 12, 29
    cells = []
    for top in range(gap, grid.height - height, height + caption + gap):
        for left in range(gap, grid.width - width + 1, width + gap):
            cell = np.asarray(grid.crop((left, top, left + width, top + height)))
            if (cell != 255).any():
                cells.append(cell)
    return cells


def test_the_picture_shows_each_image_once_per_kind(planted):
    for image_id in (1, 2, 3):
        planted.add([0, 0, 63, 48], image_id=image_id)
    planted.add([2.2, 2.2, 20, 16], image_id=1)
    planted.add([29.5, 5, 22, 20], category_id=20, image_id=1)  # a second double in that image: the same cell
    cut_off(planted)
    target = planted.folder / "worst.png"
    run(planted.write(), "--pictures", str(target))
    cells = cells_of(target)
    assert len(cells) == 1 + 1 + 3  # one that breaks off, one with two doubles, three boxes of the whole image
    assert [len(np.unique(cell.reshape(-1, 3), axis=0)) == 1 for cell in cells] == [True, True, True, False, False]


def test_the_boxes_in_question_are_drawn_where_they_are(planted):
    planted.save(Image.new("RGB", (WIDTH, HEIGHT), (7, 7, 7)), "train_1.png")
    planted.add([2.2, 2.2, 20, 16], image_id=1)
    target = planted.folder / "worst.png"
    run(planted.write(), "--pictures", str(target))
    (cell,) = cells_of(target)
    colored = (np.abs(cell.astype(int) - 7).max(axis=2) > 60).nonzero()
    scale = 480 / 44  # shown are 44 x 33 of 64 x 48 pixels, twice the box's height, from the left upper corner
    assert colored[1].min() == pytest.approx(2 * scale, abs=8)
    assert colored[0].max() == pytest.approx(18.2 * scale, abs=8)


def test_small_boxes_are_shown_from_close_by():
    image = Image.new("RGB", (400, 300))
    close, corners = check_report._close_up(image, np.array([[390.0, 10.0, 396.0, 14.0]]))
    assert close.size == (100, 75) and corners.tolist() == [[90, 10, 96, 14]]
    close, corners = check_report._close_up(image, np.array([[100.0, 100.0, 220.0, 110.0]]))
    assert close.size == (240, 180) and corners.tolist() == [[60, 85, 180, 95]]
    for box in ([10.0, 10.0, 210.0, 14.0], [500.0, 10.0, 510.0, 20.0]):
        whole, corners = check_report._close_up(image, np.array([box]))
        assert whole is image and corners.tolist() == [box]


def test_no_picture_without_a_case(planted, capsys):
    target = planted.folder / "worst.png"
    run(planted.write(), "--pictures", str(target))
    assert not target.exists() and "Nothing to draw" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image_size", "0"], "--image_size"),
        (["--image_size", "1", "2", "3"], "--image_size"),
        (["--json", "nowhere/report.json"], "no folder nowhere"),
        (["--fit_anchors", "."], "is a folder"),
        (["--pictures", "worst.xyz"], "no picture has this suffix"),
        (["--model", "nowhere/detector"], "--model nowhere/detector: no DiT"),
        (["--seed", "-1"], "seed is -1"),
        (["--config_overrides", "nowhere.json"], "nowhere.json"),
        (["--config_overrides", '{"anchor_sizes": [[8]]}'], "anchor_sizes"),
        (["--config_overrides", '{"anchor_sizes": "large"}'], "--config_overrides: Validation error"),
        (["--config_overrides", '{"strides": 8}'], "--config_overrides: "),
        (["--config_overrides", '{"strides": '], "--config_overrides"),
        (["--validation_fraction", "2"], "validation_fraction"),
        (["--format", "xls"], "--format"),
        (["--on_invalid", "ignore"], "--on_invalid"),
    ],
)
def test_usage_errors_exit_with_2(planted, options, message, capsys):
    with pytest.raises(SystemExit) as exit:
        check.main([planted.write(), *options])
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_a_data_set_that_is_not_there_exits_with_1(tmp_path):
    (tmp_path / "data").mkdir()
    report, code = run(str(tmp_path / "data"))
    assert code == 1 and report["findings"][0]["severity"] == "error" and "splits" not in report


def test_a_data_set_too_small_to_set_images_aside_is_reported(planted):
    del planted.splits["val"]
    planted.splits["train"]["images"] = planted.splits["train"]["images"][:1]
    planted.keep(lambda a: a["image_id"] == 1)
    report, code = run(planted.write())
    assert code == 1 and "too few to set some aside" in report["findings"][0]["examples"][0]["what"]


def test_anchors_of_a_dit_are_the_default_ones(planted):
    folder = planted.folder / "dit" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    for source in (folder.parent, folder):
        report, _ = run(planted.write(), "--model", str(source))
        assert list(report["anchors"]) == [f"{source}, a DiT"]


def test_anchors_of_a_small_dit_are_those_it_is_trained_with(planted):
    write_small_dit(planted.folder / "dit", "small", 64)
    found = [run(planted.write(), "--model", str(dit))[0]["anchors"] for dit in (planted.folder / "dit", SMALL_DIT)]
    (ours,) = run(planted.write(), "--config_overrides", json.dumps(DETECTORS["small"]))[0]["anchors"].values()
    assert [list(anchors.values()) for anchors in found] == [[ours], [ours]]


def test_anchors_of_a_detector_are_measured_on_its_own_canvas(planted, tiny_model):
    folder = planted.folder / "detector"
    tiny_model(anchor_sizes=[[16.0], [36.0], [42.0]], aspect_ratios=[0.9]).save_pretrained(folder)
    DiTDetectionImageProcessor(size={"max_height": 96, "max_width": 128}).save_pretrained(folder)
    with pytest.raises(SystemExit):  # as training would
        check.main([planted.write(), "--model", str(folder), "--image_size", "64"])
    own = ("--model", str(folder), "--image_size", "96", "128")
    report, _ = run(planted.write(), *own)
    assert report["canvas"] == [96, 128] and list(report["anchors"]) == [str(folder)]
    overridden = run(planted.write(), *own, "--config_overrides", '{"aspect_ratios": [9.0]}')[0]
    covered = [r["anchors"][str(folder)]["train"]["all"]["covered"] for r in (report, overridden)]
    assert covered[0] > covered[1] == 0


def test_fitted_anchors_are_written_for_training(planted):
    target = planted.folder / "anchors.json"
    images = ["--format", "coco", "--class_names", "ant", "bee", "cow"]
    far_off = '{"strides": [8, 16, 32], "anchor_sizes": [[200], [300], [400]], "aspect_ratios": [1.0]}'
    report, _ = run(planted.write(), "--fit_anchors", str(target), "--config_overrides", far_off, *images)
    fitted = report["fitted_anchors"]
    assert fitted["suggested"] and fitted["coverage"]["validation"]["all"]["covered"] > 0.9
    assert json.loads(target.read_text()) == fitted["config_overrides"]
    assert (
        f"--config_overrides {target}" in fitted["command"] and f"--image_size {HEIGHT} {WIDTH}" in fitted["command"]
    )
    assert " ".join(images) in fitted["command"]
    assert len(DiTDetectionConfig(**fitted["config_overrides"]).anchor_sizes) == 3
    # Checked again with them, nothing is left to gain, and the file stays what it is.
    again, _ = run(planted.write(), "--fit_anchors", str(target), "--config_overrides", str(target))
    assert not again["fitted_anchors"]["suggested"]
    assert json.loads(target.read_text()) == fitted["config_overrides"]


def test_anchors_without_objects_in_validation(planted):
    planted.keep(lambda a: False, "val")
    report, code = run(planted.write(), "--fit_anchors", str(planted.folder / "anchors.json"))
    name = report["fitted_anchors"]["instead_of"]
    assert code == 0 and report["anchors"][name]["validation"]["all"] == {"objects": 0, "covered": -1, "mean_iou": -1}


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", None])
def test_a_console_that_is_not_utf8(planted, monkeypatch, encoding):
    stream = io.StringIO() if encoding is None else io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", stream)
    cli.run("check", [planted.write(), "--fast"])
    stream.seek(0)
    assert "area on 512 x 512" in stream.read()


def test_json_of_a_folder_whose_name_is_not_utf8(tmp_path, caplog):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    planted = Planted(folder)
    printed = io.StringIO()  # pytest-xdist cannot pass on what has such a name in it
    with redirect_stdout(printed), redirect_stderr(printed), caplog.at_level(logging.CRITICAL):
        report, code = run(planted.write(), "--fast")
    assert code == 1 and report["dataset"] == str(folder)
    assert kinds_of(report)["file name that is not UTF-8"]["count"] == NUM_TRAIN + NUM_VALIDATION
