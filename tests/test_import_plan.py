import ast
from pathlib import Path

import pytest

import dit_detection

PACKAGE = Path(dit_detection.__file__).parent
ROOT = PACKAGE.parent

# Room → the rooms it may import from; downwards only. A room is a file or a folder.
ROOMS = {
    "__init__": {"adapters", "data", "metrics", "model", "training", "visualize"},
    "cli": {"commands", "data", "training"},
    "commands": {
        "adapters",
        "anchor_fit",
        "card",
        "commands",
        "data",
        "demo",
        "export",
        "inference",
        "model",
        "pretraining",
        "sharing",
        "small_dit",
        "training",
        "visualize",
    },
    "training": {"adapters", "card", "data", "metrics", "model", "sharing", "training", "weight_digest"},
    "pretraining": {"card", "data", "model", "pretraining", "small_dit", "training", "visualize", "weight_digest"},
    "demo": {"adapters", "data", "demo", "inference", "sharing", "visualize"},
    "sharing": {"adapters", "card", "sharing"},
    "inference": {"adapters", "data", "inference", "visualize", "weight_digest"},
    "card": {"card", "data", "metrics", "model", "visualize"},
    "adapters": {"model"},
    "anchor_fit": {"data", "model"},
    "export": {"model"},
    "data": {"data"},
    "metrics": set(),
    "visualize": {"data"},
    "small_dit": {"model"},
    "weight_digest": set(),
    "model": {"model"},
}
# The same for the files of `model/`, the folder that travels to the Hub.
MODEL_FILES = {
    "__init__": set(),
    "boxes": set(),
    "anchors": set(),
    "configuration_dit_detection": set(),
    "latent_encoder": set(),
    "load_dit": set(),
    "box_coder": {"boxes"},
    "matcher": {"boxes"},
    "labels": {"boxes"},
    "losses": {"matcher", "box_coder", "boxes", "configuration_dit_detection"},
    "backbone": {"configuration_dit_detection"},
    "convert_dit": {"configuration_dit_detection"},
    "load_original": {"backbone", "load_dit"},
    "neck": {"configuration_dit_detection"},
    "head": {"configuration_dit_detection", "neck"},
    "image_processing_dit_detection": {"boxes"},
}
MODEL_FILES["modeling_dit_detection"] = set(MODEL_FILES) - {"__init__", "image_processing_dit_detection"}


def own_imports(path):
    """Dotted names below `dit_detection` that a file imports, wherever in the file and in whatever form."""
    package = ["dit_detection", *path.relative_to(PACKAGE).parts[:-1]] if path.is_relative_to(PACKAGE) else []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            # `from . import x` and `from dit_detection.data import y` name a file only in the second half.
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] == "dit_detection")


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


PACKAGE_FILES = sorted(PACKAGE.rglob("*.py"))


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=relative)
def test_no_arrow_points_up(path):
    room = room_of(path)
    assert room in ROOMS, f"{relative(path)} is in no room of the plan"
    for name in own_imports(path):
        target = [*name.split("."), "__init__"][1]
        assert target in ROOMS[room], f"{relative(path)} imports {name}; {room} may use {sorted(ROOMS[room])}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("*.py")), ids=relative)
def test_the_hub_folder_imports_its_neighbours_by_from_x_import_y_alone(path):
    # transformers copies what it finds so to the Hub; anything else fails there or is left behind.
    assert path.stem in MODEL_FILES, f"{path.name} is not in the plan"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.partition(".")[0] == "dit_detection" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{path.name} line {node.lineno} reaches out of its folder"
            assert (node.module or "").partition(".")[0] != "dit_detection"
            if node.level == 1:
                assert node.module and "." not in node.module, f"{path.name} line {node.lineno}"
                assert node.module in MODEL_FILES[path.stem], f"{path.name} may not import {node.module}"


def test_modeling_names_every_file_that_it_needs_directly():
    # transformers 5.0 does not follow imports of imports.
    imported = {name.split(".")[2] for name in own_imports(PACKAGE / "model" / "modeling_dit_detection.py")}
    for name in imported:
        assert MODEL_FILES[name] <= imported


def test_the_plan_has_no_circles():
    for plan in ({room: allowed - {room} for room, allowed in ROOMS.items()}, MODEL_FILES):
        left = dict(plan)
        while left:
            free = [name for name, below in left.items() if not below & set(left)]
            assert free, f"a circle among {sorted(left)}"
            for name in free:
                del left[name]


def test_no_files_import_each_other_in_a_circle():
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE_FILES}
    left = {}
    for name, path in files.items():  # `from .x import y` may name the file x or the file x.y
        named = [name_or_file for target in own_imports(path) for name_or_file in (target, target.rpartition(".")[0])]
        left[name] = set(named) & set(files)
    while left:
        free = [name for name, below in left.items() if not below & set(left)]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_every_room_of_the_plan_stands():
    assert {room_of(path) for path in PACKAGE_FILES} >= set(ROOMS)
    assert {path.stem for path in (PACKAGE / "model").glob("*.py")} == set(MODEL_FILES)


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=relative)
def test_scripts_run_what_the_console_command_runs(path):
    assert set(own_imports(path)) <= {"dit_detection.cli.run"}


def test_every_file_of_the_hub_folder_is_saved(tiny_model, tmp_path):
    from dit_detection import DiTDetectionImageProcessor

    tiny_model().save_pretrained(tmp_path)
    DiTDetectionImageProcessor().save_pretrained(tmp_path)
    assert {path.stem for path in tmp_path.glob("*.py")} == set(MODEL_FILES) - {"__init__"}
