import logging
import os
from pathlib import Path

import pytest
from annotation_folders import (
    CLASSES,
    OBJECTS,
    copy_as_voc,
    objects_of,
    voc_xml,
    write_text,
    write_voc,
)
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


@pytest.mark.skipif(not (SHARED / "bccd" / "voc").is_dir(), reason="no shared data here")
def test_bccd_has_the_same_boxes_as_voc_and_as_coco() -> None:
    coco = load_detection_dataset(SHARED / "bccd")
    problems = ProblemLog("error")
    voc = read_detection_dataset(SHARED / "bccd" / "voc", problems, class_names=class_names_of(coco))
    assert voc is not None
    assert {split: objects_of(rows) for split, rows in voc.items()} == {
        split: objects_of(rows) for split, rows in coco.items()
    }
    for column in ("width", "height"):
        assert list(voc["test"][column]) == list(coco["test"][column])
    assert dict(problems.counts) == {"empty box": 2}  # of 4,888 objects in the XML; the JSON has 4,886
    assert [problem.box for problem in problems.examples["empty box"]] == [(181, 329, 0, 0), (504, 337, 0, 0)]
    images = [Path(problem.image or "").name for problem in problems.examples["empty box"]]
    assert images == ["BloodImage_00343.jpg", "BloodImage_00338.jpg"]


@pytest.mark.parametrize(
    ("annotations", "images", "split"),
    [
        ("Annotations", "JPEGImages", "train"),
        ("Annotations", "images", "train"),  # Label Studio
        ("voc/Annotations", "images", "train"),
        ("annotations", ".", "train"),
        (".", ".", "train"),  # labelImg
        ("train", "train", "train"),  # Roboflow
        ("valid", "valid", "validation"),
        ("test/Annotations", "test/images", "test"),
        ("Annotations/val", "JPEGImages/val", "validation"),
        ("labels", "data", "train"),  # FiftyOne
    ],
)
def test_layouts(tmp_path: Path, annotations: str, images: str, split: str) -> None:
    write_images(tmp_path / images)
    for name, objects in OBJECTS.items():
        write_text(tmp_path / annotations / f"{Path(name).stem}.xml", voc_xml(name, objects))
    dataset = load_detection_dataset(tmp_path / "voc" if annotations.startswith("voc") else tmp_path)
    assert list(dataset) == [split]
    assert objects_of(dataset[split]) == OBJECTS
    assert list(dataset[split]["width"]) == [40, 40]


def test_lists_of_single_classes_are_no_splits(tmp_path: Path, caplog) -> None:
    write_voc(tmp_path)
    main = tmp_path / "ImageSets" / "Main"
    lists = {"train": "b\n", "trainval": "a\nb\n", "test": "a", "cat_train": "a -1\nb  1\n", "cat_test": "a 1"}
    for name, text in lists.items():
        write_text(main / f"{name}.txt", text)
    write_text(tmp_path / "Annotations" / "c.xml", voc_xml("a.png", []))
    with caplog.at_level(logging.WARNING):
        dataset = load_detection_dataset(tmp_path)
    assert {split: list(objects_of(rows)) for split, rows in dataset.items()} == {
        "train": ["b.png"],
        "test": ["a.png"],
    }
    assert (
        f"1 x annotation file in no split: it is not used. First: {tmp_path / 'Annotations' / 'c.xml'}" in caplog.text
    )


@pytest.mark.parametrize("name", ["trainval", "default", "train"])
def test_list_that_is_alone_is_train_in_its_order(tmp_path: Path, name: str) -> None:
    write_text(write_voc(tmp_path) / "ImageSets" / "Main" / f"{name}.txt", "b\r\na  1\r\n\r\n")
    dataset = load_detection_dataset(tmp_path)
    assert list(dataset) == ["train"]
    assert list(objects_of(dataset["train"])) == ["b.png", "a.png"]


@pytest.mark.parametrize(
    ("lists", "line"),
    [
        ("ImageSets/{}.txt", "{}"),
        ("ImageSets/Segmentation/{}.txt", "{}"),
        ("{}.txt", "{}"),
        ("{}.txt", "./JPEGImages/{0}.png ./Annotations/{0}.xml"),  # PaddleDetection
        ("{}_list.txt", "JPEGImages/{0}.png Annotations/{0}.xml"),  # PaddleX
        ("{}.txt", "/data/VOC/JPEGImages/{}.png"),
    ],
)
def test_lists_in_other_places(tmp_path: Path, lists: str, line: str) -> None:
    write_voc(tmp_path)
    for split, name in {"train": "a", "val": "b"}.items():
        write_text(tmp_path / lists.format(split), line.format(name) + "\n")
    splits = {split: list(objects_of(rows)) for split, rows in load_detection_dataset(tmp_path).items()}
    assert splits == {"train": ["a.png"], "validation": ["b.png"]}


