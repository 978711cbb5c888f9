import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_folder import coco_content, write_coco, write_images, write_json
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_detection.data import InvalidDatasetError, load_detection_dataset
from dit_detection.data.annotations import Annotations
from dit_detection.data.checks import MIN_SIDE, check_objects
from dit_detection.data.problems import REMEDIES, ProblemLog

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
MISSING = object()
FIRST_BOX = 'annotation 1 of image 9 ("b.png"): field "bbox" is '
OUT = "file name leads outside the image folder"
FRACTIONS = {"id": 1, "image_id": 7, "category_id": 5, "bbox": [0.1, 0.2, 0.5, 1]}
ROUNDED = [FRACTIONS | {"id": index, "bbox": [-1e-6, 0.2, 0.5, side]} for index, side in enumerate((1, 1.001, 1.5))]

# Which list of the file; what becomes of its first entry (or of the file itself); part of the message; its kind; how
# many of the 3 objects are left with on_invalid="drop", or None where that does not help.
DAMAGES: list[tuple[str | None, dict[str, Any], str, str, int | None]] = [
    ("annotations", {"bbox": [NAN, 2, 3, 4]}, FIRST_BOX + "[nan, 2.0", "non-finite box", 2),
    ("annotations", {"bbox": [1, 2, INF, 4]}, FIRST_BOX + "[1.0, 2.0, inf", "non-finite box", 2),
    ("annotations", {"bbox": ["1", 2, 3, 4]}, FIRST_BOX + "['1', 2, 3, 4], not four numbers", "unusable object", 2),
    ("annotations", {"bbox": [True, 2, 3, 4]}, FIRST_BOX + "[True, 2, 3, 4], not four", "unusable object", 2),
    ("annotations", {"bbox": [HUGE, 2, 3, 4]}, FIRST_BOX + "[1000", "unusable object", 2),
    ("annotations", {"bbox": [1, 2, 3]}, FIRST_BOX + "[1, 2, 3], not four", "unusable object", 2),
    ("annotations", {"bbox": MISSING}, FIRST_BOX + "None, not four", "unusable object", 2),
    ("annotations", {"bbox": [1, 2, 0, 4]}, FIRST_BOX + "[1.0, 2.0, 0.0, 4.0]", "empty box", 2),
    ("annotations", {"bbox": [1, 2, 3, -4]}, FIRST_BOX + "[1.0, 2.0, 3.0, -4.0]", "empty box", 2),
    ("annotations", {"bbox": [35, 2, 8, 4]}, "8.0, 4.0] in an image of 40 x 30 pixels", "box outside the image", 2),
    ("annotations", {"bbox": [40, 2, 0.5, 4]}, FIRST_BOX + "[40.0, 2.0, 0.5, 4.0]", "box outside the image", 2),
    (None, {"annotations": [FRACTIONS]}, "all boxes lie between 0 and 1, as fractions do", "unusable data set", None),
    (None, {"annotations": ROUNDED}, "2 of 3 boxes lie between 0 and 1, as fractions do", "unusable data set", None),
    ("annotations", {"area": "80"}, "field \"area\" is '80'", "unusable area", 2),
    ("annotations", {"area": -1}, 'field "area" is -1', "unusable area", 2),
    ("annotations", {"iscrowd": 2}, 'field "iscrowd" is 2', "unusable iscrowd", 2),
    ("annotations", {"category_id": 3}, 'field "category_id" is 3; there are 2, 5', "unknown category", 2),
    ("annotations", {"category_id": "5"}, "annotations[0]: it has {'id': 1, 'image_id'", "unusable object", 2),
    ("annotations", {"id": MISSING}, "annotations[0]: it has {'id': None, 'image_id'", "unusable object", 2),
    ("annotations", {"image_id": 8}, 'annotation 1: field "image_id" is 8, which no image', "unknown image", 2),
    ("annotations", {"id": 2}, 'field "id" is 2 again (annotations[1])', "duplicate annotation id", 2),
    ("images", {"file_name": "c.png"}, 'image 7 ("c.png"): there is no file ', "missing image file", 2),
    ("images", {"file_name": MISSING}, 'images[0]: field "file_name" is None', "unusable image entry", 2),
    ("images", {"file_name": "../../etc/passwd"}, "field \"file_name\" is '../../etc/passwd'", OUT, 2),
    ("images", {"file_name": "x\\..\\..\\a.png"}, 'field "file_name" is \'x', OUT, 2),
    ("images", {"file_name": "/etc/passwd"}, "field \"file_name\" is '/etc/passwd'", OUT, 2),
    ("images", {"file_name": "C:\\a.png"}, 'field "file_name" is \'C:', OUT, 2),
    ("images", {"width": 50}, "50 x 30, the file has 40 x 30 pixels", "image size differs from the annotation", 2),
    ("images", {"width": "40"}, "images[0]: field \"width\" is '40'", "unusable image entry", 2),
    ("images", {"height": -30}, 'images[0]: field "height" is -30', "unusable image entry", 2),
    ("images", {"id": "7"}, "images[0]: field \"id\" is '7'", "unusable image entry", 2),
    ("images", {"id": 9}, 'images[1]: field "id" is 9 again ("b.png")', "duplicate image id", None),
    ("categories", {"name": MISSING}, "categories[0] is {'id': 5}", "unusable category", None),
    ("categories", {"name": "cat"}, "categories[1]: id 2 or name 'cat' is taken", "unusable category", None),
    ("categories", {"id": 2}, "categories[1]: id 2 or name 'cat' is taken", "unusable category", None),
    (None, {"categories": []}, 'key "categories" is an empty list', "unusable category", None),
    (None, {"categories": MISSING}, '"categories" is missing; there are: images, anno', "unusable file", None),
    (None, {"images": {}}, 'key "images" is not a list', "unusable file", None),
    (None, {"images": []}, 'key "images" is an empty list', "no images", None),
    (None, {"images": [3, 4]}, "images[0]: it is 3", "unusable image entry", None),
    (None, {"annotations": []}, "none of its images has a valid object", "no objects", None),
    (None, {"annotations": [3]}, "annotations[0]: it has 3", "unusable object", None),
]


