import logging
import re
from pathlib import Path

import pytest
from annotation_folders import CLASSES, OBJECTS, copy_as_yolo, objects_of, write_text, write_yolo, yolo_lines
from coco_folder import write_images
from PIL import Image as PILImage

from dit_detection.data import (
    InvalidDatasetError,
    ProblemLog,
    class_names_of,
    load_detection_dataset,
    read_detection_dataset,
)

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.parametrize(
    "name", ["bccd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cards", "microcontrollers"))]
)
def test_copy_of_shared_data_has_the_same_boxes(tmp_path: Path, name: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip("no shared data here")
    coco = load_detection_dataset(SHARED / name, check_files=False)
    yolo = load_detection_dataset(copy_as_yolo(coco, tmp_path), check_files=False)
    assert class_names_of(yolo) == class_names_of(coco)
    for split, rows in coco.items():
        for (image, expected), (copy, found) in zip(
            objects_of(rows).items(), objects_of(yolo[split]).items(), strict=True
        ):
            assert (copy, [label for label, _ in found]) == (image, [label for label, _ in expected])
            for (_, box), (_, other) in zip(found, expected, strict=True):
                assert box == pytest.approx(other, abs=1e-9)  # these images are below 670 pixels, or boxes whole


def write_labels(folder: Path) -> None:
    for name, objects in OBJECTS.items():
        write_text(folder / f"{Path(name).stem}.txt", yolo_lines(objects))


@pytest.mark.parametrize(
    ("images", "labels", "split"),
    [
        ("images", "labels", "train"),  # Label Studio
        ("images/train", "labels/train", "train"),  # Ultralytics
        ("images/val2017", "labels/val2017", "validation"),
        ("valid/images", "valid/labels", "validation"),  # Roboflow
        ("test", "test", "test"),
        (".", ".", "train"),  # labelImg
        ("images", "images", "train"),
        ("data", "data", "train"),  # FiftyOne's YOLOv4
    ],
)
@pytest.mark.parametrize("described", [True, False])
def test_layouts(tmp_path: Path, images: str, labels: str, split: str, described: bool) -> None:
    if (images, described) == ("images", False) and labels == "images":
        write_text(tmp_path / "labels" / "a.txt", yolo_lines(OBJECTS["a.png"]))  # else nothing shows what it is
    write_images(tmp_path / images)
    write_labels(tmp_path / labels)
    if described:
        key = {"validation": "val"}.get(split, split)
        write_text(tmp_path / "data.yaml", f"path: .\n{key}: {images}\nnc: 2\nnames: {{0: cat, 1: dog}}\n")
    else:
        write_text(tmp_path / "classes.txt", "cat\ndog\n")
        write_text(tmp_path / "notes.json", '{"categories": [{"id": 0, "name": "cat"}], "info": {"year": 2024}}')
    dataset = load_detection_dataset(tmp_path)
    assert list(dataset) == [split]
    assert objects_of(dataset[split]) == OBJECTS
    assert class_names_of(dataset) == CLASSES
    assert list(dataset[split]["width"]) == [40, 40]


@pytest.mark.parametrize(
    "description",
    [
        "train: ../train/images\nval: ../valid/images\nnames: [cat, dog]",  # Roboflow
        "path: /content/data set\ntrain: train/images\nval: [valid/images]\nnames: [cat, dog]",
        "path: ./\ntrain: train.txt\nval: valid.txt\nnames:\n  0: cat\n  1: dog",
        "train: train.txt\nval:\n  - valid.txt\nnames: ['cat', \"dog\"]\nnc: 2",
    ],
)
def test_paths_of_a_description(tmp_path: Path, description: str) -> None:
    for split in ("train", "valid"):
        write_images(tmp_path / split / "images")
        write_labels(tmp_path / split / "labels")
    write_text(tmp_path / "train.txt", "./train/images/a.png\n./train/images/b.png\n")
    write_text(tmp_path / "valid.txt", f"data/valid/images/a.png\n{tmp_path}/valid/images/b.png\n")
    write_text(tmp_path / "data.yaml", description)
    dataset = load_detection_dataset(tmp_path, check_files=False)
    assert {split: objects_of(rows) for split, rows in dataset.items()} == {"train": OBJECTS, "validation": OBJECTS}


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("data.yaml", "Train: Train.txt\nValidation: Validation.txt\nnames: [cat, dog]\npath: .\n"),
        ("cells.yaml", "Train: Train.txt\nValidation: Validation.txt\n"),
        ("obj.data", "Train = data/Train.txt\nValidation = data/Validation.txt\nnames = data/obj.names\n"),
    ],
)
def test_splits_of_cvat_begin_with_a_capital(tmp_path: Path, name: str, description: str) -> None:
    write_images(tmp_path / "images")
    write_labels(tmp_path / "labels")
    write_text(tmp_path / "Train.txt", "data/images/a.png\n")
    write_text(tmp_path / "Validation.txt", "data/images/b.png\n")
    write_text(tmp_path / "obj.names", "cat\ndog\n")
    write_text(tmp_path / name, description)
    splits = {split: objects_of(rows) for split, rows in load_detection_dataset(tmp_path).items()}
    assert splits == {"train": {"a.png": OBJECTS["a.png"]}, "validation": {"b.png": OBJECTS["b.png"]}}