def test_a_list_beside_split_folders_is_none_of_theirs(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path / split)
        for name, objects in OBJECTS.items():
            write_text(tmp_path / split / f"{Path(name).stem}.xml", voc_xml(name, objects))
    write_text(tmp_path / "train.txt", "a\n")
    dataset = load_detection_dataset(tmp_path, check_files=False)
    assert {split: objects_of(rows) for split, rows in dataset.items()} == {"train": OBJECTS, "validation": OBJECTS}


def test_cvat_export(tmp_path: Path) -> None:
    write_voc(tmp_path)
    write_text(tmp_path / "ImageSets" / "Main" / "default.txt", "a\nb\n")
    labels = "# label:color_rgb:parts:actions\nbackground:0,0,0::\nperson:1,2,3:head,hand:\ndog:9,9,9::\ncat:5,5,5::\n"
    write_text(tmp_path / "labelmap.txt", labels)
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    xml = voc_xml("a.png", OBJECTS["a.png"]).replace("</object>", f"{part}</object>")
    write_text(tmp_path / "Annotations" / "a.xml", xml)
    dataset = load_detection_dataset(tmp_path)
    assert class_names_of(dataset) == ["person", "dog", "cat"]
    assert objects_of(dataset["train"]) == OBJECTS


def test_classes_are_sorted_unless_a_list_or_an_argument_orders_them(tmp_path: Path) -> None:
    write_voc(tmp_path)
    assert class_names_of(load_detection_dataset(tmp_path)) == ["cat", "dog"]
    dataset = load_detection_dataset(tmp_path, class_names=["dog", "fox", "cat"])
    assert class_names_of(dataset) == ["dog", "fox", "cat"]
    assert objects_of(dataset["train"]) == OBJECTS
    write_text(tmp_path / "classes.txt", "dog\ncat\n")
    assert class_names_of(load_detection_dataset(tmp_path)) == ["dog", "cat"]


def test_files_of_pascal_voc_count_pixels_from_one(tmp_path: Path) -> None:
    # A box over all of the 40 x 30 pixels, and one over the left upper pixel alone.
    write_voc(tmp_path)
    source = "<source><database>The VOC2007 Database</database></source>"
    objects = [("cat", [1.0, 1.0, 39.0, 29.0]), ("dog", [1.0, 1.0, 0.0, 0.0])]
    write_text(tmp_path / "Annotations" / "a.xml", voc_xml("a.png", objects, source))
    train = load_detection_dataset(tmp_path)["train"]
    assert objects_of(train)["a.png"] == [("cat", [0, 0, 40, 30]), ("dog", [0, 0, 1, 1])]


def test_the_upright_box_around_a_rotated_one(tmp_path: Path) -> None:
    write_voc(tmp_path)
    for stem, value in {"a": "90.0", "b": "x"}.items():
        attribute = f"<attributes><attribute><name>rotation</name><value>{value}</value></attribute></attributes>"
        xml = voc_xml(f"{stem}.png", [("cat", [6, 12, 20, 6])]).replace("</object>", f"{attribute}</object>")
        write_text(tmp_path / "Annotations" / f"{stem}.xml", xml)
    boxes = [row["bbox"][0] for row in load_detection_dataset(tmp_path)["train"]["objects"]]
    assert boxes == [pytest.approx([13, 5, 6, 20]), [6, 12, 20, 6]]


def test_difficult_objects_are_kept_and_counted(tmp_path: Path, caplog) -> None:
    write_voc(tmp_path)
    xml = voc_xml("a.png", OBJECTS["a.png"]).replace("</object>", "<difficult>1</difficult></object>")
    write_text(tmp_path / "Annotations" / "a.xml", xml)
    with caplog.at_level(logging.WARNING):
        train = load_detection_dataset(tmp_path)["train"]
    assert objects_of(train) == OBJECTS
    assert [objects["iscrowd"] for objects in train["objects"]] == [[0], [0, 0]]
    assert "1 x difficult object: it counts as an object like all others." in caplog.text


def test_image_is_that_of_the_files_own_name_or_else_the_one_it_names(tmp_path: Path) -> None:
    write_images(tmp_path / "JPEGImages", ("a.png", "b.png", "b.jpg", "Ünïcode.PNG"))
    for stem, named in {"a": "b.png", "b": "b.png", "c": "folder\\ünïcode.png"}.items():
        write_text(tmp_path / "Annotations" / f"{stem}.xml", voc_xml(named, OBJECTS["a.png"]))
    train = load_detection_dataset(tmp_path)["train"]
    assert list(objects_of(train)) == ["a.png", "b.png", "Ünïcode.PNG"]