@pytest.mark.parametrize(("where", "fields", "what", "kind", "num_left"), DAMAGES)
def test_damage_is_reported(
    tmp_path: Path, where: str | None, fields: dict[str, Any], what: str, kind: str, num_left: int | None
) -> None:
    content = coco_content()
    entry = content[where][0] if where else content
    entry.update(fields)
    for field in [field for field, value in fields.items() if value is MISSING]:
        del entry[field]
    write_coco(tmp_path, content)
    with pytest.raises(InvalidDatasetError) as error:
        load_detection_dataset(tmp_path)
    message = str(error.value)
    assert f"{tmp_path / 'annotations_train.json'}: " in message
    assert what in message
    assert f" x {kind}: {REMEDIES[kind]}" in message
    if num_left is None:
        with pytest.raises(
            InvalidDatasetError, match=r"no (images|objects)|unusable (file|category|data set)|duplicate image"
        ):
            load_detection_dataset(tmp_path, on_invalid="drop")
    else:
        train = load_detection_dataset(tmp_path, on_invalid="drop")["train"]
        assert sum(len(objects["bbox"]) for objects in train["objects"]) == num_left


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (json.dumps(coco_content())[:-40], "not valid JSON, perhaps cut off, at line 1, column"),
        ("", "not valid JSON, perhaps cut off, at line 1, column 1"),
        ("[]", "holds a list, not an object"),
        ('{"images": ' + "[" * 100_000, "cannot be read: maximum recursion depth exceeded"),
    ],
)
def test_broken_json(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(InvalidDatasetError, match=f"annotations_train.json: {what}"):
        load_detection_dataset(write_coco(tmp_path, text))


def test_json_that_is_not_utf8(tmp_path: Path) -> None:
    file = write_coco(tmp_path) / "annotations_train.json"
    file.write_bytes(json.dumps(coco_content()).encode("utf-16"))
    with pytest.raises(InvalidDatasetError, match=r"annotations_train.json: cannot be read: .*utf-8"):
        load_detection_dataset(tmp_path)


def test_json_with_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = write_coco(tmp_path) / "annotations_train.json"
    file.write_text(json.dumps(coco_content()), encoding="utf-8-sig")
    assert len(load_detection_dataset(tmp_path)["train"]) == 2


def test_file_that_is_no_image(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "images" / "b.png").write_text("<html>not found</html>")
    with pytest.raises(InvalidDatasetError, match=r'image 9 \("b.png"\): .*b.png cannot be opened: cannot identify'):
        load_detection_dataset(tmp_path)
    assert len(load_detection_dataset(tmp_path, on_invalid="drop")["train"]) == 1


def test_image_too_large_to_be_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 500)
    with pytest.raises(InvalidDatasetError, match=r"cannot be opened: Image size \(1200 pixels\) exceeds limit"):
        load_detection_dataset(write_coco(tmp_path))


def test_categories_that_differ_between_splits(tmp_path: Path) -> None:
    content = coco_content()
    content["categories"][0]["name"] = "wolf"
    write_json(write_coco(tmp_path) / "annotations_val.json", content)
    with pytest.raises(
        InvalidDatasetError, match=r"_val.json: key .* has {5: 'wolf'} where .*train.json has {5: 'dog'}"
    ):
        load_detection_dataset(tmp_path)


