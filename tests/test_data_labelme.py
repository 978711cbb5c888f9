import json
import logging
from pathlib import Path
from typing import Any

import pytest
from annotation_folders import CLASSES, OBJECTS, labelme_json, objects_of, write_labelme, write_text, write_voc
from coco_folder import write_coco, write_images
from PIL import Image

from dit_detection.data import InvalidDatasetError, ProblemLog, class_names_of, load_detection_dataset
from dit_detection.data.reader import read_detection_dataset


def shape(kind: str | None, points: list[list[float]], label: str = "cat", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}} | more


def read_shapes(folder: Path, shapes: list[dict[str, Any]]) -> tuple[list[tuple[str, list[float]]], ProblemLog]:
    write_images(folder)
    write_text(folder / "a.json", labelme_json("a.png", [], shapes=shapes))
    problems = ProblemLog("drop")
    dataset = read_detection_dataset(folder, problems)
    assert dataset is not None
    return objects_of(dataset["train"])["a.png"], problems


@pytest.mark.parametrize(
    ("annotations", "images", "split"),
    [
        (".", ".", "train"),
        ("train", "train", "train"),
        ("valid", "valid", "validation"),
        ("labels", "images", "train"),
        ("ann", "img", "train"),  # Supervisely
        ("annotations/val", "images/val", "validation"),
        ("a/b/test", "a/b/test", "test"),
    ],
)
def test_layouts(tmp_path: Path, annotations: str, images: str, split: str) -> None:
    write_images(tmp_path / images)
    for name, objects in OBJECTS.items():
        write_text(tmp_path / annotations / f"{Path(name).stem}.json", labelme_json(name, objects))
    dataset = load_detection_dataset(tmp_path)
    assert list(dataset) == [split]
    assert objects_of(dataset[split]) == OBJECTS
    assert class_names_of(dataset) == CLASSES
    assert list(dataset[split]["width"]) == [40, 40]


@pytest.mark.parametrize(
    ("kind", "points", "expected"),
    [
        ("rectangle", [[4, 3], [24, 13]], [4, 3, 20, 10]),
        ("rectangle", [[24, 3], [4, 13]], [4, 3, 20, 10]),
        ("rectangle", [[4, 3], [24, 3], [24, 13], [4, 13]], [4, 3, 20, 10]),  # X-AnyLabeling, from 2.4
        ("polygon", [[4, 9], [24, 3], [10, 13]], [4, 3, 20, 10]),
        (None, [[4, 9], [24, 3], [10, 13]], [4, 3, 20, 10]),
        ("circle", [[20, 15], [23, 19]], [15, 10, 10, 10]),
        ("mask", [[4, 3], [24, 13]], [4, 3, 20, 10]),
        ("rotation", [[14, 3], [24, 8], [14, 13], [4, 8]], [4, 3, 20, 10]),
    ],
)
def test_every_shape_with_an_extent_has_a_box(
    tmp_path: Path, kind: str | None, points: list[list[float]], expected: list[float]
) -> None:
    found, problems = read_shapes(tmp_path, [shape(kind, points)])
    assert found == [("cat", pytest.approx(expected))]
    assert dict(problems.counts) == ({"rotated box": 1} if kind == "rotation" else {}) | {
        "image without annotations": 1
    }


@pytest.mark.parametrize("kind", ["point", "line", "linestrip", "points", "cuboid"])
def test_what_has_no_box_is_refused(tmp_path: Path, kind: str) -> None:
    found, problems = read_shapes(tmp_path, [shape(kind, [[4, 3], [24, 13]]), shape("rectangle", [[1, 1], [9, 9]])])
    assert found == [("cat", [1, 1, 8, 8])]
    assert problems.counts["unusable shape"] == 1
    with pytest.raises(InvalidDatasetError, match=f"a.json.*'shape_type': '{kind}'"):
        load_detection_dataset(tmp_path)