def test_split_of_unknown_name_in_a_description_is_told_of(tmp_path: Path, caplog) -> None:
    write_yolo(tmp_path)
    write_images(tmp_path / "more")
    write_text(tmp_path / "data.yaml", "train: images\nholdout: more\nnames: [cat, dog]\n")
    with caplog.at_level(logging.WARNING):
        assert list(load_detection_dataset(tmp_path)) == ["train"]
    assert "key \"holdout\" is 'more', but names no split. Call it train, val or test" in caplog.text


def test_lists_of_images_without_a_description(tmp_path: Path) -> None:
    (write_yolo(tmp_path) / "data.yaml").unlink()
    write_text(tmp_path / "classes.txt", "cat\ndog\n")
    write_text(tmp_path / "train.txt", "./images/b.png\n")
    write_text(tmp_path / "val.txt", "images/a.png\n")
    splits = {split: objects_of(rows) for split, rows in load_detection_dataset(tmp_path).items()}
    assert splits == {"train": {"b.png": OBJECTS["b.png"]}, "validation": {"a.png": OBJECTS["a.png"]}}


def test_labels_of_an_image_called_train_are_no_list(tmp_path: Path) -> None:
    write_images(tmp_path, ("train.png", "b.png"))
    for name, objects in zip(("train", "b"), OBJECTS.values(), strict=True):
        write_text(tmp_path / f"{name}.txt", yolo_lines(objects))
    write_text(tmp_path / "classes.txt", "cat\ndog\n")
    assert len(load_detection_dataset(tmp_path)["train"]) == 2


def test_a_folder_of_test_pictures_beside_images_and_labels_is_no_split(tmp_path: Path) -> None:
    (write_yolo(tmp_path) / "data.yaml").unlink()
    write_text(tmp_path / "classes.txt", "cat\ndog\n")
    write_images(tmp_path / "test_predictions")
    dataset = load_detection_dataset(tmp_path)
    assert {split: objects_of(rows) for split, rows in dataset.items()} == {"train": OBJECTS}


def test_cvat_export(tmp_path: Path) -> None:
    write_images(tmp_path / "obj_train_data")
    write_labels(tmp_path / "obj_train_data")
    data = "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n"
    write_text(tmp_path / "obj.data", data)
    write_text(tmp_path / "obj.names", "cat\ndog\n")
    write_text(tmp_path / "train.txt", "data/obj_train_data/b.png\ndata/obj_train_data/a.png\n")
    train = load_detection_dataset(tmp_path)["train"]
    assert list(objects_of(train)) == ["b.png", "a.png"]
    assert objects_of(train) == OBJECTS
    write_text(tmp_path / "obj.names", "\ncat\ndog\n")  # is 0 the empty line, or the cat?
    with pytest.raises(InvalidDatasetError, match=r"obj\.names: line 1 is empty"):
        load_detection_dataset(tmp_path)


