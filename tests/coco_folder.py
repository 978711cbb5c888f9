"""
COCO data sets for tests. The one that is not drawn: two images of 40 x 30 pixels, three objects, ids with a gap.
"""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from dit_detection.data import draw_shapes_dataset

WIDTH, HEIGHT = 40, 30


def coco_content() -> dict[str, Any]:
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 9, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 5, "bbox": [1, 2, 10, 8], "area": 80, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0.5, 0, 4, 30]},
            {"id": 3, "image_id": 9, "category_id": 2, "bbox": [30, 20, 10, 10], "area": 50.5, "iscrowd": 1},
        ],
        "categories": [{"id": 5, "name": "dog"}, {"id": 2, "name": "cat"}],
    }


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def write_images(folder: Path, names: tuple[str, ...] = ("a.png", "b.png")) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for shade, name in enumerate(names):
        Image.new("RGB", (WIDTH, HEIGHT), (shade * 40, 100, 200)).save(folder / name)
    return folder


def write_coco(folder: Path, content: Any = None) -> Path:
    """One split, "train", as `annotations_train.json` and `images/`."""
    write_images(folder / "images")
    write_json(folder / "annotations_train.json", coco_content() if content is None else content)
    return folder


def write_shapes_as_coco(folder: Path) -> Path:
    """Drawn shapes on 64 x 64 pixels: four images to train on, two for validation, three to test."""
    dataset = draw_shapes_dataset(4, 2, 3, image_size=64)
    names = dataset["train"].features["objects"]["category"].feature.names
    (folder / "images").mkdir()
    for split, short in {"train": "train", "validation": "val", "test": "test"}.items():
        images, annotations = [], []
        for row in dataset[split]:
            file_name = f"{split}_{row['image_id']}.png"
            row["image"].save(folder / "images" / file_name)
            images.append({"id": row["image_id"], "file_name": file_name, "width": 64, "height": 64})
            for box, label in zip(row["objects"]["bbox"], row["objects"]["category"], strict=True):
                annotation = {"id": len(annotations) + 1, "image_id": row["image_id"], "category_id": label + 1}
                annotations.append({**annotation, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
        categories = [{"id": index + 1, "name": name} for index, name in enumerate(names)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write_json(folder / f"annotations_{short}.json", content)
    return folder