def test_the_parts_of_a_group_are_one_object(tmp_path: Path) -> None:
    shapes = [
        shape("polygon", [[1, 1], [5, 1], [1, 5]], group_id=0),
        shape("rectangle", [[30, 20], [35, 25]]),
        shape("polygon", [[9, 4], [12, 4], [12, 8]], group_id=0),
        shape("polygon", [[20, 20], [22, 20], [22, 29]], "dog", group_id=0),  # another class
        shape("rectangle", [[2, 2], [3, 3]], group_id=1),
    ]
    found, _ = read_shapes(tmp_path, shapes)
    assert found == [
        ("cat", [1, 1, 11, 7]),
        ("cat", [30, 20, 5, 5]),
        ("dog", [20, 20, 2, 9]),
        ("cat", [2, 2, 1, 1]),
    ]


@pytest.mark.parametrize("path", ["..\\images\\one.png", "/home/x/one.png", "C:\\pictures\\one.png"])
def test_an_image_by_the_last_part_of_its_path(tmp_path: Path, path: str) -> None:
    write_images(tmp_path / "images")
    (tmp_path / "images" / "a.png").rename(tmp_path / "images" / "one.png")
    write_text(tmp_path / "labels" / "first.json", labelme_json(path, OBJECTS["a.png"]))
    assert objects_of(load_detection_dataset(tmp_path)["train"]) == {"one.png": OBJECTS["a.png"]}


def test_the_image_of_the_same_name_goes_before_another(tmp_path: Path) -> None:
    write_images(tmp_path)
    Image.open(tmp_path / "a.png").save(tmp_path / "a.jpg")
    write_text(tmp_path / "a.json", labelme_json("a.jpg", OBJECTS["a.png"]))
    write_text(tmp_path / "b.json", labelme_json("a.png", OBJECTS["b.png"]))  # renamed with its image, by hand
    assert objects_of(load_detection_dataset(tmp_path)["train"]) == {
        "a.jpg": OBJECTS["a.png"],
        "b.png": OBJECTS["b.png"],
    }


def test_lists_of_classes_and_images_without_objects(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_labelme(tmp_path, OBJECTS | {"b.png": []})
    Image.new("RGB", (40, 30)).save(tmp_path / "c.png")
    write_text(tmp_path / "labels.txt", "__ignore__\n_background_\nowl\ncat\n")
    with caplog.at_level(logging.WARNING):
        dataset = load_detection_dataset(tmp_path)
    assert class_names_of(dataset) == ["owl", "cat"]
    assert objects_of(dataset["train"]) == {"a.png": OBJECTS["a.png"], "b.png": []}
    assert "1 x image without annotations" in caplog.text and "c.png" in caplog.text


def test_embedded_pixels_of_any_size_do_not_hide_the_format(tmp_path: Path) -> None:
    write_images(tmp_path)
    for name, objects in OBJECTS.items():
        content = json.loads(labelme_json(name, objects, imageData="A" * 300_000))
        write_text(tmp_path / f"{Path(name).stem}.json", json.dumps(content, sort_keys=True))  # "shapes" comes last
    assert objects_of(load_detection_dataset(tmp_path)["train"]) == OBJECTS


def test_patients_stay_together(tmp_path: Path) -> None:
    for number in range(8):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / f"{number}.png")
        content = labelme_json(f"{number}.png", OBJECTS["a.png"], patient=number // 2)
        write_text(tmp_path / f"{number}.json", content)
    dataset = load_detection_dataset(tmp_path, validation_fraction=0.25, group_by="patient")
    names = {split: set(objects_of(rows)) for split, rows in dataset.items()}
    assert all(len({name for name in names["validation"] if int(name[0]) // 2 == group}) != 1 for group in range(4))
    assert len(names["validation"]) == 2
    with pytest.raises(InvalidDatasetError, match="group_by"):
        load_detection_dataset(tmp_path, validation_fraction=0.25, group_by="doctor")


def test_others_beside_it_are_told_apart(tmp_path: Path) -> None:
    assert list(load_detection_dataset(write_coco(tmp_path / "coco"))) == ["train"]
    write_labelme(write_voc(tmp_path / "both"))
    with pytest.raises(InvalidDatasetError, match=r"several annotation formats: voc \(.*xml\), labelme \(.*json\)"):
        load_detection_dataset(tmp_path / "both")
    dataset = load_detection_dataset(tmp_path / "both", format="labelme")
    assert objects_of(dataset["train"]) == OBJECTS
