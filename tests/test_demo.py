import io
import json
import zipfile
import zlib
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from demo_detectors import NAMES, counted_detector, write_picture
from PIL import Image

from dit_detection import DiTDetectionImageProcessor
from dit_detection.demo import handlers as demo_handlers
from dit_detection.demo.images import MIN_THRESHOLD, find_objects, look_at

ALL = [0, 1, 2]


@pytest.fixture
def detector(tiny_model):
    return counted_detector(tiny_model)


@pytest.fixture
def picture(tmp_path):
    """Makes files with random pixels."""
    return lambda name="photo.png", **options: write_picture(tmp_path / name, **options)


@pytest.fixture
def handlers(detector):
    return demo_handlers.DemoHandlers(*detector)


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(gr, "Warning", lambda message, **_: messages.append(message))
    return messages


def see(handlers, *paths, visit=None):
    return handlers.see(list(paths), visit or demo_handlers.Visit(), gr.Progress())[0]


@torch.no_grad()
def straight(detector, path, **options):
    """What post-processing makes of the model's whole output."""
    model, image_processor = detector
    image = Image.open(path)
    outputs = model(**image_processor(image, return_tensors="pt"))
    return image_processor.post_process_object_detection(outputs, target_sizes=[image.size[::-1]], **options)[0]


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("nms_threshold", [0.0, 0.3, 1.0])
def test_boxes_at_any_threshold_are_those_of_a_new_run(detector, picture, threshold, nms_threshold):
    path = picture()
    seen = look_at(*detector, path, "photo.png")
    found = find_objects(seen, detector[1], NAMES, threshold, nms_threshold, ALL)
    expected = straight(detector, path, threshold=threshold, nms_threshold=nms_threshold)
    assert [item["label_id"] for item in found["detections"]] == expected["labels"].tolist()
    torch.testing.assert_close(
        torch.tensor([item["score"] for item in found["detections"]]), expected["scores"], atol=1e-6, rtol=0
    )
    boxes = torch.tensor([item["box_xyxy"] for item in found["detections"]]).reshape(-1, 4)
    torch.testing.assert_close(boxes, expected["boxes"], atol=0.006, rtol=0)


def test_a_class_that_is_not_chosen_makes_room_for_the_others(detector, picture):
    path = picture()
    seen = look_at(*detector, path, "photo.png")
    everything = straight(detector, path, threshold=0.02, max_detections=10_000)
    expected = int((everything["labels"] == 2).sum())
    found = find_objects(seen, detector[1], NAMES, 0.02, detector[1].nms_threshold, [2])["detections"]
    assert {item["label_id"] for item in found} == {2}
    assert len(found) == min(expected, 100) > 0
    assert find_objects(seen, detector[1], NAMES, 0.02, 0.5, [])["detections"] == []


def test_nothing_is_kept_that_no_threshold_can_show(tiny_model, picture):
    model = tiny_model()
    model.config.max_candidates = 10_000
    seen = look_at(model, DiTDetectionImageProcessor(size=64), picture(), "photo.png")
    best = seen.outputs.logits.sigmoid().amax(dim=2)
    assert best.numel() and (best > MIN_THRESHOLD).all()


