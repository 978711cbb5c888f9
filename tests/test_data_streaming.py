import logging
from pathlib import Path

import datasets
import pytest
from coco_folder import coco_content, write_coco, write_images, write_json
from datasets import Dataset, DatasetDict, IterableDataset, List, Value
from torch.utils.data import DataLoader

from dit_detection.data import InvalidDatasetError, class_names_of, load_detection_dataset


def write_many(folder: Path, num_images: int = 12) -> Path:
    """Twelve images with one object each; the ids are multiples of 3."""
    names = tuple(f"{index}.png" for index in range(num_images))
    content = coco_content()
    content["images"] = [
        {"id": 3 * index, "file_name": name, "width": 40, "height": 30} for index, name in enumerate(names)
    ]
    content["annotations"] = [
        {"id": index, "image_id": 3 * index, "category_id": 2, "bbox": [index % 30, 1, 5, 6]}
        for index in range(num_images)
    ]
    write_images(folder / "images", names)
    write_json(folder / "annotations_train.json", content)
    return folder


def without_images(rows: Dataset | IterableDataset) -> list[dict]:
    return [{column: value for column, value in row.items() if column != "image"} for row in rows]


@pytest.mark.parametrize("kind", ["coco", "parquet", "save_to_disk", "loaded"])
def test_a_stream_has_the_rows_of_the_reader(tmp_path: Path, kind: str) -> None:
    folder = write_coco(tmp_path / "coco")
    dataset = load_detection_dataset(folder)
    source: Path | DatasetDict = tmp_path / kind
    if kind == "parquet":
        dataset["train"].to_parquet(tmp_path / kind / "train-00000-of-00001.parquet")
    elif kind == "save_to_disk":
        dataset.save_to_disk(str(source))
    elif kind == "loaded":
        source = dataset
    stream = load_detection_dataset(source, streaming=True)
    assert list(stream) == ["train"]
    assert isinstance(stream["train"], IterableDataset)
    assert stream["train"].features == dataset["train"].features
    assert class_names_of(stream["train"]) == ["cat", "dog"]
    rows = list(stream["train"])
    assert without_images(rows) == without_images(dataset["train"])
    assert [row["image"].tobytes() for row in rows] == [row["image"].tobytes() for row in dataset["train"]]


def test_images_of_a_folder_are_opened_when_they_are_read(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "images" / "b.png").unlink()
    rows = iter(load_detection_dataset(tmp_path, streaming=True)["train"])
    assert next(rows)["image_id"] == 7
    with pytest.raises(InvalidDatasetError, match=r'image 9 \(".*b.png"\): there is no file .*b.png'):
        next(rows)
    dropped = load_detection_dataset(tmp_path, streaming=True, on_invalid="drop")["train"]
    assert [row["image_id"] for row in dropped] == [7]


def test_annotations_of_a_folder_are_checked_at_once(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][0]["bbox"] = [1, 2, 3, -4]
    with pytest.raises(InvalidDatasetError, match=r"annotation 1 of image 9 .*-4.0\]"):
        load_detection_dataset(write_coco(tmp_path, content), streaming=True)


def damaged_rows(folder: Path, **changes: object) -> Dataset:
    """The rows of `write_many` as a loaded data set; of the row of image 15 the objects are changed."""
    dataset = load_detection_dataset(write_many(folder))["train"]
    rows = dataset.to_list()
    rows[5]["objects"].update(changes)
    return Dataset.from_list(rows, features=dataset.features)


@pytest.mark.parametrize("on_invalid", ["error", "drop"])
def test_a_stream_of_fractions_is_refused(tmp_path: Path, on_invalid: str) -> None:
    dataset = load_detection_dataset(write_many(tmp_path))["train"]
    rows = dataset.to_list()
    for row in rows:
        row["objects"]["bbox"] = [[0.1, 0.2, 0.3, 0.3]]
    stream = load_detection_dataset(
        Dataset.from_list(rows, features=dataset.features), streaming=True, on_invalid=on_invalid
    )["train"]
    with pytest.raises(InvalidDatasetError, match=r"3 of the first 3 boxes lie between 0 and 1, .* Write pixels"):
        list(stream)


def test_an_invalid_row_stops_the_stream_with_its_name(tmp_path: Path) -> None:
    stream = load_detection_dataset(damaged_rows(tmp_path, bbox=[[5.0, 1, 50, 6]]), streaming=True)["train"]
    passed = []
    with pytest.raises(InvalidDatasetError, match=r'"train": annotation 5 of image 15 .*5.0, 1.0, 50.0, 6.0\] in'):
        for row in stream:
            passed.append(row["image_id"])
    assert passed == [0, 3, 6, 9, 12]


@pytest.mark.parametrize(("on_invalid", "boxes"), [("drop", []), ("clip", [[5, 1, 35, 6]])])
def test_an_invalid_box_is_left_out_or_clipped_and_counted(
    tmp_path: Path, caplog, on_invalid: str, boxes: list
) -> None:
    damaged = damaged_rows(tmp_path, bbox=[[5.0, 1, 50, 6]])
    stream = load_detection_dataset(damaged, streaming=True, on_invalid=on_invalid)["train"]
    with caplog.at_level(logging.WARNING):
        rows = list(stream)
    assert len(rows) == 12
    assert rows[5]["objects"]["bbox"] == boxes
    assert rows[6]["objects"]["bbox"] == [[6, 1, 5, 6]]
    assert f'(on_invalid="{on_invalid}"): 1 x box outside the image' in caplog.text


