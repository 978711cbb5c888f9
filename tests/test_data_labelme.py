import json
import logging
from pathlib import Path
from typing import Any

import pytest
from annotation_folders import CLASSES, OBJECTS, labelme_json, objects_of, write_labelme, write_text, write_voc
from coco_folder import write_coco, write_images
from datasets import Image as ImageFeature
from PIL import Image

from dit_detection.data import InvalidDatasetError, ProblemLog, class_names_of, load_detection_dataset
from dit_detection.data.formats import find_formats
from dit_detection.data.reader import read_detection_dataset
from dit_detection.pretraining.image_sources import list_training_images


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
        ("a/test", "a/test", "test"),
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
        ("oriented_rectangle", [[14, 3], [24, 8], [14, 13], [4, 8]], [4, 3, 20, 10]),
        ("quadrilateral", [[14, 3], [24, 8], [14, 13], [4, 8]], [4, 3, 20, 10]),
    ],
)
def test_every_shape_with_an_extent_has_a_box(
    tmp_path: Path, kind: str | None, points: list[list[float]], expected: list[float]
) -> None:
    found, problems = read_shapes(tmp_path, [shape(kind, points)])
    assert found == [("cat", pytest.approx(expected))]
    is_turned = kind in ("rotation", "oriented_rectangle")
    assert problems.counts == {"image without annotations": 1} | ({"rotated box": 1} if is_turned else {})


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
        shape("rectangle", [[4, 4], [5, 5]], " cat ", group_id=""),  # no group, and a slip of the thumb
        shape("rectangle", [[6, 6], [7, 7]], group_id=""),
        shape("rectangle", [[0, 0], [9, 9]], "__ignore__"),
    ]
    found, problems = read_shapes(tmp_path, shapes)
    assert problems.counts["ignored shape"] == 1
    assert found == [
        ("cat", [1, 1, 11, 7]),
        ("cat", [30, 20, 5, 5]),
        ("dog", [20, 20, 2, 9]),
        ("cat", [2, 2, 1, 1]),
        ("cat", [4, 4, 1, 1]),
        ("cat", [6, 6, 1, 1]),
    ]


@pytest.mark.parametrize("path", ["..\\images\\one.png", "/home/x/one.png", "C:\\pictures\\one.png"])
def test_an_image_by_the_last_part_of_its_path(tmp_path: Path, path: str) -> None:
    write_images(tmp_path / "images")
    (tmp_path / "images" / "a.png").rename(tmp_path / "images" / "one.png")
    write_text(tmp_path / "labels" / "first.json", labelme_json(path, OBJECTS["a.png"]))
    assert objects_of(load_detection_dataset(tmp_path)["train"]) == {"one.png": OBJECTS["a.png"]}


@pytest.mark.parametrize(("labels", "images"), [("json", "photos"), ("labels/cam1", "images/cam1"), ("ann", "pics")])
def test_an_image_where_the_path_says(tmp_path: Path, labels: str, images: str) -> None:
    write_images(tmp_path / images)
    (tmp_path / "images").mkdir(exist_ok=True)
    for place in (tmp_path, tmp_path / "images"):
        Image.new("RGB", (40, 30)).save(place / "a.png")  # others of the same name
    path = ("../" * (labels.count("/") + 1) + f"{images}/a.png").replace("/", "\\")
    write_text(tmp_path / labels / "a.json", labelme_json(path, OBJECTS["a.png"]))
    dataset = load_detection_dataset(tmp_path)["train"].cast_column("image", ImageFeature(decode=False))
    assert dataset[0]["image"]["path"] == str(tmp_path / images / "a.png")


def test_no_image_outside_the_data_set(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "a.png").rename(tmp_path / "one.png")
    folder = write_labelme(tmp_path / "sets" / "first")
    write_text(folder / "one.json", labelme_json("../../one.png", OBJECTS["a.png"]))
    with pytest.raises(InvalidDatasetError, match="missing image file"):
        load_detection_dataset(folder)


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


@pytest.mark.parametrize("size", [0, 40.0, None])
def test_sizes_that_are_unknown_or_written_as_floats(tmp_path: Path, size: float | None) -> None:
    write_images(tmp_path)
    write_text(tmp_path / "a.json", labelme_json("a.png", OBJECTS["a.png"], imageWidth=size))
    assert list(load_detection_dataset(tmp_path)["train"]["width"]) == [40]


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
    coco = write_labelme(write_coco(tmp_path / "coco") / "images").parent  # drawn with LabelMe, then written as COCO
    assert find_formats(coco).keys() == {"coco"}
    assert len(load_detection_dataset(coco)["train"]) == 2
    write_text(coco / "images" / "package.json", '{"name": "x"}')
    assert objects_of(load_detection_dataset(coco / "images")["train"]) == OBJECTS
    lists = write_images(tmp_path / "lists" / "images").parent
    write_text(lists / "labels" / "classes.txt", "cat\ndog\n")
    for name, objects in OBJECTS.items():
        write_text(lists / "labels" / f"{Path(name).stem}.json", labelme_json(name, objects))
    assert objects_of(load_detection_dataset(lists)["train"]) == OBJECTS
    named = write_images(tmp_path / "named")
    write_text(named / "a.json", labelme_json("a.png", [("images", [1, 1, 9, 9]), ("annotations", [1, 1, 5, 5])]))
    assert class_names_of(load_detection_dataset(named)) == ["annotations", "images"]
    write_labelme(write_voc(tmp_path / "both"))
    with pytest.raises(InvalidDatasetError, match=r"several annotation formats: voc \(.*xml\), labelme \(.*json\)"):
        load_detection_dataset(tmp_path / "both")
    dataset = load_detection_dataset(tmp_path / "both", format="labelme")
    assert objects_of(dataset["train"]) == OBJECTS


def test_pretraining_takes_the_images_whatever_was_drawn(tmp_path: Path) -> None:
    write_images(tmp_path / "train")
    write_images(tmp_path / "val")
    write_text(tmp_path / "train" / "a.json", labelme_json("a.png", [], shapes=[shape("point", [[4, 3]])]))
    write_text(tmp_path / "train" / "gone.json", labelme_json("gone.png", []))
    images = list_training_images([str(tmp_path)]).cast_column("image", ImageFeature(decode=False))
    assert [Path(row["image"]["path"]).parent.name for row in images] == ["train", "train"]
