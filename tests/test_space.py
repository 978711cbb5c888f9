import ast
import importlib.metadata
import json
import os
import runpy
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from demo_detectors import counted_detector, save_with_card

from dit_detection.commands import demo as command
from dit_detection.demo import page as demo_page
from dit_detection.demo.space import write_space
from dit_detection.sharing.push import push_folder

ROOT = Path(__file__).parents[1]


@pytest.fixture
def detector(tiny_model):
    return counted_detector(tiny_model)


@pytest.fixture
def saved(detector, tmp_path):
    return save_with_card(detector, tmp_path / "cells")


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
