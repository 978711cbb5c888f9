import copy
import json
import os

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dit_detection.data.dataset_files import read_class_list
from dit_detection.inference.prediction_formats import (
    prediction_of,
    to_coco,
    to_json,
    to_yolo,
    unreadable,
    write_predictions,
    yolo_label_names,
)

NAMES = ["cat", "dog", "owl"]


def make_predictions(count=7, seed=0, folder="photos"):
    """Random detections in images of several sizes; the fourth has none, the last cannot be read."""
    generator = np.random.default_rng(seed)
    predictions = []
    for index in range(count - 1):
        width, height = (int(side) for side in generator.integers(20, 700, 2))
        found = 0 if index == 3 else int(generator.integers(1, 9))
        corners = generator.random((found, 2, 2)) * [width, height]
        boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)
        scores, labels = np.sort(generator.random(found))[::-1], generator.integers(0, 3, found)
        predictions.append(
            prediction_of(f"{folder}/{index}.jpg", 10 + index, width, height, scores, labels, boxes, NAMES)
        )
    return [*predictions, unreadable(f"{folder}/broken.jpg", 10 + count, "is empty")]


def test_a_prediction_has_the_numbers_of_its_result():
    result = {
        "scores": torch.tensor([0.91234567, 0.5]),
        "labels": torch.tensor([2, 0]),
        "boxes": torch.tensor([[1.004, 2.0, 30.126, 40.0], [0.0, 0.0, 5.0, 6.0]]),
    }
    prediction = prediction_of("a.jpg", 4, 100, 80, **result, class_names=NAMES)
    assert prediction == {
        "file": "a.jpg",
        "image_id": 4,
        "width": 100,
        "height": 80,
        "detections": [
            {"label": "owl", "label_id": 2, "score": 0.912346, "box_xyxy": [1.0, 2.0, 30.13, 40.0]},
            {"label": "cat", "label_id": 0, "score": 0.5, "box_xyxy": [0.0, 0.0, 5.0, 6.0]},
        ],
        "error": None,
    }
    lists = {name: values.tolist() for name, values in result.items()}
    assert prediction_of("a.jpg", 4, 100, 80, **lists, class_names=NAMES) == prediction
    with pytest.raises(ValueError):
        prediction_of("a.jpg", 4, 100, 80, [0.5], [1, 2], [[0, 0, 1, 1]], NAMES)


@pytest.mark.parametrize("count", [0, 1, 6])
def test_json_gives_the_list_back(count):
    predictions = make_predictions()[:count]
    for name in ('"quotes"\n', "ünïcode 猫", "back\\slash", "\udcff"):
        predictions.append(unreadable(name, 1, name))
    assert json.loads(to_json(predictions)) == predictions
    assert json.loads(to_json([])) == []


def test_yolo_by_hand():
    boxes = [[10, 20, 30, 60], [0, 0, 200, 100]]
    prediction = prediction_of("a.jpg", 0, 200, 100, [0.75, 0.5], [1, 0], boxes, NAMES)
    assert to_yolo(prediction) == (
        "1 0.100000 0.400000 0.100000 0.400000 0.750000\n0 0.500000 0.500000 1.000000 1.000000 0.500000\n"
    )
    assert to_yolo(make_predictions()[3]) == ""


