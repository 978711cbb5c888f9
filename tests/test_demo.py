import ast
import importlib.metadata
import io
import json
import os
import re
import runpy
import subprocess
import sys
import time
import urllib.request
import zipfile
import zlib
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
import yaml
from demo_browser import REMEDY, TIMEOUT, chromium, drop, find_chromium, open_page, wait_for_summary
from PIL import Image
from playwright.sync_api import expect

from dit_detection import DiTDetectionImageProcessor
from dit_detection.commands import demo as command
from dit_detection.data import draw_shapes_dataset
from dit_detection.demo import handlers as demo_handlers
from dit_detection.demo import page as demo_page
from dit_detection.demo.images import MIN_THRESHOLD, find_objects, look_at
from dit_detection.demo.space import write_space
from dit_detection.sharing.push import push_folder

ROOT = Path(__file__).parents[1]
BCCD = ROOT.parent / "shared" / "data" / "bccd" / "images"
NAMES = ["<b>red</b>", "white", "platelet"]  # the first as a stranger's config may have it
ALL = [0, 1, 2]


@pytest.fixture
def detector(tiny_model):
    """A detector whose forward passes are counted, and its image processor."""
    labels = dict(enumerate(NAMES))
    model = tiny_model(
        prior_probability=0.2, id2label=labels, label2id={name: label for label, name in labels.items()}
    )
    model.num_runs = 0

    def count(*_):
        model.num_runs += 1

    model.register_forward_hook(count)
    return model, DiTDetectionImageProcessor(size=64)


@pytest.fixture
def handlers(detector):
    return demo_handlers.DemoHandlers(*detector)


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(gr, "Warning", lambda message, **_: messages.append(message))
    return messages


@pytest.fixture
def picture(tmp_path):
    """Makes files with random pixels."""

    def make(name="photo.png", size=(80, 48), mode="RGB", **options):
        depth = {"RGB": 3, "CMYK": 4, "L": 1}[mode]
        pixels = np.random.default_rng(len(name)).integers(0, 255, (size[1], size[0], depth), dtype=np.uint8)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.squeeze(-1) if depth == 1 else pixels, mode).save(path, **options)
        return str(path)

    return make


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


@pytest.mark.parametrize(
    ("card_data", "expected"),
    [
        ('{"threshold": 0.437, "threshold_split": "validation"}', 0.44),
        ('{"threshold": 0.0, "threshold_split": "validation"}', 0.01),
        ('{"threshold": 0.5, "threshold_split": null}', 0.3),  # not chosen
        ('{"threshold": null, "threshold_split": "validation"}', 0.3),
        ('{"threshold": 7.0, "threshold_split": "validation"}', 0.3),
        ("[1]", 0.3),
        ("{", 0.3),
        (None, 0.3),
    ],
)
def test_the_first_threshold_is_the_one_of_the_card(card_data, expected):
    assert demo_page.chosen_threshold(card_data) == expected


def test_the_card_in_the_page_loads_nothing():
    card = "---\nlicense: mit\n---\n\n# Cells\n\n![plot](https://e.org/a.png) text <img src='https://e.org/b.png'>\n"
    assert demo_page.without_pictures(card).strip() == "# Cells\n\n text"
    for picture in (r"![run\[1\]](https://e.org/a.png)", "![plot][there]", "![plot]", "![[a](https://e.org/a.png)"):
        left = demo_page.without_pictures(f"a {picture} b\n\n[there]: https://e.org/a.png")
        assert "![" not in left and left.startswith("a")


@pytest.fixture
def saved(detector, tmp_path):
    folder = tmp_path / "cells"
    detector[0].save_pretrained(folder)
    detector[1].save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n\n# What it detects\n")
    (folder / "model_card.json").write_text('{"threshold": 0.42, "threshold_split": "validation"}')
    (folder / "training_args.bin").write_bytes(b"pickled")
    return folder


def test_the_page_of_a_folder(saved):
    page = demo_page.load_page(str(saved), device="cpu")
    parts = {block.elem_id: block for block in page.blocks.values() if getattr(block, "elem_id", None)}
    assert page.title == "cells"
    assert parts["confidence"].value == 0.42
    assert parts["nms"].value == 0.6
    assert parts["classes"].choices == [(name, label) for label, name in enumerate(NAMES)]
    assert any("# What it detects" in str(getattr(block, "value", "")) for block in page.blocks.values())
    assert not page.analytics_enabled
    assert all(function.api_visibility == "private" for function in page.fns.values() if function.fn)


def test_the_command_hands_its_options_on(saved, monkeypatch):
    launched = {}
    monkeypatch.setattr(demo_page, "launch", lambda page, **options: launched.update(options))
    command.main([str(saved), "--device", "cpu"])
    assert launched == {"server_name": "127.0.0.1", "server_port": None, "share": False}
    command.main([str(saved), "--device", "cpu", "--host", "0.0.0.0", "--port", "7999", "--share"])
    assert launched == {"server_name": "0.0.0.0", "server_port": 7999, "share": True}