def test_order_of_categories_does_not_matter(tmp_path: Path) -> None:
    content = coco_content()
    content["categories"].reverse()
    write_json(write_coco(tmp_path) / "annotations_val.json", content)
    dataset = load_detection_dataset(tmp_path)
    assert dataset["train"].features == dataset["validation"].features
    assert list(dataset["train"]["objects"]) == list(dataset["validation"]["objects"])


def test_all_problems_of_all_splits_are_in_one_report(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] += [{"id": 10 + index, "image_id": 9, "category_id": 99} for index in range(12)]
    write_coco(tmp_path, content)
    write_json(tmp_path / "annotations_test.json", "{")
    with pytest.raises(InvalidDatasetError) as error:
        load_detection_dataset(tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0] == "13 problems in the data set."
    assert len([line for line in lines if ": annotation " in line]) == 10
    assert "  ... and 3 more." in lines
    assert any(line.startswith("  12 x unknown category: ") for line in lines)
    assert any(line.startswith("  1 x unusable file: ") for line in lines)


def test_drop_says_what_it_left_out(tmp_path: Path, caplog) -> None:
    content = coco_content()
    content["images"][0]["file_name"] = "gone.png"
    content["annotations"][0]["bbox"] = [1, 2, 3, -4]
    content["annotations"][2]["iscrowd"] = 0
    write_coco(tmp_path, content)
    with caplog.at_level(logging.WARNING):
        train = load_detection_dataset(tmp_path, on_invalid="drop")["train"]
    assert 'Left out or clipped (on_invalid="drop"): 1 x missing image file, 1 x empty box.' in caplog.text
    assert "1 objects belong to invalid images" in caplog.text
    assert list(train["image_id"]) == [9]
    assert train[0]["objects"]["id"] == [3]
    assert train[0]["image"].getpixel((0, 0)) == (40, 100, 200)  # of b.png


def test_clip(tmp_path: Path, caplog) -> None:
    content = coco_content()
    content["annotations"][0].update(bbox=[-10, 10, 20, 40], area=600)  # (0, 10) to (10, 30) is left: a quarter
    content["annotations"][1].update(bbox=[41, 10, 20, 40])  # nothing is left
    with caplog.at_level(logging.WARNING):
        train = load_detection_dataset(write_coco(tmp_path, content), on_invalid="clip")["train"]
    assert "2 x box outside the image" in caplog.text
    assert [objects["bbox"] for objects in train["objects"]] == [[], [[0, 10, 10, 20], [30, 20, 10, 10]]]
    assert train[1]["objects"]["area"] == [150, 50.5]


def test_up_to_one_pixel_outside_is_cut(tmp_path: Path, caplog) -> None:
    content = coco_content()
    content["annotations"][0].update(bbox=[-1, 2, 10, 8], area=80)
    with caplog.at_level(logging.WARNING):
        train = load_detection_dataset(write_coco(tmp_path, content))["train"]
    assert "1 boxes cut to their image by up to 1 pixel" in caplog.text
    assert train[1]["objects"]["bbox"][0] == [0, 2, 9, 8]
    assert train[1]["objects"]["area"][0] == 72


def test_backslashes_and_folders_in_file_names(tmp_path: Path) -> None:
    content = coco_content()
    content["images"][0]["file_name"] = "images\\a.png"
    content["images"][1]["file_name"] = "images/../images/b.png"
    write_images(tmp_path / "images")
    write_json(tmp_path / "annotations_train.json", content)
    assert [image.size for image in load_detection_dataset(tmp_path)["train"]["image"]] == [(40, 30)] * 2


any_number = st.one_of(st.floats(width=64), st.integers(-(2**62), 2**62), st.floats(-60, 60))


@settings(max_examples=100, deadline=None)
@given(boxes=st.lists(st.tuples(any_number, any_number, any_number, any_number), max_size=6))
def test_boxes_that_stay_lie_inside_their_image(boxes: list[tuple[float, float, float, float]]) -> None:
    for on_invalid in ("drop", "clip"):
        annotations = Annotations("file", ProblemLog(on_invalid))
        annotations.add_image(1, "a.png", 40, 30)
        for index, box in enumerate(boxes):
            annotations.add_object(0, index, box, 0)
        objects = check_objects(annotations)
        low, sides = objects["bbox"][:, :2], objects["bbox"][:, 2:]
        assert (low >= 0).all()
        assert (low + sides <= np.array([40, 30]) + 1e-9).all()
        assert (sides >= MIN_SIDE).all()
        num_reported = sum(annotations.problems.counts.values())
        assert len(objects["id"]) + num_reported >= len(boxes)
        assert on_invalid == "clip" or len(objects["id"]) + num_reported == len(boxes)
