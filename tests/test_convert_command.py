import json

import pytest
from coco_folder import write_shapes_as_coco
from tiny_training import TINY

from dit_detection import InvalidDatasetError, cli
from dit_detection.commands import convert, train
from dit_detection.small_dit import write_small_dit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image_size", "0"], "--image_size 0 must be 1 pixel or more"),
        (["--config_overrides", '{"dtype": "float16"}'], "--config_overrides gives dtype"),
        (["--config_overrides", '{"vae": "none"}'], "--config_overrides gives vae"),
        (["--config_overrides", '{"id2label": ["a", "b"]}'], "id2label must be a dict"),
        (["--config_overrides", '{"out_indices": "1"}'], "out_indices='1' must name"),
        (["--config_overrides", '{"neck_channels": "16"}'], "neck_channels"),
    ],
)
def test_convert_refuses_what_cannot_be_meant(tmp_path, capsys, options, message):
    write_small_dit(tmp_path / "dit", "tiny", 64)
    with pytest.raises(SystemExit) as error:
        cli.run("convert", [str(tmp_path / "dit"), str(tmp_path / "detector"), *options])
    assert message in f"{error.value} {capsys.readouterr().err}"
    assert not (tmp_path / "detector").exists()


def test_convert_writes_into_no_folder_of_another_detector(tmp_path, capsys):
    write_small_dit(tmp_path / "dit", "tiny", 64)
    (tmp_path / "file").write_text("")
    for name in ("adapter_config.json", "model_card.json"):
        (tmp_path / name[:5]).mkdir()
        (tmp_path / name[:5] / name).write_text("{}")
    for target, message in (
        ("file", "is a file"),
        ("adapt", "has adapter_config.json of another detector"),
        ("model", "has model_card.json of another detector"),
        ("dit", "would be written over"),
    ):
        with pytest.raises(SystemExit):
            convert.main([str(tmp_path / "dit"), str(tmp_path / target)])
        assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "adapt").iterdir()] == ["adapter_config.json"]


def test_convert_refuses_classes_of_one_name(tmp_path):
    write_small_dit(tmp_path / "dit", "tiny", 64)
    with pytest.raises(InvalidDatasetError, match="--labels: class 'a' is there twice"):
        convert.main([str(tmp_path / "dit"), str(tmp_path / "detector"), "--labels", "a", "b", "a"])
    assert not (tmp_path / "detector").exists()


def test_convert_and_train_on(tmp_path, capsys):
    (tmp_path / "shapes").mkdir()
    write_shapes_as_coco(tmp_path / "shapes")
    write_small_dit(tmp_path / "dit", "tiny", 64)
    overrides = json.dumps({"strides": [8, 16], "neck_channels": 16, "head_channels": [16]})
    arguments = [str(tmp_path / "dit"), str(tmp_path / "detector"), "--labels", "a", "b", "--image_size", "64"]
    convert.main([*arguments, "--config_overrides", overrides])
    printed = capsys.readouterr().out
    assert "backbone" in printed and "dit-detect train --model" in printed
    # From a detector of two classes to one of five: only the class layer starts afresh.
    metrics = train.main(
        [
            *TINY[5:],  # on the canvas that the detector has
            "--model",
            str(tmp_path / "detector"),
            "--dataset",
            str(tmp_path / "shapes"),
            "--max_steps",
            "1",
            "--freeze_layers",
            "-1",
            "--eval_strategy",
            "no",
            "--save_strategy",
            "no",
            "--load_best_model_at_end",
            "False",
            "--output_dir",
            str(tmp_path / "out"),
            "--augmentation",
            "none",
        ]
    )
    assert "test_map_circle" in metrics


def test_convert_does_not_write_over_what_it_reads(tmp_path, capsys):
    write_small_dit(tmp_path, "tiny", 64)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit):
        convert.main([str(tmp_path), str(tmp_path)])
    assert "Name another folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
