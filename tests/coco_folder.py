"""A small COCO data set for tests: two images of 40 x 30 pixels, three objects, category ids with a gap."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

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
