import logging
from pathlib import Path

import pytest
from coco_folder import coco_content, write_coco, write_images, write_json
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, NamedSplit, Value, load_dataset
from PIL import Image as PILImage

from dit_detection.data import InvalidDatasetError, class_names_of, id2label_of, load_detection_dataset
from dit_detection.data.layouts import split_of

SHARED = Path(__file__).parents[2] / "shared" / "data"

ROWS = [  # of the folder that coco_folder writes, worked out by hand: labels follow the ids 2 (cat) and 5 (dog)
    {"id": [2], "bbox": [[0.5, 0, 4, 30]], "category": [0], "area": [120], "iscrowd": [0]},
    {
        "id": [1, 3],
        "bbox": [[1, 2, 10, 8], [30, 20, 10, 10]],
        "category": [1, 0],
        "area": [80, 50.5],
        "iscrowd": [0, 1],
    },
]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("bccd", {"train": (205, [214, 2381, 209]), "validation": (87, [87, 967, 83]), "test": (72, [71, 805, 69])}),
        (
            "cards",
            {
                "train": (252, [77, 71, 70, 72, 81, 75]),
                "validation": (44, [12, 11, 19, 8, 14, 17]),
                "test": (67, [26, 18, 24, 26, 23, 26]),
            },
        ),
        (
            "microcontrollers",
            {"train": (94, [29, 31, 28, 28]), "validation": (28, [7, 7, 7, 7]), "test": (27, [7, 9, 9, 8])},
        ),
    ],
)
def test_shared_data_has_the_counts_of_its_readme(name: str, counts: dict) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip("no shared data here")
    dataset = load_detection_dataset(SHARED / name)
    for split, (num_images, per_class) in counts.items():
        assert len(dataset[split]) == num_images
        labels = [label for objects in dataset[split]["objects"] for label in objects["category"]]
        assert [labels.count(label) for label in range(len(per_class))] == per_class
    assert dataset["train"][0]["image"].size == (dataset["train"][0]["width"], dataset["train"][0]["height"])


def test_row_format(tmp_path: Path) -> None:
    dataset = load_detection_dataset(str(write_coco(tmp_path)))
    assert list(dataset) == ["train"]
    train = dataset["train"]
    assert list(train.features) == ["image", "image_id", "width", "height", "objects"]
    assert [list(train[column]) for column in ("image_id", "width", "height")] == [[7, 9], [40, 40], [30, 30]]
    assert list(train["objects"]) == ROWS
    assert class_names_of(dataset) == class_names_of(train) == ["cat", "dog"]
    assert id2label_of(dataset) == {0: "cat", 1: "dog"}
    encoded = train.cast_column("image", Image(decode=False))[0]["image"]
    assert encoded == {"bytes": None, "path": str(tmp_path / "images" / "a.png")}


@pytest.mark.parametrize(
    ("json_file", "image_folder", "split"),
    [
        ("annotations_val.json", "images", "validation"),
        ("annotations_val.json", "images/val", "validation"),
        ("annotations_test.json", ".", "test"),
        ("annotations/instances_train2017.json", "train2017", "train"),
        ("annotations/instances_train2017.json", "images/train2017", "train"),
        ("annotations/instances_val2017.json", "images/val", "validation"),
        ("annotations/test.json", "images", "test"),
        ("train/_annotations.coco.json", "train", "train"),
        ("valid/_annotations.coco.json", "valid", "validation"),
        ("validation/annotations.json", "validation/images", "validation"),
        ("_annotations.coco.json", ".", "train"),
        ("result.json", "images", "train"),
    ],
)
def test_layouts(tmp_path: Path, json_file: str, image_folder: str, split: str) -> None:
    write_json(tmp_path / json_file, coco_content())
    write_images(tmp_path / image_folder)
    dataset = load_detection_dataset(tmp_path)
    assert list(dataset) == [split]
    assert list(dataset[split]["objects"]) == ROWS


def test_coco_folder_with_captions_beside_the_instances(tmp_path: Path) -> None:
    for split in ("train2017", "val2017"):
        write_json(tmp_path / "annotations" / f"instances_{split}.json", coco_content())
        write_json(tmp_path / "annotations" / f"captions_{split}.json", {"annotations": []})
        write_images(tmp_path / split)
    dataset = load_detection_dataset(tmp_path)
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 2, "validation": 2}