def test_counts_are_logged_ever_more_rarely(tmp_path: Path, caplog) -> None:
    folder = write_many(tmp_path)
    stream = load_detection_dataset(folder, streaming=True, on_invalid="drop")["train"]
    for index in range(11):
        (folder / "images" / f"{index}.png").write_text("no image")
    with caplog.at_level(logging.WARNING):
        assert [row["image_id"] for row in stream] == [33]
    assert [text for text in ("1 x unr", "2 x unr", "10 x unr", "11 x unr") if f": {text}" in caplog.text] == [
        "1 x unr",
        "10 x unr",
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["coco", "parquet"])
def test_workers_share_the_rows(tmp_path: Path, monkeypatch, kind: str, num_workers: int) -> None:
    # After each epoch of shuffled parquet files, datasets (5.2) waits 5 seconds for threads of Arrow.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)
    source = write_many(tmp_path / "coco")
    if kind == "parquet":
        train = load_detection_dataset(source)["train"]
        source = tmp_path / "parquet"
        for shard in range(2):
            train.shard(2, shard).to_parquet(source / f"train-0000{shard}-of-00002.parquet")
    stream = load_detection_dataset(source, streaming=True)["train"].shuffle(seed=0, buffer_size=4)
    assert stream.num_shards == (12 if kind == "coco" else 2)
    loader = DataLoader(stream.select_columns("image_id"), batch_size=None, num_workers=num_workers)
    ids = [row["image_id"] for row in loader]
    assert ids != sorted(ids)
    assert sorted(ids) == [3 * index for index in range(12)]


def test_validation_fraction_is_drawn_by_image_id(tmp_path: Path) -> None:
    train = load_detection_dataset(write_many(tmp_path, 20))["train"]

    def ids(rows: Dataset, seed: int) -> dict[str, list[int]]:
        parts = load_detection_dataset(rows, streaming=True, validation_fraction=0.3, seed=seed)
        return {split: [row["image_id"] for row in stream] for split, stream in parts.items()}

    parts = ids(train, seed=0)
    assert list(parts) == ["train", "validation"]
    assert sorted(parts["train"] + parts["validation"]) == list(range(0, 60, 3))
    assert 1 <= len(parts["validation"]) <= 14  # 6 are expected, with a standard deviation of 2
    assert ids(train, seed=1) != parts
    backwards = ids(train.select(range(19, -1, -1)), seed=0)
    assert sorted(backwards["validation"]) == parts["validation"]


def test_class_names_are_needed_where_features_have_none(tmp_path: Path) -> None:
    train = load_detection_dataset(write_coco(tmp_path))["train"]
    features = train.features.copy()
    features["objects"] = features["objects"] | {"category": List(Value("int64"))}
    integers = train.cast(features)
    with pytest.raises(InvalidDatasetError, match="do not name the classes"):
        load_detection_dataset(integers, streaming=True)
    stream = load_detection_dataset(integers, streaming=True, class_names=["cat", "dog"])["train"]
    assert class_names_of(stream) == ["cat", "dog"]
    assert without_images(stream) == without_images(train)
    few = load_detection_dataset(integers, streaming=True, class_names=["cat"])["train"]
    with pytest.raises(InvalidDatasetError, match='field "category" is 1'):
        list(few)
    with pytest.raises(InvalidDatasetError, match=r"1, 2.*Cast .* to a ClassLabel"):  # is 1 the first, or the second?
        load_detection_dataset(integers, streaming=True, class_names=["1", "2"])
    stream = load_detection_dataset(integers, streaming=True, class_names=["0", "1"])["train"]
    assert without_images(stream) == without_images(train)


def test_class_names_are_matched_by_name(tmp_path: Path) -> None:
    train = load_detection_dataset(write_coco(tmp_path))["train"]
    stream = load_detection_dataset(train, streaming=True, class_names=["cow", "dog", "cat"])["train"]
    assert [row["objects"]["category"] for row in stream] == [[2], [1, 2]]


def test_sizes_come_from_the_images_and_names_of_images_from_archives(tmp_path: Path) -> None:
    train = load_detection_dataset(write_coco(tmp_path))["train"]
    rows = train.remove_columns(["width", "height"]).to_list()
    for row in rows:
        row["image"] = {"bytes": None, "path": f"file://{row['image']['path']}"}
    features = {name: train.features[name] for name in ("image", "image_id", "objects")}
    remote = IterableDataset.from_generator(lambda: iter(rows), features=type(train.features)(features))
    assert without_images(load_detection_dataset(remote, streaming=True)["train"]) == without_images(train)


@pytest.mark.parametrize(
    ("columns", "arguments", "error", "match"),
    [
        (["image_id"], {}, InvalidDatasetError, 'a column "image_id" of integers'),
        (["objects"], {}, InvalidDatasetError, 'needs the columns "image" and "objects"'),
        ([], {"group_by": "width"}, ValueError, "group_by cannot be used while"),
        ([], {"test_fraction": 0.1}, ValueError, "cannot be used while a data set is streamed"),
        ([], {"validation_fraction": 1.5}, ValueError, "validation_fraction is 1.5"),
    ],
)
def test_what_cannot_be_streamed(tmp_path: Path, columns: list, arguments: dict, error: type, match: str) -> None:
    train = load_detection_dataset(write_coco(tmp_path))["train"].remove_columns(columns)
    with pytest.raises(error, match=match):
        load_detection_dataset(train, streaming=True, **arguments)
