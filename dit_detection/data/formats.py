"""Which annotation format a folder holds, told by looking at it."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

from .hub import find_saved_dataset, is_saved_to_disk
from .image_folder import find_image_folder
from .labelme import find_labelme, looks_like_labelme
from .layouts import list_json_files, looks_like_coco
from .problems import InvalidDatasetError
from .voc import find_voc
from .yolo import find_yolo

Format = Literal["coco", "voc", "yolo", "labelme", "imagefolder", "datasets"]
FORMATS: tuple[Format, ...] = get_args(Format)

FILE_FORMATS: dict[str, Format] = {
    ".json": "coco",
    ".yaml": "yolo",
    ".yml": "yolo",
    ".data": "yolo",
    ".csv": "imagefolder",
    ".jsonl": "imagefolder",
}
LOOKED_FOR = """\
  coco         annotations_train.json, annotations/instances_train2017.json, train/_annotations.coco.json
  voc          Annotations/*.xml, train/*.xml
  yolo         data.yaml, obj.data, labels/*.txt, train/labels/*.txt, text files beside the images
  labelme      a JSON of shapes beside each image
  imagefolder  metadata.jsonl, .csv or .parquet, a CSV of boxes with a header
  datasets     parquet files with the column objects, folders of save_to_disk"""


def find_format(source: Path) -> Format:
    """
    The annotation format of a file or folder.

    Raises:
        InvalidDatasetError: There is none, or more than one.
    """
    if source.is_file():
        if source.suffix.lower() == ".json" and looks_like_labelme(source):
            raise InvalidDatasetError(f"{source} is LabelMe's JSON of one image. Name the folder that it lies in.")
        if source.suffix.lower() in FILE_FORMATS:
            return FILE_FORMATS[source.suffix.lower()]
        raise InvalidDatasetError(
            f"{source} is no file of annotations: known are {', '.join(FILE_FORMATS)}. Name one, or the folder that "
            "holds the data set; unpack archives first."
        )
    found = find_formats(source)
    if len(found) == 1:
        return next(iter(found))
    if found:
        names = ", ".join(f"{format} ({sign})" for format, sign in found.items())
        raise InvalidDatasetError(
            f"{source} holds several annotation formats: {names}. Say which one is meant with --format (format=)."
        )
    raise InvalidDatasetError(
        f"{source} holds no annotations that are known. Looked for:\n{LOOKED_FOR}\n  Found: {_contents(source)}."
    )


def find_formats(folder: Path) -> dict[Format, str]:
    """The annotation formats that a folder shows signs of, and a file of each."""
    if is_saved_to_disk(folder):
        return {"datasets": str(folder)}
    signs: dict[Format, str | None] = {
        "voc": find_voc(folder),
        "yolo": find_yolo(folder),
        "labelme": find_labelme(folder),
        "imagefolder": find_image_folder(folder),
        "datasets": find_saved_dataset(folder),
    }
    found = {format: sign for format, sign in signs.items() if sign is not None}
    json_files = list_json_files(folder)
    coco = next((file for file in json_files if looks_like_coco(file) and not looks_like_labelme(file)), None)
    if coco is not None or (json_files and not found):
        found["coco"] = str(coco or json_files[0])
        found.pop("labelme", None)  # what was drawn with LabelMe and then written as COCO
    return found


def _contents(folder: Path) -> str:
    files = list(islice((file for file in folder.rglob("*") if file.is_file()), 10_000))
    suffixes = Counter(file.suffix.lower() or "(no suffix)" for file in files)
    kinds = [f"{count} x {suffix}" for suffix, count in suffixes.most_common(6)]
    folders = sorted(child.name for child in folder.iterdir() if child.is_dir())[:6]
    return ", ".join([*kinds, *(f"{name}/" for name in folders)]) or "nothing"
