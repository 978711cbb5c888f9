import logging
import os
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from annotation_folders import OBJECTS, copy_as_voc, copy_as_yolo, objects_of, write_text, write_voc, write_yolo
from coco_folder import coco_content, write_coco, write_images, write_json
from datasets import Dataset, DatasetDict, Image, concatenate_datasets
from PIL import Image as PILImage

from dit_detection.data import InvalidDatasetError, load_detection_dataset
from dit_detection.data.duplicates import find_duplicate_images


def write_many(folder: Path, colours: list[int], **fields: list[object]) -> Path:
    """A COCO folder with an image of one colour for each number, and with these fields in the entries of images."""
    content = coco_content()
    (folder / "images").mkdir(parents=True)
    content["images"] = []
    for index, colour in enumerate(colours):
        PILImage.new("RGB", (40, 30), (colour, 0, 0)).save(folder / "images" / f"{index}.png")
        more = {name: values[index] for name, values in fields.items()}
        content["images"].append({"id": index, "file_name": f"{index}.png", "width": 40, "height": 30, **more})
    for annotation in content["annotations"]:
        annotation["image_id"] = 3
    write_json(folder / "annotations_train.json", content)
    return folder


def ids_of(dataset: DatasetDict) -> dict[str, list[int]]:
    return {split: list(rows["image_id"]) for split, rows in dataset.items()}


def test_validation_and_test_are_set_aside(tmp_path: Path) -> None:
    write_many(tmp_path, list(range(20)))
    ids = ids_of(load_detection_dataset(tmp_path, validation_fraction=0.2, test_fraction=0.3, seed=3))
    assert [len(ids[split]) for split in ("train", "validation", "test")] == [10, 4, 6]
    assert sorted(chain.from_iterable(ids.values())) == list(range(20))
    assert ids_of(load_detection_dataset(tmp_path, validation_fraction=0.2, test_fraction=0.3, seed=3)) == ids
    assert ids_of(load_detection_dataset(tmp_path, validation_fraction=0.2, test_fraction=0.3, seed=4)) != ids
    validation = ids_of(load_detection_dataset(tmp_path, validation_fraction=0.2, seed=3))["validation"]
    assert validation == ids["validation"]  # whether or not test images are set aside, too


def test_a_split_that_is_there_is_kept(tmp_path: Path) -> None:
    write_many(tmp_path, list(range(20)))
    content = coco_content()
    write_images(tmp_path / "images")
    write_json(tmp_path / "annotations_test.json", content)
    ids = ids_of(load_detection_dataset(tmp_path, validation_fraction=0.2, test_fraction=0.3))
    assert ids["test"] == [7, 9]
    assert [len(ids["train"]), len(ids["validation"])] == [16, 4]


@pytest.mark.parametrize("seed", range(4))
def test_groups_stay_together(tmp_path: Path, seed: int) -> None:
    patients = [f"p{index}" for index in np.random.default_rng(seed).integers(0, 9, 30)]
    write_many(tmp_path, list(range(30)), patient=patients)
    ids = ids_of(
        load_detection_dataset(tmp_path, validation_fraction=0.2, test_fraction=0.2, group_by="patient", seed=seed)
    )
    groups = {split: {patients[index] for index in indices} for split, indices in ids.items()}
    assert sum(map(len, groups.values())) == len(set(patients))
    assert sorted(chain.from_iterable(ids.values())) == list(range(30))
    largest = max(patients.count(patient) for patient in patients)
    assert 6 <= len(ids["validation"]) < 6 + largest
    assert 6 <= len(ids["test"]) < 6 + largest