def test_coco_is_what_pycocotools_reads(tmp_path):
    predictions = make_predictions()
    content = to_coco(predictions, NAMES)
    assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "owl"}]
    assert content["unreadable"] == [{"file_name": "photos/broken.jpg", "error": "is empty"}]
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    truth = COCO(str(path))
    assert truth.getImgIds() == [10, 11, 12, 13, 14, 15]
    for prediction in predictions[:-1]:
        [image] = truth.loadImgs(prediction["image_id"])
        assert (image["file_name"], image["width"], image["height"]) == (
            prediction["file"],
            prediction["width"],
            prediction["height"],
        )
        annotations = truth.loadAnns(truth.getAnnIds(imgIds=prediction["image_id"]))
        assert [annotation["score"] for annotation in annotations] == [
            found["score"] for found in prediction["detections"]
        ]
        for annotation, found in zip(annotations, prediction["detections"], strict=True):
            left, top, width, height = annotation["bbox"]
            assert [left, top, left + width, top + height] == pytest.approx(found["box_xyxy"], abs=0.006)
            assert annotation["area"] == pytest.approx(width * height, abs=0.006)
            assert truth.loadCats(annotation["category_id"])[0]["name"] == found["label"]
    # Against themselves, all detections are right.
    results = truth.loadRes(copy.deepcopy(content["annotations"]))
    evaluation = COCOeval(truth, results, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_coco_refuses_two_images_of_one_id():
    predictions = [unreadable("a.jpg", 3, "is empty"), unreadable("b.jpg", 3, "is empty")]
    with pytest.raises(ValueError, match=r"b\.jpg: an earlier image has the same image_id, 3"):
        to_coco(predictions, NAMES)


def test_files_hold_what_the_functions_give(tmp_path):
    predictions = make_predictions()
    path = write_predictions(predictions, tmp_path, "json", NAMES)
    assert path == tmp_path / "predictions.json" and path.read_text() == to_json(predictions)
    path = write_predictions(predictions, tmp_path, "coco", NAMES)
    assert path == tmp_path / "coco.json" and json.loads(path.read_text()) == to_coco(predictions, NAMES)
    path = write_predictions(predictions, tmp_path, "yolo", NAMES)
    assert path == tmp_path / "yolo" and (path / "classes.txt").read_text() == "cat\ndog\nowl\n"
    texts = {text.name: text.read_text() for text in (path / "labels").iterdir()}
    assert texts == {f"{index}.txt": to_yolo(predictions[index]) for index in range(6)}
    with pytest.raises(ValueError, match="'voc'"):
        write_predictions(predictions, tmp_path, "voc", NAMES)
    assert not list(tmp_path.rglob("*.unfinished"))


def test_the_lines_of_yolos_classes_are_the_classes(tmp_path):
    names = ["#1", "two\nlines", "a\u2028b"]
    path = write_predictions(make_predictions(), tmp_path, "yolo", names)
    assert read_class_list(path) == ["#1", "two lines", "a b"]


def test_a_file_that_could_not_be_finished_leaves_the_earlier_one(tmp_path):
    write_predictions(make_predictions(seed=1), tmp_path, "json", NAMES)
    before = (tmp_path / "predictions.json").read_text()

    def broken():
        yield make_predictions()[0]
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_predictions(broken(), tmp_path, "json", NAMES)
    assert (tmp_path / "predictions.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.json"]


def test_yolo_label_names_follow_the_order_of_the_images():
    assert yolo_label_names(["b/2.jpg", "a/1.png", "b/1.png"]) == [f"b{os.sep}2", f"a{os.sep}1", f"b{os.sep}1"]
    assert yolo_label_names([]) == []


def test_yolo_labels_stand_as_their_images_do(tmp_path):
    files = ["data/train/1.jpg", "data/val/1.jpg", "data/val/deep/a.b.jpg", "data/val/../../data/up.png"]
    predictions = [prediction_of(file, 0, 10, 10, [], [], [], NAMES) for file in files]
    folder = write_predictions(predictions, tmp_path, "yolo", NAMES) / "labels"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.txt")}
    assert found == {"train/1.txt", "val/1.txt", "val/deep/a.b.txt", "up.txt"}
    outside = [prediction_of("../../../etc/cron", 0, 10, 10, [], [], [], NAMES)]
    write_predictions(outside, tmp_path / "out", "yolo", NAMES)
    assert (tmp_path / "out" / "yolo" / "labels" / "cron.txt").is_file()
    with pytest.raises(ValueError, match=r"data/1\.jpg and data/1\.png would have the same YOLO label file"):
        same = [prediction_of(f"data/1.{suffix}", 0, 10, 10, [], [], [], NAMES) for suffix in ("jpg", "png")]
        write_predictions(same, tmp_path, "yolo", NAMES)
    assert write_predictions([], tmp_path / "empty", "yolo", NAMES).is_dir()
