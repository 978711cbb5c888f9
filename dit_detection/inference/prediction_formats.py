"""
What a detector found, in the forms that other tools read: JSON, COCO and YOLO.

A *prediction* is one image:

    file        its name, as it was given
    image_id    of its data set, or its place in the list of images
    width       pixels
    height
    detections  best first: [{"label": "cat", "label_id": 0, "score": 0.9, "box_xyxy": [left, top, right, bottom]}]
    error       why it could not be read (it then has neither size nor detections), or None

Boxes are in pixels of the image. Everything here is plain Python, so a list of predictions is JSON as it stands.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict


class Detection(TypedDict):
    """An object that was found."""

    label: str
    label_id: int
    score: float
    box_xyxy: list[float]


class Prediction(TypedDict):
    """An image and what was found in it."""

    file: str
    image_id: int
    width: int | None
    height: int | None
    detections: list[Detection]
    error: str | None


def prediction_of(
    file: str,
    image_id: int,
    width: int,
    height: int,
    scores: Any,
    labels: Any,
    boxes: Any,
    class_names: Sequence[str],
) -> Prediction:
    """
    One image's result of `post_process_object_detection` as a prediction.

    Args:
        file (`str`), image_id (`int`): Of the image.
        width (`int`), height (`int`): Pixels.
        scores (`torch.Tensor`, `np.ndarray` or `list` of shape `(M,)`): Kept to 6 digits.
        labels (`torch.Tensor`, `np.ndarray` or `list` of shape `(M,)`): From 0.
        boxes (`torch.Tensor`, `np.ndarray` or `list` of shape `(M, 4)`): xyxy, pixels; kept to 2 digits.
        class_names (`Sequence[str]`): In the order of the labels.
    """
    return {
        "file": file,
        "image_id": image_id,
        "width": width,
        "height": height,
        "detections": detections_of(scores, labels, boxes, class_names),
        "error": None,
    }


def detections_of(scores: Any, labels: Any, boxes: Any, class_names: Sequence[str]) -> list[Detection]:
    """The `detections` of `prediction_of`, which says what the arguments are."""
    columns = zip(_listed(scores), _listed(labels), _listed(boxes), strict=True)
    return [
        {
            "label": class_names[label],
            "label_id": label,
            "score": round(score, 6),
            "box_xyxy": [round(value, 2) for value in box],
        }
        for score, label, box in columns
    ]


def unreadable(file: str, image_id: int, error: str) -> Prediction:
    """The prediction that stands for an image that could not be read."""
    return {"file": file, "image_id": image_id, "width": None, "height": None, "detections": [], "error": error}


def to_json(predictions: Iterable[Prediction]) -> str:
    """A JSON list, one image a line."""
    return "".join(_json_list(predictions))


def to_coco(predictions: Sequence[Prediction], class_names: Sequence[str]) -> dict[str, Any]:
    """
    COCO's JSON, the annotations with scores: FiftyOne, Label Studio's converter and supervision import it.

    Categories count from 1, in the order of the labels. Images that could not be read are listed under "unreadable"
    instead of "images". The list under "annotations" alone is what pycocotools' `loadRes` and FiftyOne's
    `add_coco_labels` take.

    Raises:
        ValueError: Two images have the same `image_id`.
    """
    coco: dict[str, Any] = json.loads("".join(_coco(predictions, class_names)))
    return coco


def to_yolo(prediction: Prediction) -> str:
    """
    The text of an image's label file: `class x y width height confidence` a line, the centre and sides of the box as
    fractions of the image; empty if nothing was found.

    Source: https://docs.ultralytics.com/modes/predict (`save_txt`, `save_conf`)
    """
    lines = []
    for found in prediction["detections"]:
        left, top, right, bottom = found["box_xyxy"]
        width, height = prediction["width"] or 1, prediction["height"] or 1
        box = (
            (left + right) / 2 / width,
            (top + bottom) / 2 / height,
            (right - left) / width,
            (bottom - top) / height,
        )
        lines.append(f"{found['label_id']} {' '.join(f'{value:.6f}' for value in box)} {found['score']:.6f}\n")
    return "".join(lines)


def write_predictions(
    predictions: Iterable[Prediction], folder: Path, format: str, class_names: Sequence[str]
) -> Path:
    """
    Write predictions in a format, holding no more than one of them at a time.

    A file has its name only once it is whole.

    Args:
        predictions (`Iterable`): Gone through several times, so no generator.
        folder (`Path`): Exists.
        format (`str`): "json" (`predictions.json`), "coco" (`coco.json`) or "yolo" (`yolo/classes.txt`, and in
            `yolo/labels/` a text per image that could be read, named as it is below the folder that all images share).
        class_names (`Sequence[str]`): In the order of the labels.

    Returns:
        `Path`: The file, or YOLO's folder.

    Raises:
        ValueError: The format is another, or cannot tell two of the images apart: they have the same `image_id`
            (COCO), or names that differ in their suffix alone (YOLO).
    """
    if format == "json":
        return _write(folder / "predictions.json", _json_list(predictions))
    if format == "coco":
        return _write(folder / "coco.json", _coco(predictions, class_names))
    if format != "yolo":
        raise ValueError(f'format is {format!r}; it must be "json", "coco" or "yolo".')
    # A line is a class: one of two lines would move all that follow.
    _write(folder / "yolo" / "classes.txt", (f"{' '.join(name.splitlines())}\n" for name in class_names))
    names = yolo_label_names([prediction["file"] for prediction in predictions])
    for prediction, name in zip(predictions, names, strict=True):
        if prediction["error"] is None:
            _write(folder / "yolo" / "labels" / f"{name}.txt", [to_yolo(prediction)])
    return folder / "yolo"


def yolo_label_names(files: Sequence[str]) -> list[str]:
    """
    The label files of images, in their order, below the folder that all images share and without their suffix.

    Raises:
        ValueError: Two would be the same.
    """
    folders = {os.path.dirname(os.path.abspath(file)) for file in files}
    root = os.path.commonpath(folders) if folders else ""
    names: dict[str, str] = {}
    for file in files:
        # What is left below the folder of all images leads nowhere else, whatever the name was.
        name = os.path.splitext(os.path.relpath(os.path.abspath(file), root))[0]
        if name in names:
            raise ValueError(
                f"{names[name]} and {file} would have the same YOLO label file, {name}.txt. Rename one, or take the "
                "format coco."
            )
        names[name] = file
    return list(names)


def _listed(values: Any) -> list[Any]:
    listed: list[Any] = values.tolist() if hasattr(values, "tolist") else list(values)
    return listed


def _json_list(entries: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    separator = "[\n"
    for entry in entries:
        yield separator + json.dumps(entry)
        separator = ",\n"
    yield "[]\n" if separator == "[\n" else "\n]\n"


def _coco(predictions: Iterable[Prediction], class_names: Sequence[str]) -> Iterator[str]:
    """The text of COCO's JSON in pieces."""
    yield '{"info": {"description": "predictions of dit_detection"},\n"categories": '
    yield json.dumps([{"id": label + 1, "name": name} for label, name in enumerate(class_names)])
    for field, entries in (
        ("images", _coco_images(predictions)),
        ("annotations", _coco_annotations(predictions)),
        ("unreadable", _unreadable(predictions)),
    ):
        yield f',\n"{field}": '
        yield from _json_list(entries)
    yield "}\n"


