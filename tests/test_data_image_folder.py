import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotation_folders import OBJECTS, objects_of, write_text
from coco_folder import write_images
from PIL import Image as PILImage

from dit_detection.data import (
    InvalidDatasetError,
    ProblemLog,
    class_names_of,
    load_detection_dataset,
    read_detection_dataset,
)

ROWS = [
    {"file_name": name, "objects": {"bbox": [box for _, box in found], "category": [label for label, _ in found]}}
    for name, found in OBJECTS.items()
]
CORNERS = "file_name,xmin,ymin,xmax,ymax,label\n"
BOX_LINES = ["b.png,1,2,11,10,dog", "a.png,0.5,0,4.5,30,cat", "b.png,30,20,40,30,cat"]


def write_metadata(folder: Path, suffix: str) -> None:
    if suffix == ".jsonl":
        write_text(folder / "metadata.jsonl", "\n".join(map(json.dumps, ROWS)))
    elif suffix == ".parquet":
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(ROWS), folder / "metadata.parquet")
    else:
        lines = ['"{}","{}"'.format(row["file_name"], json.dumps(row["objects"]).replace('"', '""')) for row in ROWS]
        write_text(folder / "metadata.csv", "\n".join(["file_name,objects", *lines]))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize(("folder", "split"), [(".", "train"), ("validation", "validation"), ("test", "test")])
def test_metadata(tmp_path: Path, folder: str, split: str, suffix: str) -> None:
    write_images(tmp_path / folder)
    write_metadata(tmp_path / folder, suffix)
    dataset = load_detection_dataset(tmp_path)
    assert list(dataset) == [split]
    assert objects_of(dataset[split]) == OBJECTS
    assert class_names_of(dataset) == ["cat", "dog"]


@pytest.mark.parametrize(
    "objects",
    [
        [{"bbox": [1, 2, 3, 4], "category": "cat", "area": 5.5, "iscrowd": crowd} for crowd in (0, 1)],
        [{"bbox": [1, 2, 3, 4], "label": "cat", "area": 5.5, "iscrowd": crowd} for crowd in (0, 1)],
        {"bbox": [[1, 2, 3, 4]] * 2, "categories": ["cat"] * 2, "area": [5.5] * 2, "iscrowd": [0, 1]},
    ],
)
def test_objects_as_lists_or_as_a_list(tmp_path: Path, objects: object) -> None:
    write_images(tmp_path, ("a.png",))
    write_text(tmp_path / "metadata.jsonl", json.dumps({"file_name": "a.png", "objects": objects}))
    train = load_detection_dataset(tmp_path)["train"]
    assert train[0]["objects"] == {
        "id": [0, 1],
        "bbox": [[1, 2, 3, 4]] * 2,
        "category": [0, 0],
        "area": [5.5] * 2,
        "iscrowd": [0, 1],
    }


@pytest.mark.parametrize(
    ("header", "lines"),
    [
        (CORNERS, BOX_LINES),
        ("filename,width,height,class,xmin,ymin,xmax,ymax\n",  # TensorFlow's, of Roboflow and others
         ["a.png,40,30,cat,0.5,0,4.5,30", "b.png,40,30,dog,1,2,11,10", "b.png,40,30,cat,30,20,40,30"]),
        ("label;image;x;y;width;height;image_width;image_height\r\n",
         ["cat;a.png;0.5;0;4;30;40;30\r", "dog;b.png;1;2;10;8;40;30\r", "cat;b.png;30;20;10;10;40;30\r"]),
        ("image_path\tbbox\tcategory\n",
         ["./a.png\t[0.5, 0, 4, 30]\tcat", "./b.png\t[1, 2, 10, 8]\tdog", "./b.png\t[30, 20, 10, 10]\tcat"]),
    ],
)  # fmt: skip
def test_table_of_boxes(tmp_path: Path, header: str, lines: list[str]) -> None:
    write_images(tmp_path)
    write_text(tmp_path / "_annotations.csv", header + "\n".join(lines))
    dataset = load_detection_dataset(tmp_path)
    assert list(dataset) == ["train"]
    assert objects_of(dataset["train"]) == OBJECTS