def test_the_command_says_what_is_wrong(saved, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="nowhere"):
        command.main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"dit-detect demo: .*tpu"):
        command.main([str(saved), "--device", "tpu:7"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "yolos"}')
    with pytest.raises(SystemExit, match="yolos"):
        command.main([str(tmp_path / "other"), "--space", str(tmp_path / "space")])
    with pytest.raises(SystemExit, match="not empty"):
        command.main([str(saved), "--space", str(saved)])
    assert not (tmp_path / "space").exists()
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r'pip install "dit_detection\[demo\]"'):
        command.main([str(saved)])


def test_no_other_command_waits_for_gradio():
    # It takes seconds to import, so only functions may name the two files that do.
    for path in (ROOT / "dit_detection").rglob("*.py"):
        if path.parent.name == "demo":
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                assert "gradio" not in [alias.name for alias in node.names], path
            elif isinstance(node, ast.ImportFrom):
                is_command = path.name == "cli.py" and node.module == "commands"
                imported = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
                assert is_command or not imported & {"gradio", "page", "handlers"}, path


def front_matter(space):
    return yaml.safe_load((space / "README.md").read_text().split("---")[1])


def test_a_space_of_a_folder_carries_all_it_needs(saved, tmp_path, capsys):
    space = tmp_path / "space"
    command.main([str(saved), "--space", str(space)])
    assert "hf upload" in capsys.readouterr().out
    facts = front_matter(space)
    assert {name: facts[name] for name in ("sdk", "app_file", "title", "license")} == {
        "sdk": "gradio",
        "app_file": "app.py",
        "title": "cells",
        "license": "cc-by-nc-4.0",
    }
    assert facts["sdk_version"] == importlib.metadata.version("gradio")
    assert "models" not in facts
    declared = ast.literal_eval(
        (ROOT / "pyproject.toml").read_text().split("\ndependencies = ")[1].split("\n]")[0] + "]"
    )
    required = (space / "requirements.txt").read_text().splitlines()
    assert sorted(line.replace("-", "_") for line in required) == sorted(line.replace("-", "_") for line in declared)
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {
        path.name for path in (space / "model").iterdir()
    }
    assert not list(space.rglob("*.bin")) and not list(space.rglob("*.pyc"))
    ours = ROOT / "dit_detection"
    assert {path.relative_to(ours) for path in ours.rglob("*.py")} == {
        path.relative_to(space / "dit_detection") for path in (space / "dit_detection").rglob("*.py")
    }
    assert (space / "dit_detection" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_app_of_a_space_serves_its_model(saved, tmp_path, monkeypatch):
    write_space(tmp_path / "space", str(saved))
    pages = []
    monkeypatch.setattr(demo_page, "launch", lambda page, **options: pages.append((page.title, options)))
    runpy.run_path(str(tmp_path / "space" / "app.py"))
    assert pages == [("cells", {})]


def test_a_space_of_a_repository_names_it_at_its_commit(saved, tmp_path, hub):
    (saved / "model_card.json").unlink()
    push_folder(saved, "someone/cells")
    space = tmp_path / "space"
    write_space(space, "someone/cells")
    commit = hub.repositories["someone/cells"].resolve("main")
    assert f"'someone/cells', revision='{commit}', title='cells'" in (space / "app.py").read_text()
    facts = front_matter(space)
    assert facts["models"] == ["someone/cells"] and facts["license"] == "cc-by-nc-4.0"
    assert not (space / "model").exists()
    assert not list(space.rglob("*.safetensors"))  # nor the DiT that new detectors are made of


def test_an_adapter_is_merged_before_it_becomes_a_space(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="dit-detect convert"):
        write_space(tmp_path / "space", str(tmp_path / "adapter"))


@pytest.mark.long
def test_a_space_runs_where_the_package_is_not_installed(saved, tmp_path):
    space = tmp_path / "space"
    write_space(space, str(saved))
    # The checkout is taken off the path, and what is imported must come from the Space.
    code = (
        f"import sys, runpy; sys.path = [{str(space)!r}] + [p for p in sys.path if p not in ('', {str(ROOT)!r})]\n"
        "import dit_detection; print('package', dit_detection.__file__, flush=True)\n"
        "runpy.run_path('app.py', run_name='__main__')"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_SERVER_PORT": "7963", "PYTHONPATH": ""}
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=space, env=environment, stdout=stream, stderr=stream
        )
    try:
        end = time.monotonic() + 300
        while "Running on local URL" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        assert f"package {space}" in log.read_text()
        with urllib.request.urlopen("http://127.0.0.1:7963/config", timeout=60) as answer:
            assert json.load(answer)["title"] == "cells"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def browser():
    path = find_chromium()
    if path is None and os.environ.get("CI"):
        pytest.fail(REMEDY)
    if path is None:
        pytest.skip(REMEDY)
    with chromium(path) as browser:
        yield browser


def wait_for_objects(page, count):
    """Until the summary and the table (which has a row of headings) have that many."""
    wait_for_summary(page, re.compile(rf"^\s*{count} object"))
    page.wait_for_selector(f"#table [role=grid][aria-rowcount='{count + 1}']")


def download(page, format):
    with page.expect_download() as waiting:
        page.click(f"#save-{format}")
    return Path(waiting.value.path()), waiting.value.suggested_filename


@pytest.mark.slow
def test_in_a_browser(detector, browser, picture, tmp_path):
    if BCCD.is_dir():
        good = BCCD / "BloodImage_00000.jpg"
    else:
        good = tmp_path / "shapes.png"
        draw_shapes_dataset(1, 1, 1, image_size=96)["test"][0]["image"].save(good)
    model = detector[0]
    served = demo_page.build_page(*detector, title="Tiny", threshold=0.5)
    demo_page.launch(served, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        page = open_page(browser, served.local_url)
        elsewhere = []
        page.on("request", lambda request: elsewhere.append(request.url))
        drop(page, [good])
        summary = wait_for_summary(page, good.name)
        count = int(summary.split()[0])
        page.wait_for_selector("#picture img")
        wait_for_objects(page, count)
        assert count > 0 and model.num_runs == 1
        before = page.get_attribute("#picture img", "src")

        predictions = json.loads(download(page, "json")[0].read_text())
        scores = [item["score"] for item in predictions[0]["detections"]]
        assert len(scores) == count

        # A threshold between the best and the worst score, at two digits: fewer boxes, and no run of the model.
        threshold = round(sorted(scores)[len(scores) // 2], 2)
        page.fill("#confidence input[type=number]", str(threshold))
        page.press("#confidence input[type=number]", "Tab")
        expected = sum(score > threshold for score in scores)
        assert 0 < expected < count
        wait_for_objects(page, expected)
        expect(page.locator("#picture img")).not_to_have_attribute("src", before, timeout=TIMEOUT)

        # One class less.
        page.click("#classes label >> nth=1")
        others = [item for item in predictions[0]["detections"] if item["label_id"] != 1 and item["score"] > threshold]
        wait_for_objects(page, len(others))
        expect(page.locator("#summary")).not_to_contain_text(NAMES[1], use_inner_text=True, timeout=TIMEOUT)
        found, name = download(page, "json")
        (shown,) = json.loads(found.read_text())
        assert name == "predictions.json" and shown["file"] == good.name
        assert {item["label"] for item in shown["detections"]} <= {NAMES[0], NAMES[2]}
        found, name = download(page, "coco")
        assert name == "coco.json" and len(json.loads(found.read_text())["annotations"]) == len(shown["detections"])
        found, name = download(page, "yolo")
        with zipfile.ZipFile(found) as archive:
            lines = archive.read(f"labels/{good.stem}.txt").splitlines()
        assert name == "yolo.zip" and len(lines) == len(shown["detections"])
        assert model.num_runs == 1

        # Another visitor has a page of their own.
        other = open_page(browser, served.local_url)
        wait_for_summary(other, "No image yet")
        broken = tmp_path / "broken.jpg"
        broken.write_bytes(good.read_bytes()[:200])
        drop(other, [broken])
        # The message first, as it goes after some seconds.
        expect(other.locator(".toast-wrap")).to_contain_text("broken.jpg", use_inner_text=True, timeout=TIMEOUT)
        wait_for_summary(other, "broken.jpg cannot be read")
        assert good.name in page.inner_text("#summary")
        # The page lives on: a folder, a click on its second image, and the camera.
        folder = tmp_path / "folder"
        picture("folder/first.png"), picture("folder/second.png", size=(50, 70))
        other.click("role=tab[name='Folder']")
        drop(other, [folder], "folder")
        wait_for_summary(other, "first.png")
        other.click("#gallery .thumbnail-item >> nth=1")
        wait_for_summary(other, "50 \u00d7 70 pixels")
        other.click("role=tab[name='Webcam']")
        runs = model.num_runs
        other.click("#webcam button:has-text('Webcam')")
        other.wait_for_function("document.querySelector('#webcam video')?.videoWidth > 0")
        other.click("#webcam button[aria-label='capture photo']")
        wait_for_summary(other, "in image.")
        assert model.num_runs == runs + 1
        assert all(url.startswith((served.local_url, "data:", "blob:")) for url in elsewhere)
    finally:
        served.close()