def test_only_a_description_that_is_named_may_point_elsewhere(tmp_path: Path) -> None:
    write_yolo(tmp_path / "elsewhere")
    description = f"path: {tmp_path / 'elsewhere'}\ntrain: {tmp_path / 'elsewhere' / 'images'}\nnames: [cat, dog]\n"
    file = write_text(tmp_path / "here" / "data.yaml", description)
    assert objects_of(load_detection_dataset(file)["train"]) == OBJECTS
    with pytest.raises(
        InvalidDatasetError, match=r"elsewhere/images' leads out of the data set's folder .*pass the desc"
    ):
        load_detection_dataset(file.parent)


def test_polygons_become_the_boxes_around_them(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    # (4, 3), (20, 3), (12, 15) of 40 x 30 pixels
    write_text(tmp_path / "labels" / "a.txt", "1 0.1 0.1 0.5 0.1 0.3 0.5\n\n0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\r\n")
    train = load_detection_dataset(tmp_path)["train"]
    assert objects_of(train)["a.png"] == [("dog", [4, 3, 16, 12]), ("cat", [4, 3, 16, 12])]


def test_image_without_a_label_file_has_no_objects(tmp_path: Path, caplog) -> None:
    write_yolo(tmp_path)
    (tmp_path / "labels" / "a.txt").unlink()
    with caplog.at_level(logging.WARNING):
        train = load_detection_dataset(tmp_path)["train"]
    assert objects_of(train) == OBJECTS | {"a.png": []}
    assert "1 x image without a label file: it counts as an image without objects." in caplog.text


def test_split_that_is_described_and_not_there(tmp_path: Path, caplog) -> None:
    write_yolo(tmp_path)
    write_text(tmp_path / "data.yaml", "train: images\ntest: ../test/images\nnames: [cat, dog]\n")
    with caplog.at_level(logging.WARNING):
        assert list(load_detection_dataset(tmp_path)) == ["train"]
    assert "1 x split without images: the split is left out." in caplog.text


def test_classes_without_names(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    assert class_names_of(load_detection_dataset(tmp_path)) == ["0", "1"]
    assert objects_of(load_detection_dataset(tmp_path, class_names=CLASSES)["train"]) == OBJECTS


@pytest.mark.parametrize(
    ("images", "labels", "name"),
    [
        ("images/{}", "labels/{}", "labels/{}/classes.txt"),  # labelImg
        ("{}/images", "{}/labels", "{}/labels/classes.txt"),
        ("{}/images", "{}/labels", "{}/classes.txt"),
        ("{}", "{}", "{}/_darknet.labels"),  # Roboflow
    ],
)
def test_lists_of_classes_beside_the_labels_of_a_split(tmp_path: Path, images: str, labels: str, name: str) -> None:
    for split in ("train", "valid"):
        write_images(tmp_path / images.format(split))
        write_labels(tmp_path / labels.format(split))
    write_text(tmp_path / name.format("train"), "cat\ndog\nfox\n")
    write_text(tmp_path / name.format("valid"), "cat\ndog\n")  # its numbers mean the same
    dataset = load_detection_dataset(tmp_path, check_files=False)
    assert class_names_of(dataset) == ["cat", "dog", "fox"]
    assert {split: objects_of(rows) for split, rows in dataset.items()} == {"train": OBJECTS, "validation": OBJECTS}
    write_text(tmp_path / name.format("valid"), "dog\ncat\n")
    files = f"{tmp_path / name.format('train')} and {tmp_path / name.format('valid')} number the classes differently"
    with pytest.raises(InvalidDatasetError, match=re.escape(files)):
        load_detection_dataset(tmp_path, check_files=False)


def test_fractions_are_of_the_upright_image(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    exif = PILImage.Exif()
    exif[0x0112] = 6  # stored 40 x 30, seen 30 x 40
    image = tmp_path / "images" / "a.png"
    PILImage.open(image).save(image, exif=exif)
    write_text(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.2 0.2\n")
    train = load_detection_dataset(tmp_path)["train"]
    assert (train[0]["width"], train[0]["height"]) == (30, 40)
    assert objects_of(train)["a.png"] == [("cat", [12, 16, 6, 8])]


def test_columns_cannot_be_grouped_by(tmp_path: Path) -> None:
    with pytest.raises(InvalidDatasetError, match="YOLO has no fields to group by"):
        load_detection_dataset(write_yolo(tmp_path), validation_fraction=0.5, group_by="patient")


def test_problems_name_file_and_line(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    write_text(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.2 0.2\n0 20 15 8 6\n")
    problems = ProblemLog("error")
    dataset = read_detection_dataset(tmp_path, problems)
    assert dataset is not None
    assert objects_of(dataset["train"])["a.png"] == [("cat", [16, 12, 8, 6])]
    (problem,) = problems.examples["box not in fractions"]
    assert f"{tmp_path / 'labels' / 'a.txt'}, line 2: '20 15 8 6'" in problem.what
    assert problem.image == str(tmp_path / "images" / "a.png")


def test_images_in_no_split_are_told_of(tmp_path: Path) -> None:
    for folder in ("train", "val", "extra", "."):
        write_images(tmp_path / "images" / folder)
        write_labels(tmp_path / "labels" / folder)
    problems = ProblemLog("error")
    dataset = read_detection_dataset(tmp_path, problems)
    assert dataset is not None and set(dataset) == {"train", "validation"}
    assert problems.counts["image without annotations"] == 2 * len(OBJECTS)


def test_images_of_a_split_of_unknown_name_are_told_of(tmp_path: Path) -> None:
    for split in ("train", "eval", "holdout"):
        write_images(tmp_path / split / "images")
        write_labels(tmp_path / split / "labels")
    problems = ProblemLog("error")
    dataset = read_detection_dataset(tmp_path, problems, check_files=False)
    assert dataset is not None and list(dataset) == ["train", "validation"]
    assert [problem.where for problem in problems.examples["image without annotations"]] == [
        str(tmp_path / "holdout" / "images" / name) for name in OBJECTS
    ]


def test_what_notebooks_and_macos_leave_is_no_image(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    write_images(tmp_path / "images" / ".ipynb_checkpoints", ("a-checkpoint.png",))
    for name in ("images/._a.png", "labels/._a.txt"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    problems = ProblemLog("error")
    dataset = read_detection_dataset(tmp_path, problems)
    assert dataset is not None and objects_of(dataset["train"]) == OBJECTS and not problems.counts


def test_folders_that_are_linked_are_read_once(tmp_path: Path) -> None:
    write_yolo(tmp_path / "data")
    (tmp_path / "data" / "images" / "cam2").symlink_to(write_images(tmp_path / "elsewhere", ("c.png",)))
    (tmp_path / "data" / "images" / "cam3").symlink_to(tmp_path / "data" / "images")
    write_text(tmp_path / "data" / "labels" / "cam2" / "c.txt", yolo_lines(OBJECTS["a.png"]))
    problems = ProblemLog("error")
    dataset = read_detection_dataset(tmp_path / "data", problems)
    assert dataset is not None and objects_of(dataset["train"]) == OBJECTS | {"c.png": OBJECTS["a.png"]}
    assert dict(problems.counts) == {
        "images outside the data set's folder": 1,
        "same image twice in a split": 1,  # it is that of a.png
    }


@pytest.mark.parametrize("described", [True, False])
def test_labels_in_a_folder_without_images_are_reported(tmp_path: Path, described: bool) -> None:
    write_yolo(tmp_path)
    if not described:
        (tmp_path / "data.yaml").unlink()
    write_labels(tmp_path / "labels" / "cam2")
    with pytest.raises(InvalidDatasetError, match=r'2 problems(.|\n)*cam2/a\.txt: there is no image "a"'):
        load_detection_dataset(tmp_path)
