"""A detector pulled from a Hub gives the same boxes with this package and without it, bit for bit."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base
from PIL.Image import Transpose
from pull_from_hub import THRESHOLD, pull
from tiny_training import LATENTS
from transformers import AutoImageProcessor, pipeline

import dit_detection
from dit_detection import DiTDetectionImageProcessor
from dit_detection.card.model_card import DetectionModelCardData, create_model_card
from dit_detection.sharing.push import push_folder

REPO = "someone/cells"
ROOT = Path(__file__).parent.parent
CODE = Path(dit_detection.__file__).parent / "model"


@pytest.fixture
def image(hub, tiny_model, tmp_path):
    """An image, and a detector for it on the Hub: revision "read" is fine, later someone changed the code."""
    names = dict(enumerate(["red", "white", "platelet"]))
    label2id = {name: index for index, name in names.items()}
    model = tiny_model(prior_probability=0.2, id2label=names, label2id=label2id, **LATENTS)
    model.save_pretrained(tmp_path / "detector")
    DiTDetectionImageProcessor(size=64, nms_threshold=0.4).save_pretrained(tmp_path / "detector")
    push_folder(tmp_path / "detector", REPO, git_tag="read")
    with (tmp_path / "detector" / "boxes.py").open("a") as code:
        code.write('raise RuntimeError("code that nobody has read")\n')
    push_folder(tmp_path / "detector", REPO)
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def pull_elsewhere(hub, image, tmp_path):
    """Pulls in an environment that has every installed package but this one; gives the folder of what was found."""

    def run(*folders_before):
        # This package is installed by a `.pth` file, and those of the folders in PYTHONPATH are not read.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        environment |= {
            "PYTHONPATH": os.pathsep.join([*map(str, folders_before), sysconfig.get_path("purelib")]),
            "HF_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        }
        script = Path(__file__).with_name("pull_from_hub.py")
        done = subprocess.run(
            [tmp_path / "venv" / "bin" / "python", script, REPO, "read", image, tmp_path / "elsewhere"],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        facts = json.loads((tmp_path / "elsewhere" / "facts.json").read_text())
        assert not facts["package"]
        assert facts["latest"] == "code that nobody has read"  # which the pinned revision kept out
        assert facts["module"].startswith("transformers_modules.")
        return tmp_path / "elsewhere", facts

    return run


def assert_same_files(folder, expected):
    for name in ("tensors.safetensors", "auto.json", "pipeline.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.slow
def test_the_same_boxes_with_and_without_the_package(hub, image, pull_elsewhere, tmp_path):
    model, processor = pull(REPO, image, tmp_path / "here", revision="read")
    assert type(model).__module__.startswith("dit_detection.")
    assert type(processor) is DiTDetectionImageProcessor
    detections = json.loads((tmp_path / "here" / "auto.json").read_text())
    assert len(detections) > 3
    assert json.loads((tmp_path / "here" / "pipeline.json").read_text()) == detections

    elsewhere, _ = pull_elsewhere()
    assert_same_files(elsewhere / "pulled", tmp_path / "here")
    assert_same_files(elsewhere / "again", tmp_path / "here")

    code = {path.name: path.read_bytes() for path in CODE.glob("*.py") if path.name != "__init__.py"}
    saved = {path.name: path.read_bytes() for path in (elsewhere / "saved_again").glob("*.py")}
    assert saved == code
    assert {name: content for name, content in hub.files(REPO, "read").items() if name.endswith(".py")} == code
    auto_map = json.loads((elsewhere / "saved_again" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForObjectDetection"].endswith("modeling_dit_detection.DiTForObjectDetection")
    assert AutoImageProcessor.from_pretrained(elsewhere / "saved_again").nms_threshold == 0.4


def test_the_code_of_a_card_runs_as_it_stands_and_turns_photographs_upright(image, tmp_path, monkeypatch, capsys):
    photograph = Image.open(image)
    exif = photograph.getexif()
    exif[Base.Orientation] = 6
    photograph.transpose(Transpose.ROTATE_90).save(tmp_path / "image.jpg", exif=exif)
    config = {"id2label": {"0": "red", "1": "white", "2": "platelet"}}
    card = create_model_card(
        DetectionModelCardData(model_name="cells", config=config, repo_id=REPO, threshold=THRESHOLD)
    )
    blocks = [block.split("```")[0] for block in card.text.split("```python\n")[1:]]
    monkeypatch.chdir(tmp_path)
    printed = []
    for number, block in enumerate(blocks):
        Path(f"block_{number}.py").write_text(block.replace('"main"', '"read"'))
        runpy.run_path(f"block_{number}.py")
        printed.append(capsys.readouterr().out)

    detections = ast.literal_eval(printed[0])
    assert len(detections) > 3 and max(found["box"]["xmax"] for found in detections) > photograph.height
    by_hand = [re.fullmatch(r"(\w+) [\d.]+: (\[.*\])", line).groups() for line in printed[1].splitlines()]
    assert [(label, list(map(int, json.loads(box)))) for label, box in by_hand] == [
        (found["label"], list(found["box"].values())) for found in detections
    ]
    assert Image.open("detections.png").size == photograph.size


def test_pipeline_asks_nothing_where_the_package_is_installed(image, monkeypatch):
    questions = []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "n")
    detector = pipeline("object-detection", REPO)
    assert type(detector.model).__module__.startswith("dit_detection.")
    assert not questions


@pytest.mark.slow
def test_the_same_boxes_with_the_oldest_transformers_that_is_allowed(image, pull_elsewhere, tmp_path):
    oldest = re.search(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    # With what that version asks for itself, huggingface_hub above all; torch and the rest are this environment's.
    install = [os.environ.get("UV", "uv"), "pip", "install", "--quiet", "--python", sys.executable]
    packages = [f"transformers=={oldest}", f"numpy=={np.__version__}"]
    subprocess.run([*install, "--target", tmp_path / "oldest", *packages], check=True)
    pull(REPO, image, tmp_path / "here", revision="read")
    elsewhere, facts = pull_elsewhere(tmp_path / "oldest")
    assert facts["transformers"] == oldest
    assert_same_files(elsewhere / "pulled", tmp_path / "here")
    assert_same_files(elsewhere / "again", tmp_path / "here")