def test_single_json_file_is_train_whatever_its_name(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    dataset = load_detection_dataset(write_json(tmp_path / "my_test_boxes.json", coco_content()))
    assert list(dataset) == ["train"]


def test_two_files_for_one_split(tmp_path: Path) -> None:
    write_coco(tmp_path)
    write_json(tmp_path / "train_old.json", coco_content())
    with pytest.raises(InvalidDatasetError, match=r'split "train": .*_train.json, .*train_old.json. Remove'):
        load_detection_dataset(tmp_path)


@pytest.mark.parametrize(
    ("files", "splits", "unused"),
    [
        ({"annotations/instances_default.json": "images/default", "annotations/instances_val.json": "images/val"},
         ["train", "validation"], None),  # CVAT
        ({"annotations/instances_default.json": "images/default", "annotations/instances_train.json": "images/train"},
         ["train"], "instances_default.json"),
        ({"annotations/voc_trainval.json": "images", "annotations/voc_test.json": "images"}, ["train", "test"], None),
        ({"annotations.json": "images", "annotations_val.json": "images"}, ["train", "validation"], None),
        ({"annotations.json": "images", "annotations_train.json": "images"}, ["train"], "annotations.json"),
        ({"train/_annotations.coco.json": "train", "eval/_annotations.coco.json": "eval"}, ["train", "validation"],
         None),
        ({"annotations/instances_train2017.json": "train2017", "annotations/image_info_test2017.json": "test2017"},
         ["train"], "image_info_test2017.json"),
    ],
)  # fmt: skip
def test_files_that_name_no_split(
    tmp_path: Path, files: dict[str, str], splits: list[str], unused: str | None, caplog
) -> None:
    for name, images in files.items():
        content = coco_content()
        if "image_info" in name:
            del content["annotations"]
        write_json(tmp_path / name, content)
        write_images(tmp_path / images)
    write_json(tmp_path / "notes.json", {"year": 2024})
    dataset = load_detection_dataset(tmp_path, check_files=False)
    assert list(dataset) == splits
    assert all(list(rows["objects"]) == ROWS for rows in dataset.values())
    said = [message for message in caplog.messages if "annotation file in no split" in message]
    assert len(said) == (unused is not None) and all("1 x" in message and str(unused) in message for message in said)


@pytest.mark.parametrize(
    ("json_file", "images"),
    [
        ("labels.json", "data"),  # FiftyOne
        ("train/labels.json", "train/data"),
        ("annotations/train.json", "train2017"),
    ],
)
def test_images_in_other_folders(tmp_path: Path, json_file: str, images: str) -> None:
    write_json(tmp_path / json_file, coco_content())
    write_images(tmp_path / images)
    assert list(load_detection_dataset(tmp_path)["train"]["objects"]) == ROWS


def test_a_json_that_is_not_coco_is_no_split(tmp_path: Path, caplog) -> None:
    write_coco(tmp_path)
    write_json(tmp_path / "val_results.json", [{"image_id": 7, "category_id": 2, "bbox": [0, 0, 4, 4], "score": 0.5}])
    write_json(tmp_path / "train_config.json", {"lr": 1})
    with caplog.at_level(logging.WARNING):
        assert list(load_detection_dataset(tmp_path)) == ["train"]
    assert "2 x annotation file in no split" in caplog.text
    for damaged in ("", "version https://git-lfs.github.com/spec/v1", '{"images": [{"id": 1'):  # meant to be a split
        write_json(tmp_path / "annotations_val.json", damaged)
        with pytest.raises(InvalidDatasetError, match=r"annotations_val.json"):
            load_detection_dataset(tmp_path)


@pytest.mark.parametrize(
    ("root", "used", "classes"),
    [
        ("cells", [], ["cat", "dog"]),
        ("cells", ["valid"], ["cells", "cat", "dog"]),  # it is a class after all
        ("dog", [], ["cat", "dog"]),  # a project called as its class: the other one is meant
    ],
)
def test_the_category_above_others_of_roboflow(tmp_path: Path, root: str, used: list, classes: list, caplog) -> None:
    for split in ("train", "valid"):
        content = coco_content()
        below = [category | {"supercategory": root} for category in content["categories"]]
        content["categories"] = [{"id": 0, "name": root, "supercategory": "none"}, *below]
        if split in used:
            content["annotations"][0]["category_id"] = 0
        write_json(tmp_path / split / "_annotations.coco.json", content)
        write_images(tmp_path / split)
    dataset = load_detection_dataset(tmp_path, check_files=False)
    assert class_names_of(dataset) == classes
    labels = [row["category"] for row in dataset["train"]["objects"]]
    assert [[classes[label] for label in row] for row in labels] == [["cat"], ["dog", "cat"]]
    assert ("category 'cells' stands above others" in caplog.text) == (root == "cells" and not used)


def test_several_files_that_name_no_split(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    for name in ("a.json", "b.json", "annotations_val.json"):
        write_json(tmp_path / name, coco_content())
    with pytest.raises(InvalidDatasetError, match=r'split "train": .*a\.json, .*b\.json. Remove all but one'):
        load_detection_dataset(tmp_path)


def test_split_names() -> None:
    names = ["instances_train2017", "valid", "my_validation_set", "TEST-00000", "trainer", "latest", "train_val"]
    assert [split_of(name) for name in names] == [
        "train",
        "validation",
        "validation",
        "test",
        None,
        None,
        "validation",
    ]
    assert [split_of(name) for name in ("eval", "evaluation_2", "medieval")] == ["validation", "validation", None]


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere"])
def test_source_that_does_not_exist(source: str) -> None:
    with pytest.raises(InvalidDatasetError, match=r"does not exist. Check the path"):
        load_detection_dataset(source)


def test_folder_without_annotations(tmp_path: Path) -> None:
    write_images(tmp_path)
    with pytest.raises(InvalidDatasetError, match=r"holds no annotations that are known(.|\n)*Found: 2 x .png"):
        load_detection_dataset(tmp_path)


def test_file_that_is_no_json(tmp_path: Path) -> None:
    write_images(tmp_path)
    with pytest.raises(InvalidDatasetError, match=r"a.png: is no file of annotations: known are .json"):
        load_detection_dataset(tmp_path / "a.png")


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_invalid is 'skip'"):
        load_detection_dataset(tmp_path, on_invalid="skip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="validation_fraction is"):
        load_detection_dataset(tmp_path, validation_fraction=1.5)


def test_validation_fraction(tmp_path: Path) -> None:
    content = coco_content()
    names = tuple(f"{index}.png" for index in range(10))
    content["images"] = [
        {"id": index, "file_name": name, "width": 40, "height": 30} for index, name in enumerate(names)
    ]
    for annotation in content["annotations"]:
        annotation["image_id"] = 3
    write_images(tmp_path / "images", names)
    write_json(tmp_path / "annotations_train.json", content)
    parts = load_detection_dataset(tmp_path, validation_fraction=0.3, seed=1)
    ids = {split: list(rows["image_id"]) for split, rows in parts.items()}
    assert len(ids["validation"]) == 3
    assert sorted(ids["train"] + ids["validation"]) == list(range(10))
    again = load_detection_dataset(tmp_path, validation_fraction=0.3, seed=1)
    other = load_detection_dataset(tmp_path, validation_fraction=0.3, seed=2)
    assert list(again["validation"]["image_id"]) == ids["validation"] != list(other["validation"]["image_id"])
    write_json(tmp_path / "annotations_val.json", content)
    assert len(load_detection_dataset(tmp_path, validation_fraction=0.3)["train"]) == 10


def test_sizes_are_read_from_the_files_where_the_json_has_none(tmp_path: Path) -> None:
    content = coco_content()
    for image in content["images"]:
        del image["width"], image["height"]
    dataset = load_detection_dataset(write_coco(tmp_path, content), check_files=False)
    assert list(dataset["train"]["width"]) == [40, 40]


@pytest.mark.parametrize(("width", "height", "ignored"), [(30, 40, False), (40, 30, True)])
def test_exif_orientation(tmp_path: Path, caplog, width: int, height: int, ignored: bool) -> None:
    content = coco_content()
    for image in content["images"]:
        image["width"], image["height"] = width, height
    content["annotations"] = content["annotations"][:1]
    write_coco(tmp_path, content)
    for name in ("a.png", "b.png"):
        exif = PILImage.Exif()
        exif[0x0112] = 6  # stored 40 x 30, seen 30 x 40
        PILImage.open(tmp_path / "images" / name).save(tmp_path / "images" / name, exif=exif)
    with caplog.at_level(logging.WARNING):
        load_detection_dataset(tmp_path)
    assert ("2 images are annotated as they are stored, without their EXIF orientation" in caplog.text) == ignored


def test_parquet_round_trip(tmp_path: Path) -> None:
    dataset = load_detection_dataset(write_coco(tmp_path / "coco"))
    dataset["train"].to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    again = load_detection_dataset(tmp_path / "hub")
    assert again["train"].features == dataset["train"].features
    assert again["train"].to_list() == dataset["train"].to_list()


def test_official_scripts_read_our_parquet(tmp_path: Path) -> None:
    dataset = load_detection_dataset(write_coco(tmp_path / "coco"))
    dataset["train"].to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    loaded = load_dataset(str(tmp_path / "hub"))["train"]
    assert loaded.features["objects"]["category"].feature.names == ["cat", "dog"]
    assert loaded[0]["image"].size == (40, 30)


def test_save_to_disk_round_trip(tmp_path: Path) -> None:
    dataset = load_detection_dataset(write_coco(tmp_path / "coco"))
    dataset.save_to_disk(str(tmp_path / "all"))
    dataset["train"].save_to_disk(str(tmp_path / "one"))
    for folder in ("all", "one"):
        again = load_detection_dataset(tmp_path / folder)["train"]  # with the images' bytes in place of their paths
        assert again.features == dataset["train"].features
        assert again.remove_columns("image").to_list() == dataset["train"].remove_columns("image").to_list()
        assert again[1]["image"].tobytes() == dataset["train"][1]["image"].tobytes()


def hub_rows(category: object = None) -> Dataset:
    """Two rows as CPPE-5 has them, without sizes and with ids that start again in each image."""
    images = [PILImage.new("RGB", (40, 30)), PILImage.new("L", (20, 20))]
    objects = [
        {"id": [0, 1], "area": [100, 16], "bbox": [[0.0, 0, 10, 10], [5.0, 5, 4, 4]], "category": [1, 0]},
        {"id": [0], "area": [4], "bbox": [[18.0, 18, 2, 2]], "category": [1]},
    ]
    fields = {"id": List(Value("int64")), "area": List(Value("int64")), "bbox": List(List(Value("float32"), length=4))}
    fields["category"] = List(category or ClassLabel(names=["mask", "glove"]))
    return Dataset.from_dict(
        {"image_id": [15, 11], "image": images, "objects": objects},
        features=Features({"image_id": Value("int64"), "image": Image(), "objects": fields}),
    )


def test_objects_column() -> None:
    rows = hub_rows()
    train = load_detection_dataset(DatasetDict({"train": rows, "dev": rows.select([1])}))
    assert list(train) == ["train", "validation"]
    row = train["train"][0]
    assert (row["image_id"], row["width"], row["height"]) == (15, 40, 30)
    assert row["objects"] == {
        "id": [0, 1],
        "bbox": [[0, 0, 10, 10], [5, 5, 4, 4]],
        "category": [1, 0],
        "area": [100, 16],
        "iscrowd": [0, 0],
    }
    assert train["train"][1]["objects"]["id"] == [2]  # numbered: 0 is taken
    assert class_names_of(train) == ["mask", "glove"]


def test_objects_column_with_integers_or_names_for_classes() -> None:
    integers = load_detection_dataset(hub_rows(Value("int64")))
    assert class_names_of(integers) == ["0", "1"]
    rows = hub_rows().cast_column("objects", hub_rows(Value("string")).features["objects"])
    names = load_detection_dataset(rows)
    assert class_names_of(names) == ["0", "1"]
    assert names["train"][0]["objects"]["category"] == [1, 0]


def test_classes_that_are_named_by_integers_are_matched_by_them() -> None:
    """What is read with the names of a detector, as to evaluate it, has the labels with which it was trained."""
    rows = hub_rows(Value("int64"))
    rows = rows.map(
        lambda row: {"objects": row["objects"] | {"category": [n + 1 for n in row["objects"]["category"]]}}
    )
    trained = load_detection_dataset(rows)
    assert class_names_of(trained) == ["1", "2"]
    again = load_detection_dataset(rows, class_names=["1", "2", "3"])
    assert class_names_of(again) == ["1", "2", "3"]
    assert again["train"]["objects"][0]["category"] == trained["train"]["objects"][0]["category"] == [1, 0]


def test_objects_column_with_nothing_for_an_empty_list() -> None:
    rows = hub_rows()
    objects = [*rows["objects"][:1], dict.fromkeys(("id", "area", "bbox", "category"))]
    rows = rows.remove_columns("objects").add_column("objects", objects, feature=rows.features["objects"])
    assert rows[1]["objects"]["bbox"] is None
    assert load_detection_dataset(rows)["train"]["objects"][1]["bbox"] == []
    names = rows.cast_column("objects", hub_rows(Value("string")).features["objects"])
    assert load_detection_dataset(names)["train"]["objects"][1]["category"] == []


def test_objects_column_of_a_shuffled_and_transformed_data_set() -> None:
    rows = hub_rows().select([1, 0]).with_transform(lambda batch: batch)
    dataset = load_detection_dataset(rows)
    assert list(dataset["train"]["image_id"]) == [11, 15]
    assert [image.size for image in dataset["train"]["image"]] == [(20, 20), (40, 30)]


def test_objects_column_missing() -> None:
    with pytest.raises(InvalidDatasetError, match=r'split "train" needs the columns "image" and "objects"'):
        load_detection_dataset(hub_rows().remove_columns("objects"))


def test_classes_that_differ_between_splits() -> None:
    other = hub_rows(ClassLabel(names=["glove", "mask"]))
    with pytest.raises(InvalidDatasetError, match=r'"train" has mask, glove; "test" has glove, mask. Cast all'):
        load_detection_dataset(DatasetDict({"train": hub_rows(), "test": other}))


def test_split_of_unknown_name() -> None:
    with pytest.raises(InvalidDatasetError, match='"unlabelled" is none of train, validation, test'):
        load_detection_dataset(DatasetDict({"train": hub_rows(), "unlabelled": hub_rows()}))


def test_damage_in_an_objects_column_names_the_row() -> None:
    rows = hub_rows().to_list()
    rows[1]["objects"]["bbox"][0] = [18.0, 18, 20, 2]
    damaged = Dataset.from_list(rows, features=hub_rows().features)
    with pytest.raises(InvalidDatasetError, match=r'"train": annotation 0 of image 11 \("row 1"\).*20 x 20 pixels'):
        load_detection_dataset(damaged)
    assert load_detection_dataset(damaged, on_invalid="clip")["train"][1]["objects"]["bbox"] == [[18, 18, 2, 2]]
    assert load_detection_dataset(damaged, on_invalid="drop")["train"][1]["objects"]["bbox"] == []


def test_the_upright_box_around_a_rotated_one(tmp_path: Path, caplog) -> None:
    content = coco_content()
    # As CVAT exports a rectangle of 20 x 6 that is turned about its middle, (16, 15).
    content["annotations"] = [
        {"id": index, "image_id": 7, "category_id": 2, "bbox": [6, 12, 20, 6], "area": 120,
         "attributes": {"occluded": False, "rotation": rotation}}
        for index, rotation in enumerate((0.0, 90.0, 45, 180.0, "left"))
    ]  # fmt: skip
    objects = load_detection_dataset(write_coco(tmp_path, content))["train"][0]["objects"]
    half = 13 / 2**0.5
    expected = [[6, 12, 20, 6], [13, 5, 6, 20], [16 - half, 15 - half, 2 * half, 2 * half], *[[6, 12, 20, 6]] * 2]
    assert [box == pytest.approx(other) for box, other in zip(objects["bbox"], expected, strict=True)] == [True] * 5
    assert objects["area"] == [120] * 5
    assert "2 x rotated box: the upright box around it is taken." in caplog.text


def test_crowd_regions_alone_are_nothing_to_learn_from(tmp_path: Path) -> None:
    content = coco_content()
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    with pytest.raises(
        InvalidDatasetError, match=r"all 3 objects are crowd regions, .*CVAT.* polygons(.|\n)*no objects"
    ):
        load_detection_dataset(write_coco(tmp_path, content))


def test_a_mix_of_splits_with_train_is_train() -> None:
    rows = hub_rows()
    mixed = Dataset(rows.data, info=rows.info, split=NamedSplit("train+validation"))
    assert list(load_detection_dataset(mixed)) == ["train"]