def test_splits_of_one_table(tmp_path: Path) -> None:
    write_images(tmp_path)
    header, *lines = (CORNERS + "\n".join(BOX_LINES)).splitlines()
    lines = [f"{line},{'TEST' if line.startswith('a') else 'train'}" for line in lines]
    write_text(tmp_path / "metadata.csv", "\n".join([f"{header},set", *lines]))
    dataset = load_detection_dataset(tmp_path)
    assert {split: list(objects_of(rows)) for split, rows in dataset.items()} == {
        "train": ["b.png"],
        "test": ["a.png"],
    }


def test_splits_by_the_names_of_tables_and_by_the_folders_of_images(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_images(tmp_path / split)
    lines = [f"{split}/{line}" for split in ("train", "test") for line in BOX_LINES]
    write_text(tmp_path / "metadata.csv", CORNERS + "\n".join(lines))
    dataset = load_detection_dataset(tmp_path, check_files=False)
    assert {split: objects_of(rows) for split, rows in dataset.items()} == {"train": OBJECTS, "test": OBJECTS}
    (tmp_path / "metadata.csv").unlink()
    for split in ("train", "test"):
        write_text(tmp_path / f"{split}_labels.csv", CORNERS + "\n".join(BOX_LINES))
    dataset = load_detection_dataset(write_images(tmp_path / "images").parent, check_files=False)
    assert {split: objects_of(rows) for split, rows in dataset.items()} == {"train": OBJECTS, "test": OBJECTS}


def test_row_without_a_box_is_an_image_without_objects(tmp_path: Path) -> None:
    write_images(tmp_path)
    write_text(tmp_path / "metadata.csv", f"{CORNERS}a.png,,,,,\n{BOX_LINES[0]}\n")
    assert objects_of(load_detection_dataset(tmp_path)["train"]) == {"a.png": [], "b.png": [("dog", [1, 2, 10, 8])]}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("objects", [{"objects": None}, {}])
def test_nothing_for_objects_is_an_image_without_them(tmp_path: Path, suffix: str, objects: dict) -> None:
    write_images(tmp_path)
    found = {"bbox": [[1, 2, 10, 8]], "label": ["dog"]}
    rows = [{"file_name": "a.png"} | objects, {"file_name": "b.png", "objects": found}]
    file = tmp_path / f"metadata.{suffix}"
    if suffix == "jsonl":
        write_text(file, "\n".join(map(json.dumps, rows)))
    elif suffix == "csv":
        quoted = json.dumps(found).replace('"', '""')
        write_text(file, f'file_name,objects\na.png,\nb.png,"{quoted}"\n')
    else:
        pq.write_table(pa.Table.from_pylist(rows[::-1]), file)
    assert objects_of(load_detection_dataset(tmp_path)["train"]) == {"a.png": [], "b.png": [("dog", [1, 2, 10, 8])]}


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])  # Excel's
def test_a_table_in_another_encoding_is_told_of(tmp_path: Path, encoding: str) -> None:
    write_images(tmp_path)
    (tmp_path / "annotations.csv").write_bytes(f"{CORNERS}a.png,1,2,11,10,Blutkörperchen\n".encode(encoding))
    with pytest.raises(InvalidDatasetError, match=r"annotations.csv is not UTF-8 text .*save it as UTF-8"):
        load_detection_dataset(tmp_path)


@pytest.mark.parametrize(("listed", "argument"), [("cat\ndog\nfox\n", None), ("", ["cat", "dog", "fox"])])
def test_classes_as_integers(tmp_path: Path, listed: str, argument: list[str] | None) -> None:
    write_images(tmp_path)
    lines = "\n".join(BOX_LINES).replace("dog", "1").replace("cat", "0")
    write_text(tmp_path / "metadata.csv", CORNERS + lines)
    assert class_names_of(load_detection_dataset(tmp_path)) == ["0", "1"]
    if listed:
        write_text(tmp_path / "classes.txt", listed)
    dataset = load_detection_dataset(tmp_path, class_names=argument)
    assert class_names_of(dataset) == ["cat", "dog", "fox"]
    assert objects_of(dataset["train"]) == OBJECTS