def _coco_images(predictions: Iterable[Prediction]) -> Iterator[dict[str, Any]]:
    seen: set[int] = set()
    for prediction in predictions:
        if prediction["image_id"] in seen:
            raise ValueError(
                f"{prediction['file']}: an earlier image has the same image_id, {prediction['image_id']}, so COCO "
                "cannot tell them apart. Take another format, or correct the data set."
            )
        seen.add(prediction["image_id"])
        if prediction["error"] is None:
            size = {"width": prediction["width"], "height": prediction["height"]}
            yield {"id": prediction["image_id"], "file_name": prediction["file"], **size}


def _coco_annotations(predictions: Iterable[Prediction]) -> Iterator[dict[str, Any]]:
    number = 0
    for prediction in predictions:
        for found in prediction["detections"]:
            number += 1  # from 1: pycocotools takes 0 for no match
            left, top, right, bottom = found["box_xyxy"]
            width, height = round(right - left, 2), round(bottom - top, 2)
            yield {
                "id": number,
                "image_id": prediction["image_id"],
                "category_id": found["label_id"] + 1,
                "bbox": [left, top, width, height],
                "area": round(width * height, 2),
                "iscrowd": 0,
                "score": found["score"],
            }


def _unreadable(predictions: Iterable[Prediction]) -> Iterator[dict[str, Any]]:
    for prediction in predictions:
        if prediction["error"] is not None:
            yield {"file_name": prediction["file"], "error": prediction["error"]}


def _write(path: Path, pieces: Iterable[str]) -> Path:
    """A file that has its name only once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8") as stream:
            stream.writelines(pieces)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
