import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from annotation_folders import OBJECTS, objects_of, voc_xml, write_text, write_voc, write_yolo
from coco_folder import coco_content, write_coco, write_images, write_json
from datasets import Image
from more_annotation_files import link_out
from PIL import Image as PILImage

from dit_detection.data import (
    InvalidDatasetError,
    ProblemLog,
    load_detection_dataset,
    read_detection_dataset,
)


@pytest.mark.parametrize("stored", ["Äpfel.JPG", unicodedata.normalize("NFD", "äpfel.jpg")])
def test_names_in_another_case_or_encoding_of_accents_are_found(tmp_path: Path, stored: str, caplog) -> None:
    content = coco_content()
    content["images"][0]["file_name"] = "äpfel.jpg"
    write_coco(tmp_path, content)
    os.rename(tmp_path / "images" / "a.png", tmp_path / "images" / stored)  # and its content is PNG
    train = load_detection_dataset(tmp_path)["train"]
    assert Path(train.cast_column("image", Image(decode=False))[0]["image"]["path"]).name == stored
    assert train[0]["image"].size == (40, 30)
    assert "1 x file name differs from the annotation" in caplog.text
    PILImage.new("RGB", (40, 30)).save(tmp_path / "images" / "ÄPFEL.jpg")
    with pytest.raises(InvalidDatasetError, match="there is no file "):  # it could be either
        load_detection_dataset(tmp_path)


@pytest.mark.parametrize("name", ["images/0a1b2c3d-{}", "images\\{}", "{}"])
def test_names_that_all_differ_are_found(tmp_path: Path, name: str) -> None:
    content = coco_content()
    for image, file in zip(content["images"], ("A.PNG", "B.PNG"), strict=True):
        image["file_name"] = name.format(file)
    folder = write_coco(tmp_path, content)
    (folder / "images" / "old").mkdir()
    assert list(objects_of(load_detection_dataset(folder)["train"])) == ["a.png", "b.png"]


def csv_of_two(folder: Path, names: tuple[str, str]) -> None:
    lines = "".join(f"{name},1,1,9,9,cat\n" for name in names)
    write_text(folder / "metadata.csv", f"file_name,xmin,ymin,xmax,ymax,label\n{lines}")


def coco_of_two(folder: Path, names: tuple[str, str]) -> None:
    content = coco_content()
    for image, name in zip(content["images"], names, strict=True):
        image["file_name"] = name
    write_json(folder / "annotations_train.json", content)


def voc_of_two(folder: Path, names: tuple[str, str]) -> None:
    for name in names:
        write_text(folder / f"{Path(name).stem}.xml", voc_xml(name, OBJECTS["b.png"]))


@pytest.mark.parametrize("write", [csv_of_two, coco_of_two, voc_of_two])
@pytest.mark.parametrize(
    ("names", "num_missing"),
    [(("a.png", "A.png"), 1), (("A.png", "aaaaaaaa-a.png"), 2), (("aaaaaaaa-a.png", "bbbbbbbb-a.png"), 2)],
)
def test_a_file_is_that_of_one_entry_alone(
    tmp_path: Path, write: Callable[..., None], names: tuple[str, str], num_missing: int
) -> None:
    write_images(tmp_path, ("a.png", "b.png"))
    write(tmp_path, names)
    problems = ProblemLog("drop")
    dataset = read_detection_dataset(tmp_path, problems)
    assert problems.counts["missing image file"] == num_missing
    assert problems.examples["missing image file"][0].what.endswith("a.png is alike, and another entry means it, too")
    assert (dataset is None) == (num_missing == 2)
    if dataset is not None:
        assert list(objects_of(dataset["train"])) == ["a.png"]


@pytest.mark.parametrize("write", [csv_of_two, coco_of_two, voc_of_two])
def test_a_file_of_another_case_is_told_of_whatever_the_format(tmp_path: Path, write: Callable[..., None]) -> None:
    write_images(tmp_path, ("a.png", "b.png"))
    write(tmp_path, ("A.png", "b.png"))
    problems = ProblemLog("error")
    dataset = read_detection_dataset(tmp_path, problems)
    assert dataset is not None and list(objects_of(dataset["train"])) == ["a.png", "b.png"]
    (problem,) = problems.examples["file name differs from the annotation"]
    assert problem.what == f"{tmp_path / 'a.png'} is taken"
    assert dict(problems.counts) == {"file name differs from the annotation": 1}


def test_a_link_of_another_case_is_minded_too(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "data")
    link_out(folder / "images" / "a.png")
    os.rename(folder / "images" / "a.png", folder / "images" / "A.png")
    with pytest.raises(InvalidDatasetError, match=r"outside\.png"):
        load_detection_dataset(folder)


def rename_to_latin(folder: Path, name: str) -> None:
    folder, suffix = (folder / name).parent, Path(name).suffix
    os.rename(folder / Path(name).name, os.fsencode(folder) + b"/caf\xe9" + suffix.encode())


@pytest.mark.parametrize(
    ("write", "files"),
    [(write_yolo, ["images/b.png", "labels/b.txt"]), (write_voc, ["JPEGImages/b.png", "Annotations/b.xml"])],
)
def test_a_file_name_that_is_not_utf8_is_reported(
    tmp_path: Path, write: Callable[[Path], Path], files: list[str]
) -> None:
    folder = write(tmp_path)
    for file in files:
        rename_to_latin(folder, file)
    with pytest.raises(InvalidDatasetError, match=r"there is .*caf\\udce9\.png(.|\n)*not UTF-8: rename the file"):
        load_detection_dataset(folder)
    assert list(objects_of(load_detection_dataset(folder, on_invalid="drop")["train"])) == ["a.png"]


def test_an_image_of_no_split_whose_name_is_not_utf8(tmp_path: Path) -> None:
    folder = write_coco(tmp_path)
    PILImage.new("RGB", (4, 3)).save(folder / "images" / "c.png")
    rename_to_latin(folder, "images/c.png")
    problems = ProblemLog("error")
    read_detection_dataset(folder, problems)
    (problem,) = problems.examples["image without annotations"]
    assert problem.where == problem.image == f"{folder}/images/caf\\udce9.png"