def test_size_is_read_from_the_image_where_the_xml_has_none(tmp_path: Path) -> None:
    write_voc(tmp_path)
    for stem, size in {"a": (0, 0), "b": None}.items():
        xml = voc_xml(f"{stem}.png", OBJECTS[f"{stem}.png"], "", *(size or (7, 7)))
        xml = xml if size else xml.replace("<size><width>7</width><height>7</height><depth>3</depth></size>", "")
        write_text(tmp_path / "Annotations" / f"{stem}.xml", xml)
    assert list(load_detection_dataset(tmp_path)["train"]["height"]) == [30, 30]


def test_group_is_an_element_of_the_xml(tmp_path: Path) -> None:
    names = tuple(f"{index}.png" for index in range(6))
    write_images(tmp_path, names)
    for index, name in enumerate(names):
        PILImage.new("RGB", (40, 30), (index, 0, 0)).save(tmp_path / name)
        more = f"<source><database>{index // 2}</database></source>"
        write_text(tmp_path / f"{index}.xml", voc_xml(name, OBJECTS["a.png"], more))
    parts = load_detection_dataset(tmp_path, validation_fraction=0.3, group_by="source/database")
    groups = {split: {int(name[0]) // 2 for name in objects_of(rows)} for split, rows in parts.items()}
    assert len(groups["train"]) == 2
    assert groups["train"] | groups["validation"] == {0, 1, 2}
    for path in ("source[@", "/source", "@id", ""):
        with pytest.raises(InvalidDatasetError, match=r"names of elements, as .*source/database"):
            load_detection_dataset(tmp_path, validation_fraction=0.3, group_by=path)


def test_copy_reads_back(tmp_path: Path) -> None:
    original = load_detection_dataset(write_voc(tmp_path / "one"), class_names=CLASSES)
    copy = load_detection_dataset(copy_as_voc(original, tmp_path / "two"))
    assert copy["train"].remove_columns("image").to_list() == original["train"].remove_columns("image").to_list()


def test_where_case_is_ignored_a_folder_is_read_once(tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "annotations").symlink_to(tmp_path / "Annotations")  # one folder of two names, as on macOS
    assert objects_of(load_detection_dataset(tmp_path)["train"]) == OBJECTS


@pytest.mark.parametrize(
    ("file", "image"),
    [
        ("Annotations/cam2/b.xml", "JPEGImages/cam2/b.png"),
        ("Annotations/train/cam2/b.xml", "JPEGImages/train/cam2/b.png"),
        ("Annotations/b.XML", "JPEGImages/b.png"),
        ("cam2/b.xml", "cam2/b.png"),  # labelImg
        ("train/cam2/b.XML", "train/cam2/b.png"),
    ],
)
def test_files_of_any_depth_and_case(tmp_path: Path, file: str, image: str) -> None:
    beside = Path(image).parts[0] != "JPEGImages"
    first = tmp_path / Path(file).parts[0] if file.startswith(("Annotations", "train")) else tmp_path
    write_text(first / "a.xml", voc_xml("a.png", OBJECTS["a.png"]))
    write_text(tmp_path / file, voc_xml("b.png", OBJECTS["b.png"]))
    write_images(first if beside else tmp_path / "JPEGImages")
    (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
    os.rename((first if beside else tmp_path / "JPEGImages") / "b.png", tmp_path / image)
    write_text(first / "._a.xml", "what macOS writes")
    write_text(first / ".ipynb_checkpoints" / "a-checkpoint.xml", voc_xml("a.png", []))
    assert objects_of(load_detection_dataset(tmp_path)["train"]) == OBJECTS


def test_folders_that_are_linked_are_read_once(tmp_path: Path) -> None:
    write_voc(tmp_path / "elsewhere")
    folder = tmp_path / "data" / "Annotations"
    write_text(folder / "c.xml", voc_xml("c.png", OBJECTS["a.png"]))
    write_images(tmp_path / "data" / "JPEGImages", ("c.png",))
    (folder / "more").symlink_to(tmp_path / "elsewhere" / "Annotations")
    (folder / "again").symlink_to(tmp_path / "elsewhere" / "Annotations")
    (folder / "loop").symlink_to(folder)
    (tmp_path / "data" / "JPEGImages" / "again").symlink_to(tmp_path / "elsewhere" / "JPEGImages")
    found = objects_of(load_detection_dataset(tmp_path / "data")["train"])
    assert found == OBJECTS | {"c.png": OBJECTS["a.png"]}
