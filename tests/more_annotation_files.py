"""The two images of `annotation_folders.py` in the formats that few tests need."""

import json
import os
from pathlib import Path

from annotation_folders import OBJECTS, write_text, write_voc, write_yolo
from coco_folder import write_images

CSV = "file_name,xmin,ymin,xmax,ymax,label\na.png,0.5,0,4.5,30,cat\nb.png,1,2,11,10,dog\nb.png,30,20,40,30,cat\n"
ROWS = [
    {"file_name": name, "objects": {"bbox": [box for _, box in found], "category": [label for label, _ in found]}}
    for name, found in OBJECTS.items()
]


def write_csv(folder: Path) -> Path:
    return write_text(write_images(folder) / "metadata.csv", CSV).parent


def write_jsonl(folder: Path) -> Path:
    return write_text(write_images(folder) / "metadata.jsonl", "\n".join(map(json.dumps, ROWS))).parent


def with_list(folder: Path) -> Path:
    return write_text(write_voc(folder) / "ImageSets" / "Main" / "train.txt", "a\nb\n").parents[2]


def with_image_list(folder: Path) -> Path:
    write_text(write_yolo(folder) / "train.txt", "images/a.png\nimages/b.png\n")
    return write_text(folder / "data.yaml", "train: train.txt\nnames: [cat, dog]\n").parent


def link_out(file: Path) -> None:
    os.rename(file, file.parents[2] / "outside.png")
    file.symlink_to(file.parents[2] / "outside.png")