def test_what_is_shown_changes_without_the_model(detector, handlers, picture):
    visit = see(handlers, picture())
    assert detector[0].num_runs == 1
    image, summary, rows = handlers.show(visit, 0, 0.05, 0.6, ALL)
    assert max(image.size) == 1280 and len(rows) > 0
    assert f"<b>{len(rows)} object" in summary and "photo.png" in summary and "80 &times; 48 pixels" in summary
    assert all(time in summary for time in ("preprocessing", "model", "post-processing"))
    fewer = handlers.show(visit, 0, float(rows[len(rows) // 2][1]), 0.6, ALL)
    assert len(fewer[2]) < len(rows)
    assert fewer[0].tobytes() != image.tobytes()
    assert {row[0] for row in handlers.show(visit, 0, 0.05, 0.6, [1])[2]} <= {"white"}
    assert "<b>red" not in summary and (NAMES[0] not in [row[0] for row in rows] or "&lt;b&gt;red" in summary)
    assert detector[0].num_runs == 1


def test_an_added_file_is_the_only_one_that_is_seen(detector, handlers, picture):
    first, second = picture("a.png"), picture("b.png")
    visit = see(handlers, first)
    visit = see(handlers, first, second, visit=visit)
    assert [image.name for image in visit.images] == ["a.png", "b.png"]
    assert detector[0].num_runs == 2


def test_visitors_do_not_see_each_other(handlers, picture):
    one, other = see(handlers, picture("a.png")), see(handlers, picture("b.png", size=(40, 90)))
    assert "a.png" in handlers.show(one, 0, 0.3, 0.6, ALL)[1]
    assert "b.png" in handlers.show(other, 0, 0.3, 0.6, ALL)[1]
    # An index of the visit before, which the page may still send.
    assert "a.png" in handlers.show(one, 7, 0.3, 0.6, ALL)[1]


def test_no_image_no_picture(handlers):
    visit, index, gallery = handlers.see(None, demo_handlers.Visit(), gr.Progress())
    assert handlers.show(visit, index, 0.3, 0.6, ALL) == (None, demo_handlers.NO_IMAGE_YET, [])
    assert gallery.visible is False


def huge_png(path, side):
    """A valid header of so many pixels a side, and nothing behind it."""
    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, "PNG")
    content = bytearray(stream.getvalue())
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


BROKEN = {
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "text": (lambda path: path.write_text("no image"), "no image"),
    "cut": (lambda path: path.write_bytes(path.with_name("whole.jpg").read_bytes()[:-1500]), "cannot be read"),
    "large": (lambda path: huge_png(path, 10_000), "10000 x 10000 pixels"),
    "giant": (lambda path: huge_png(path, 60_000), "3600000000 pixels"),
    "script": (lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "no image"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_no_image_is_named_and_the_others_are_seen(handlers, picture, warnings, tmp_path, kind):
    picture("whole.jpg")
    make, fault = BROKEN[kind]
    path = tmp_path / "<i>broken.jpg"
    make(path)
    visit = see(handlers, str(path), picture("good.png"))
    assert [image.name for image in visit.images] == ["good.png"]
    (message,) = warnings
    assert "&lt;i&gt;broken.jpg" in message and fault in message and str(tmp_path) not in message
    assert fault in handlers.show(visit, 0, 0.3, 0.6, ALL)[1]
    alone = see(handlers, str(path))
    picture_shown, summary, rows = handlers.show(alone, 0, 0.3, 0.6, ALL)
    assert picture_shown is None and fault in summary and rows == []
    assert "broken.jpg" in json.loads(Path(handlers.save("json", visit, 0.3, 0.6, ALL)).read_text())[1]["file"]


def test_unusual_images_are_seen_upright(handlers, picture, warnings, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((20, 30), 40_000, dtype=np.uint16)).save(deep)
    frames = [Image.new("RGB", (32, 24), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    paths = {
        picture("turned.jpg", size=(80, 40), exif=exif): (40, 80),
        picture("print.jpg", mode="CMYK"): (80, 48),
        picture("dot.png", size=(1, 1)): (1, 1),
        picture("line.png", size=(3000, 1)): (3000, 1),
        picture("grey.png", mode="L"): (80, 48),
        str(deep): (30, 20),
        str(tmp_path / "moving.gif"): (32, 24),
    }
    visit = see(handlers, *paths)
    assert warnings == []
    assert [(image.width, image.height) for image in visit.images] == list(paths.values())
    for index in range(len(paths)):
        drawn, _, rows = handlers.show(visit, index, 0.05, 0.6, ALL)
        width, height = visit.images[index].width, visit.images[index].height
        assert drawn.size == (
            max(1, round(width * 1280 / max(width, height))),
            max(1, round(height * 1280 / max(width, height))),
        )
        assert all(0 <= float(row[2]) <= float(row[4]) <= width for row in rows)
    first_frame = Image.open(io.BytesIO(visit.images[-1].preview))
    assert first_frame.getpixel((600, 400))[0] > 200  # red


def test_saved_files_are_what_the_table_shows(handlers, picture, tmp_path):
    # Two folders with files of one name, which no file that is saved may mix up.
    visit = see(handlers, picture("a/photo.png"), picture("b/photo.png", size=(40, 60)))
    choice = (0.05, 0.5, [0, 2])
    tables = [handlers.show(visit, index, *choice)[2] for index in range(2)]
    saved = {format: Path(handlers.save(format, visit, *choice)) for format in ("json", "coco", "yolo")}
    predictions = json.loads(saved["json"].read_text())
    assert [image["file"] for image in predictions] == ["photo.png", "photo (2).png"]
    for rows, image in zip(tables, predictions, strict=True):
        assert len(rows) > 0
        assert rows == [
            [item["label"], f"{item['score']:.3f}", *(f"{value:.1f}" for value in item["box_xyxy"])]
            for item in image["detections"]
        ]
    coco = json.loads(saved["coco"].read_text())
    assert [category["name"] for category in coco["categories"]] == NAMES
    counts = [sum(box["image_id"] == number for box in coco["annotations"]) for number in (1, 2)]
    assert counts == [len(rows) for rows in tables]
    with zipfile.ZipFile(saved["yolo"]) as archive:
        assert sorted(name for name in archive.namelist() if not name.endswith("/")) == [
            "classes.txt",
            "labels/photo (2).txt",
            "labels/photo.txt",
        ]
        assert len(archive.read("labels/photo.txt").splitlines()) == len(tables[0])


def test_names_are_those_of_the_files_that_are_there(handlers, picture):
    first, second = picture("a/photo.png"), picture("b/photo.png", size=(40, 60))
    visit = see(handlers, first, second)
    for paths, names in (([second], ["photo.png"]), ([second, first], ["photo.png", "photo (2).png"])):
        visit = see(handlers, *paths, visit=visit)
        assert [image.name for image in visit.images] == names


def test_what_cannot_be_saved_says_why(handlers, picture, warnings):
    assert handlers.save("json", demo_handlers.Visit(), 0.3, 0.6, ALL) is None
    assert len(warnings) == 1
    visit = see(handlers, picture("a.png"), picture("a.jpg"))
    with pytest.raises(gr.Error, match=r"a\.png and a\.jpg"):
        handlers.save("yolo", visit, 0.3, 0.6, ALL)


def test_a_folder_of_too_many_images_is_cut_and_says_so(handlers, picture, monkeypatch):
    monkeypatch.setattr(demo_handlers, "MAX_IMAGES", 2)
    visit = see(handlers, *(picture(f"{index}.png") for index in range(5)))
    assert len(visit.images) == 2
    assert "3 files were left out" in handlers.show(visit, 0, 0.3, 0.6, ALL)[1]
