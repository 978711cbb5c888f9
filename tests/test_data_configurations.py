"""Data sets with several configurations, as copies of those on the Hub: one is named, or the message says which."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from datasets import Dataset

from dit_detection import InvalidDatasetError, load_detection_dataset
from dit_detection.commands import check
from dit_detection.commands.train_options import parse_options
from dit_detection.data import draw_shapes_dataset

CARD = """---
configs:
- config_name: full
  data_files:
  - split: train
    path: full/train.parquet
- config_name: mini
  data_files:
  - split: train
    path: mini/train.parquet
---
"""


@pytest.fixture
def two_sets(tmp_path: Path) -> Path:
    """A data set of the configurations "full", 6 images, and "mini", 4."""
    rows = draw_shapes_dataset(6, 0, 0, image_size=32)["train"]
    folder = tmp_path / "two"
    for name, count in (("full", 6), ("mini", 4)):
        (folder / name).mkdir(parents=True)
        rows.select(range(count)).to_parquet(folder / name / "train.parquet")
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_the_one_that_is_named_is_read(two_sets, streaming):
    for name, count in (("full", 6), ("mini", 4)):
        dataset = load_detection_dataset(two_sets, name=name, streaming=streaming)
        assert len(list(dataset["train"])) == count


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "has several configurations: full, mini. Name one with --dataset_config_name"),
        ("tiny", "has no configuration 'tiny', but full, mini. Name one with --dataset_config_name"),
    ],
)
def test_the_message_says_which_there_are(two_sets, name, message, streaming):
    with pytest.raises(InvalidDatasetError, match=message):
        load_detection_dataset(two_sets, name=name, streaming=streaming)


def test_what_is_damaged_is_not_taken_for_a_wrong_name(two_sets):
    (two_sets / "mini" / "train.parquet").write_bytes(b"nothing")
    with pytest.raises(InvalidDatasetError, match=r"cannot be loaded: Parquet file size.* Write it again"):
        load_detection_dataset(two_sets, name="mini")


def test_what_was_changed_is_read_anew(two_sets):
    """`datasets` takes folders of one name with the same README for the same, whatever lies in them."""
    assert len(load_detection_dataset(two_sets, name="mini")["train"]) == 4
    (two_sets / "mini" / "train.parquet").write_bytes((two_sets / "full" / "train.parquet").read_bytes())
    assert len(load_detection_dataset(two_sets, name="mini")["train"]) == 6


def test_folders_of_one_name_are_not_mistaken_for_each_other(two_sets):
    other = two_sets.parent / "elsewhere" / two_sets.name
    shutil.copytree(two_sets, other)
    (other / "mini" / "train.parquet").write_bytes((two_sets / "full" / "train.parquet").read_bytes())
    counts = [len(load_detection_dataset(folder, name="mini")["train"]) for folder in (two_sets, other, two_sets)]
    assert counts == [4, 6, 4]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["loaded", "saved", "coco"])
def test_a_name_that_would_change_nothing_is_refused(kind, streaming, tmp_path):
    source: Path | Dataset = tmp_path
    rows = draw_shapes_dataset(2, 0, 0, image_size=32)["train"]
    if kind == "loaded":
        source = rows
    elif kind == "saved":
        rows.save_to_disk(tmp_path)
    else:
        (tmp_path / "train.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    for given in ({"name": "mini"}, {"revision": "main"}):
        with pytest.raises(ValueError, match=r"Leave .* out"):
            load_detection_dataset(source, **given, streaming=streaming)


def test_check_and_train_take_it(two_sets, tmp_path, capsys):
    """What `check` suggests is a command that `train` understands, and reads the same images."""
    arguments = [str(two_sets), "--dataset_config_name", "mini", "--fast", "--image_size", "32"]
    report = check.main([*arguments, "--fit_anchors", str(tmp_path / "anchors.json")])
    assert sum(split["images"] for split in report["splits"].values()) == 4
    command = shlex.split(report["fitted_anchors"]["command"])
    assert parse_options(command[2:])[1].dataset_config_name == "mini"
    with pytest.raises(SystemExit):
        check.main([str(two_sets)])
    assert "full, mini" in capsys.readouterr().out
