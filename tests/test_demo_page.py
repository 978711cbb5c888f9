import ast
import json
import os
import re
import zipfile
from pathlib import Path

import pytest
from demo_browser import REMEDY, TIMEOUT, chromium, drop, find_chromium, open_page, wait_for_summary
from demo_detectors import NAMES, counted_detector, save_with_card, write_picture
from playwright.sync_api import expect

from dit_detection.commands import demo as command
from dit_detection.data import draw_shapes_dataset
from dit_detection.demo import page as demo_page

ROOT = Path(__file__).parents[1]
BCCD = ROOT.parent / "shared" / "data" / "bccd" / "images"


@pytest.fixture
def detector(tiny_model):
    return counted_detector(tiny_model)


@pytest.fixture
def saved(detector, tmp_path):
    return save_with_card(detector, tmp_path / "cells")


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
def test_in_a_browser(detector, browser, tmp_path):
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
        write_picture(folder / "first.png"), write_picture(folder / "second.png", size=(50, 70))
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