def test_same_images_stay_together(tmp_path: Path, caplog) -> None:
    write_many(tmp_path, [index // 2 for index in range(20)])
    with caplog.at_level(logging.WARNING):
        ids = ids_of(load_detection_dataset(tmp_path, validation_fraction=0.3))
    assert {index // 2 for index in ids["train"]} & {index // 2 for index in ids["validation"]} == set()
    assert "10 x same image twice in a split" in caplog.text
    assert "same image in two splits" not in caplog.text


@pytest.mark.parametrize("options", [{"check_files": False}, {"streaming": True}])
def test_same_images_stay_together_where_files_are_not_checked(tmp_path: Path, options: dict) -> None:
    write_many(tmp_path, [index // 2 for index in range(20)])
    dataset = load_detection_dataset(tmp_path, validation_fraction=0.3, **options)
    ids = {split: [row["image_id"] for row in rows] for split, rows in dataset.items()}
    assert len(ids["validation"]) == 6
    assert {index // 2 for index in ids["train"]} & {index // 2 for index in ids["validation"]} == set()


def test_groups_that_share_an_image_stay_together(tmp_path: Path) -> None:
    # Patients a and b share the image of colour 0, b and c that of colour 1: only d can be set aside, or all others.
    write_many(tmp_path, [0, 0, 1, 1, 2, 3], patient=["a", "b", "b", "c", "c", "d"])
    for seed in range(3):
        ids = ids_of(load_detection_dataset(tmp_path, validation_fraction=0.2, group_by="patient", seed=seed))
        assert sorted(ids.values()) == [[0, 1, 2, 3, 4], [5]]


def test_groups_of_a_data_set_in_memory() -> None:
    images = [PILImage.new("RGB", (40, 30), (index, 0, 0)) for index in range(6)]
    objects = [{"bbox": [[1.0, 1, 5, 5]], "category": ["cat"]}] * 6
    rows = Dataset.from_dict({"image": images, "objects": objects, "place": [1, 2, 3, 3, 2, 1]})
    rows = rows.cast_column("image", Image())
    parts = load_detection_dataset(rows, validation_fraction=0.3, group_by="place")
    assert sorted(map(len, parts.values())) == [2, 4]
    assert sum(parts["validation"]["image_id"]) == 5  # 0 and 5, 1 and 4, or 2 and 3
    with pytest.raises(InvalidDatasetError, match=r"group_by is 'town', but it has the columns image, objects, place"):
        load_detection_dataset(rows, validation_fraction=0.3, group_by="town")


def test_group_that_is_missing(tmp_path: Path) -> None:
    write_many(tmp_path, [0, 1, 2, 3], patient=["a", None, "b", ""])
    with pytest.raises(InvalidDatasetError, match=r'image 1 \("1.png"\): field "patient" is missing(.|\n)*2 x'):
        load_detection_dataset(tmp_path, validation_fraction=0.5, group_by="patient")
    with pytest.raises(InvalidDatasetError, match="group_by is 'town', but no image has that field"):
        load_detection_dataset(tmp_path, validation_fraction=0.5, group_by="town")


def test_groups_of_splits_that_are_there(tmp_path: Path, caplog) -> None:
    write_many(tmp_path, [0, 1, 2, 3], patient=["a", "b", "b", "b"])
    (tmp_path / "annotations_val.json").write_text((tmp_path / "annotations_train.json").read_text())
    with caplog.at_level(logging.WARNING):
        load_detection_dataset(tmp_path, group_by="patient")
    assert "2 x same group in two splits" in caplog.text


def test_too_few_images(tmp_path: Path) -> None:
    write_many(tmp_path, [0, 1, 2, 3], patient=["a", "a", "b", "b"])
    with pytest.raises(ValueError, match='"train" has 2 images or groups of images; that is too few'):
        load_detection_dataset(tmp_path, validation_fraction=0.3, test_fraction=0.3, group_by="patient")


def test_fractions_that_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave nothing to train on"):
        load_detection_dataset(tmp_path, validation_fraction=0.5, test_fraction=0.5)
    with pytest.raises(ValueError, match="test_fraction is 0; it must lie between"):
        load_detection_dataset(tmp_path, test_fraction=0)


def test_image_in_two_splits_is_reported(tmp_path: Path, caplog) -> None:
    write_coco(tmp_path)
    content = coco_content()
    content["images"][0]["file_name"] = "c.png"
    write_json(tmp_path / "annotations_test.json", content)
    images = tmp_path / "images"
    (images / "c.png").write_bytes((images / "a.png").read_bytes())
    with caplog.at_level(logging.WARNING):
        dataset = load_detection_dataset(tmp_path)
    assert "2 x same image in two splits: " in caplog.text
    assert '"train" image 7 and "test" image 7: 2 times the same content' in caplog.text
    assert find_duplicate_images(dataset) == [[("train", 0), ("test", 0)], [("train", 1), ("test", 1)]]


def test_duplicates_are_found_whatever_holds_the_images(tmp_path: Path) -> None:
    # Against all bytes compared with all others: files, copies of files, and embedded bytes, in shuffled order.
    rng = np.random.default_rng(0)
    contents = [bytes(rng.integers(0, 4, rng.integers(1, 3)).astype(np.uint8)) for _ in range(60)]
    rows = []
    for index, content in enumerate(contents):
        file = tmp_path / f"{index}.png"
        file.write_bytes(content)
        rows.append({"bytes": content, "path": None} if index % 2 else {"bytes": None, "path": str(file)})
    images = Dataset.from_dict({"image": rows}).cast_column("image", Image(decode=False))
    order = {"train": rng.permutation(60)[:40], "test": rng.permutation(60)[:30]}
    splits = {split: images.select(indices) for split, indices in order.items()}
    found = find_duplicate_images(splits)
    by_content: dict[bytes, list[tuple[str, int]]] = {}
    for split, indices in order.items():
        for row, index in enumerate(indices):
            by_content.setdefault(contents[index], []).append((split, row))
    expected = [places for places in by_content.values() if len(places) > 1]
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))


def test_only_files_of_equal_size_are_read(tmp_path: Path, monkeypatch) -> None:
    for size in range(1, 6):
        (tmp_path / f"{size}.png").write_bytes(b"x" * size)
    paths = [str(tmp_path / f"{size}.png") for size in range(1, 6)] + [str(tmp_path / "missing.png")]
    images = Dataset.from_dict({"image": paths}).cast_column("image", Image())
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("opened"))
    assert find_duplicate_images({"train": images}) == []
    twice = concatenate_datasets([images, images])  # the same path needs no reading either
    assert len(find_duplicate_images({"train": twice})) == 6


def test_formats_that_lie_side_by_side(tmp_path: Path) -> None:
    write_yolo(write_voc(tmp_path))
    with pytest.raises(InvalidDatasetError, match=r"several annotation formats: voc \(.*xml\), yolo \(.*yaml\)"):
        load_detection_dataset(tmp_path)
    for name in ("voc", "yolo"):
        assert objects_of(load_detection_dataset(tmp_path, format=name)["train"]) == OBJECTS
    with pytest.raises(InvalidDatasetError, match='holds nothing of the format "coco"'):
        load_detection_dataset(tmp_path, format="coco")
    with pytest.raises(InvalidDatasetError, match='is a file of the format "yolo", not "coco"'):
        load_detection_dataset(tmp_path / "data.yaml", format="coco")
    with pytest.raises(ValueError, match="format is 'csv'; it must be one of coco, voc, yolo"):
        load_detection_dataset(tmp_path, format="csv")  # type: ignore[arg-type]


def test_json_of_other_things_beside_annotations(tmp_path: Path) -> None:
    for index, write in enumerate((write_coco, write_voc, write_yolo)):
        folder = write(tmp_path / str(index))
        write_json(folder / "dataset_infos.json", {"default": {"features": {}}})
        write_json(folder / "train_notes.json", {"categories": [], "info": {}})
        assert list(objects_of(load_detection_dataset(folder)["train"])) == ["a.png", "b.png"]


def test_label_studio_exports_of_coco(tmp_path: Path) -> None:
    content = coco_content()
    content["images"][0]["file_name"] = "images\\1f2e3d4c-a.png"  # exported without the prefix that uploading adds
    content["images"][1]["file_name"] = "images/b.png"
    write_images(tmp_path / "images")
    write_json(tmp_path / "result.json", content)
    train = load_detection_dataset(tmp_path)["train"]
    assert list(objects_of(train)) == ["a.png", "b.png"]


def test_classes_of_another_data_set(tmp_path: Path) -> None:
    write_coco(tmp_path)
    assert list(load_detection_dataset(tmp_path, class_names=["dog", "fox", "cat"])["train"]["objects"])[1][
        "category"
    ] == [0, 2]
    message = r"annotation 1 of image 9 .*class 'dog' is none of class_names: cat\n"
    with pytest.raises(InvalidDatasetError, match=message):
        load_detection_dataset(tmp_path, class_names=["cat"])
    for names in ([], ["cat", "cat"]):
        with pytest.raises(ValueError, match="class_names is"):
            load_detection_dataset(tmp_path, class_names=names)


def test_same_rows_in_all_formats(tmp_path: Path) -> None:
    content = coco_content()
    del content["annotations"][2]["area"], content["annotations"][2]["iscrowd"]
    coco = load_detection_dataset(write_coco(tmp_path / "coco", content))
    for copy in (copy_as_voc(coco, tmp_path / "voc"), copy_as_yolo(coco, tmp_path / "yolo")):
        dataset = load_detection_dataset(copy)
        assert dataset["train"].features == coco["train"].features
        for row, other in zip(dataset["train"], coco["train"], strict=True):
            assert row["image"].tobytes() == other["image"].tobytes()
            for field in ("bbox", "category", "area", "iscrowd"):
                assert row["objects"][field] == other["objects"][field]


@pytest.mark.parametrize("linked", ["data set", "image folder", "image within", "Hub cache"])
def test_links_that_are_fine(tmp_path: Path, linked: str, caplog) -> None:
    folder = write_coco(tmp_path / "real")
    if linked == "data set":
        (tmp_path / "link").symlink_to(folder)
        folder = tmp_path / "link"
    elif linked == "image folder":
        os.rename(folder / "images", tmp_path / "elsewhere")
        (folder / "images").symlink_to(tmp_path / "elsewhere")
    elif linked == "image within":
        os.rename(folder / "images" / "a.png", folder / "a.png")
        (folder / "images" / "a.png").symlink_to(folder / "a.png")
    else:
        blobs = tmp_path / "datasets--me--mine" / "blobs"
        os.makedirs(blobs.parent / "snapshots")
        os.rename(folder / "images", blobs)
        os.rename(folder, blobs.parent / "snapshots" / "1234")
        folder = blobs.parent / "snapshots" / "1234"
        (folder / "images").mkdir()
        for name in ("a.png", "b.png"):
            (folder / "images" / name).symlink_to(f"../../../blobs/{name}")
    with caplog.at_level(logging.WARNING):
        train = load_detection_dataset(folder)["train"]
    assert [image.size for image in train["image"]] == [(40, 30)] * 2
    assert ("images outside the data set's folder" in caplog.text) == (linked == "image folder")


def test_images_that_no_annotation_names(tmp_path: Path, caplog) -> None:
    folder = write_voc(tmp_path)
    write_images(folder / "JPEGImages", ("a.png", "b.png", "c.png"))
    write_text(folder / "JPEGImages" / "thumbs.db", "")
    with caplog.at_level(logging.WARNING):
        load_detection_dataset(folder)
    assert f"1 x image without annotations: it is not used. First: {folder / 'JPEGImages' / 'c.png'}" in caplog.text