def test_classes_that_are_named_by_integers_are_matched_by_them(tmp_path: Path) -> None:
    write_images(tmp_path)
    write_text(tmp_path / "metadata.csv", CORNERS + "\n".join(BOX_LINES).replace("dog", "2").replace("cat", "1"))
    names = ["1", "2", "3"]
    expected = objects_of(load_detection_dataset(tmp_path)["train"])
    assert objects_of(load_detection_dataset(tmp_path, class_names=names)["train"]) == expected
    write_text(tmp_path / "classes.txt", "x\ncat\ndog\n")  # what the numbers mean
    assert objects_of(load_detection_dataset(tmp_path, class_names=["cat", "dog"])["train"]) == OBJECTS


def test_column_that_groups(tmp_path: Path) -> None:
    lines = []
    for index in range(8):
        PILImage.new("RGB", (40, 30), (index, 0, 0)).save(tmp_path / f"{index}.png")
        lines.append(f"{index}.png,1,1,9,9,cat,patient {index % 4}")
    write_text(tmp_path / "metadata.csv", CORNERS.strip() + ",Patient\n" + "\n".join(lines))
    parts = load_detection_dataset(tmp_path, validation_fraction=0.25, test_fraction=0.25, group_by="patient")
    groups = [{int(name[0]) % 4 for name in objects_of(rows)} for rows in parts.values()]
    assert [len(rows) for rows in parts.values()] == [4, 2, 2]
    assert [len(group) for group in groups] == [2, 1, 1]


def test_one_table(tmp_path: Path) -> None:
    write_images(tmp_path)
    file = write_text(tmp_path / "my_test_boxes.csv", CORNERS + "\n".join(BOX_LINES))
    assert objects_of(load_detection_dataset(file)["train"]) == OBJECTS


def test_the_name_of_a_file_is_no_split(tmp_path: Path) -> None:
    names = ("board.png", "dev_board.png", "crash-test.png", "valid.png")
    write_images(tmp_path, names)
    write_text(tmp_path / "boxes.csv", CORNERS + "\n".join(f"{name},1,2,11,10,dog" for name in names))
    assert {split: len(rows) for split, rows in load_detection_dataset(tmp_path).items()} == {"train": 4}


def test_equal_names_in_two_folders_are_two_images(tmp_path: Path) -> None:
    for number, folder in enumerate(("train_1", "train_2")):
        write_images(tmp_path / folder, ("a.png",))
        write_text(tmp_path / folder / "boxes.csv", f"{CORNERS}a.png,{number},2,11,10,dog")
    train = load_detection_dataset(tmp_path)["train"]
    assert [row["objects"]["bbox"] for row in train] == [[[0, 2, 11, 8]], [[1, 2, 10, 8]]]


def test_width_and_height_beside_w_and_h_are_those_of_the_image(tmp_path: Path) -> None:
    write_images(tmp_path, ("a.png",))
    write_text(tmp_path / "boxes.csv", "filename,x,y,w,h,class,width,height\na.png,1,2,10,8,dog,40,30")
    row = load_detection_dataset(tmp_path)["train"][0]
    assert row["objects"]["bbox"] == [[1, 2, 10, 8]] and (row["width"], row["height"]) == (40, 30)


def test_groups_are_in_a_column_of_any_case(tmp_path: Path) -> None:
    names = tuple(f"{index}.png" for index in range(6))
    write_images(tmp_path, names)
    lines = [f"{name},1,2,11,10,dog,{index // 3}" for index, name in enumerate(names)]
    write_text(tmp_path / "boxes.csv", "\n".join([f"{CORNERS.strip()},PatientID", *lines]))
    dataset = load_detection_dataset(tmp_path, group_by="PatientID", validation_fraction=0.5)
    assert sorted(map(len, dataset.values())) == [3, 3]


