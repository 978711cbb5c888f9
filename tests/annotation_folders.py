"""Small data sets for tests in the formats of annotation tools, and copies of any data set as VOC and as YOLO."""

import json
import os
import shutil
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from coco_folder import HEIGHT, WIDTH, write_images
from datasets import Dataset, DatasetDict, Image

from dit_detection.data import class_names_of

# What every format says of the two images of `write_images`, as class and xywh in pixels.
Objects = list[tuple[str, list[float]]]
OBJECTS: dict[str, Objects] = {
    "a.png": [("cat", [0.5, 0, 4, 30])],
    "b.png": [("dog", [1, 2, 10, 8]), ("cat", [30, 20, 10, 10])],
}
CLASSES = ["cat", "dog"]


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def voc_xml(name: str, objects: Objects, more: str = "", width: int = WIDTH, height: int = HEIGHT) -> str:
    boxes = "".join(
        f"<object><name>{escape(label)}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax>"
        f"<ymax>{y + h}</ymax></bndbox></object>"
        for label, (x, y, w, h) in objects
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>{escape(name)}</filename>{size}{more}{boxes}</annotation>"


def write_voc(folder: Path, objects: dict[str, Objects] = OBJECTS) -> Path:
    """`Annotations/` and `JPEGImages/`, without lists."""
    write_images(folder / "JPEGImages")
    for name, found in objects.items():
        write_text(folder / "Annotations" / f"{Path(name).stem}.xml", voc_xml(name, found))
    return folder


def yolo_lines(objects: Objects, width: int = WIDTH, height: int = HEIGHT, classes: list[str] = CLASSES) -> str:
    lines = []
    for label, (x, y, w, h) in objects:
        fractions = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
        lines.append(" ".join([str(classes.index(label)), *(f"{fraction:.6f}" for fraction in fractions)]) + "\n")
    return "".join(lines)


def write_yolo(folder: Path, objects: dict[str, Objects] = OBJECTS) -> Path:
    """`images/` and `labels/` with a `data.yaml` of one split."""
    write_images(folder / "images")
    for name, found in objects.items():
        write_text(folder / "labels" / f"{Path(name).stem}.txt", yolo_lines(found))
    write_text(folder / "data.yaml", "train: images\nnames: [cat, dog]\n")
    return folder


def labelme_json(name: str, objects: Objects, **more: Any) -> str:
    """Each box as a rectangle, from its lower right corner to the upper left one."""
    shapes = [
        {"label": label, "points": [[x + w, y + h], [x, y]], "group_id": None, "shape_type": "rectangle", "flags": {}}
        for label, (x, y, w, h) in objects
    ]
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": name, "imageData": None}
    return json.dumps(content | {"imageHeight": HEIGHT, "imageWidth": WIDTH} | more, ensure_ascii=False)


def write_labelme(folder: Path, objects: dict[str, Objects] = OBJECTS) -> Path:
    """A JSON beside each image."""
    write_images(folder)
    for name, found in objects.items():
        write_text(folder / f"{Path(name).stem}.json", labelme_json(name, found))
    return folder


def objects_of(dataset: Dataset) -> dict[str, Objects]:
    """What a split in the row format says, by the name of the image file; in the order of its rows."""
    names = class_names_of(dataset)
    return {
        os.path.basename(row["image"]["path"]): [
            (names[label], bbox)
            for label, bbox in zip(row["objects"]["category"], row["objects"]["bbox"], strict=True)
        ]
        for row in dataset.cast_column("image", Image(decode=False))
    }


def copy_as_voc(dataset: DatasetDict, folder: Path) -> Path:
    """Write a data set in the row format as Pascal VOC, with lists and, in `labels.txt`, the order of the classes."""
    for split, rows in dataset.items():
        stems = []
        for path, width, height, objects in _copy_images(rows, folder / "JPEGImages"):
            stems.append(path.stem)
            write_text(folder / "Annotations" / f"{path.stem}.xml", voc_xml(path.name, objects, "", width, height))
        write_text(folder / "ImageSets" / "Main" / f"{split}.txt", "\n".join(stems))
    write_text(folder / "labels.txt", "\n".join(class_names_of(dataset)))
    return folder


def copy_as_yolo(dataset: DatasetDict, folder: Path) -> Path:
    """Write a data set in the row format as YOLO, with lists that keep the order of the images."""
    names = class_names_of(dataset)
    for split, rows in dataset.items():
        listed = []
        for path, width, height, objects in _copy_images(rows, folder / "images" / split):
            listed.append(f"./images/{split}/{path.name}")
            write_text(folder / "labels" / split / f"{path.stem}.txt", yolo_lines(objects, width, height, names))
        write_text(folder / f"{split}.txt", "\n".join(listed))
    splits = [f"{key}: {split}.txt" for key, split in zip(("train", "val", "test"), dataset, strict=False)]
    write_text(folder / "data.yaml", "\n".join([*splits, "names:", *(f"  - '{name}'" for name in names)]))
    return folder


def _copy_images(rows: Dataset, folder: Path) -> list[tuple[Path, int, int, Objects]]:
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    objects = list(objects_of(rows).values())
    for row, row_objects in zip(rows.cast_column("image", Image(decode=False)), objects, strict=True):
        path = folder / os.path.basename(row["image"]["path"])
        shutil.copyfile(row["image"]["path"], path)
        found.append((path, row["width"], row["height"], row_objects))
    return found