def test_tables_that_name_no_split_beside_others_are_not_read(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    for name, lines in {"labels": BOX_LINES, "train_labels": BOX_LINES[::2], "test_labels": BOX_LINES[1:2]}.items():
        write_text(tmp_path / f"{name}.csv", CORNERS + "\n".join(lines))
    problems = ProblemLog("error")
    dataset = read_detection_dataset(tmp_path, problems)
    assert dataset is not None
    found = {split: objects_of(rows) for split, rows in dataset.items()}
    assert found == {"train": {"b.png": OBJECTS["b.png"]}, "test": {"a.png": OBJECTS["a.png"]}}
    (problem,) = problems.examples["annotation file in no split"]
    assert problem.where == str(tmp_path / "labels.csv")


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        (".", ["metadata.csv", "metadata.jsonl"]),
        (".", ["boxes.csv", "old_boxes.csv"]),
        ("train", ["metadata.csv", "metadata.jsonl"]),
        ("train", ["boxes.csv", "old_boxes.csv"]),
        (".", ["images/metadata.csv", "metadata.csv"]),
    ],
)
def test_several_tables_for_the_same_images(tmp_path: Path, folder: str, names: list[str]) -> None:
    write_images(tmp_path / folder / "images")
    for name in names:
        rows = "\n".join(map(json.dumps, ROWS)) if name.endswith("jsonl") else CORNERS + "\n".join(BOX_LINES)
        write_text(tmp_path / folder / name, rows)
    with pytest.raises(InvalidDatasetError, match=f"{names[0]}, .*{names[1]} may hold the same objects. Remove all"):
        load_detection_dataset(tmp_path)


def test_split_of_unknown_name(tmp_path: Path) -> None:
    write_images(tmp_path)
    lines = [f"{line},{split}" for line, split in zip(BOX_LINES, ("eval", "train", "holdout"), strict=True)]
    write_text(tmp_path / "metadata.csv", "\n".join([f"{CORNERS.strip()},split", *lines]))
    what = (
        r"metadata.csv: line 4: column \"split\" is 'holdout'(.|\n)*1 x unknown split: write train, validation or test"
    )
    with pytest.raises(InvalidDatasetError, match=what):
        load_detection_dataset(tmp_path)
    dataset = load_detection_dataset(tmp_path, on_invalid="drop")
    assert {split: objects_of(rows) for split, rows in dataset.items()} == {
        "train": {"a.png": OBJECTS["a.png"]},
        "validation": {"b.png": OBJECTS["b.png"][:1]},
    }


def test_split_is_told_by_any_folder_of_a_name(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path / "images" / split)
    lines = [f"images/{split}/{line}" for split in ("train", "val") for line in BOX_LINES]
    write_text(tmp_path / "metadata.csv", CORNERS + "\n".join(lines))
    dataset = load_detection_dataset(tmp_path, check_files=False)
    assert {split: objects_of(rows) for split, rows in dataset.items()} == {"train": OBJECTS, "validation": OBJECTS}


def test_list_of_objects_with_a_number_for_their_class(tmp_path: Path) -> None:
    write_images(tmp_path, ("a.png",))
    write_text(tmp_path / "classes.txt", "cat\ndog\n")
    row = {"file_name": "a.png", "objects": [{"bbox": [1, 2, 3, 4], "category_id": 1}]}
    write_text(tmp_path / "metadata.jsonl", json.dumps(row))
    assert objects_of(load_detection_dataset(tmp_path)["train"]) == {"a.png": [("dog", [1, 2, 3, 4])]}


def test_classes_as_integers_that_pandas_wrote(tmp_path: Path) -> None:
    write_images(tmp_path)
    lines = "\n".join(BOX_LINES).replace("dog", "10.0").replace("cat", "2.0")
    write_text(tmp_path / "metadata.csv", CORNERS + lines)
    dataset = load_detection_dataset(tmp_path)
    assert class_names_of(dataset) == ["2", "10"]
    assert objects_of(dataset["train"])["b.png"] == [("10", [1, 2, 10, 8]), ("2", [30, 20, 10, 10])]
