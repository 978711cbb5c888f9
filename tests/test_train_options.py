"""What the options of `dit-detect train` come to, and which are refused; most of it without a step of training."""

import json
import math

import pytest
import torch
from coco_folder import write_shapes_as_coco
from tiny_training import TINY

from dit_detection import DiTDetectionConfig, DiTDetectionImageProcessor, id2label_of, load_detection_dataset
from dit_detection.anchor_fit import AnchorSetting, best_anchor_ious, boxes_of, coverage
from dit_detection.commands import convert, starting_model, train, train_options
from dit_detection.commands.train_options import EMBEDDED_JOB, parse_options, read_json_option, shown_command
from dit_detection.data import draw_shapes_dataset
from dit_detection.data.statistics import read_table
from dit_detection.small_dit import DETECTORS, SMALL_DIT, write_small_dit


@pytest.fixture(scope="module")
def coco_set(tmp_path_factory):
    return write_shapes_as_coco(tmp_path_factory.mktemp("coco"))


def test_a_dry_run_trains_nothing(coco_set, tmp_path, capsys):
    arguments = ["--dataset", str(coco_set), "--freeze_layers", "-1", "--dry_run", "--output_dir", str(tmp_path)]
    assert train.main([*TINY, *arguments]) == {}
    told = capsys.readouterr().out
    for words in ("4 to train on, 2 for validation", "4 of 4 blocks", "1 per epoch, 50 in all", "--cache_frozen"):
        assert words in told, told
    assert not (tmp_path / "model.safetensors").exists()


def test_a_new_detector_has_anchors_that_fit_the_boxes(coco_set, tmp_path, monkeypatch):
    configs = []
    monkeypatch.setattr(train, "describe_cost", lambda model, *more: configs.append(model.config) or "")
    job = [*TINY, "--dataset", str(coco_set), "--output_dir", str(tmp_path), "--dry_run"]
    own = {"anchor_sizes": DETECTORS["tiny"]["anchor_sizes"]}
    for more in ([], ["--config_overrides", json.dumps(own)]):
        train.main([*job, *more])
    fitted, given = configs
    assert given.anchor_sizes == own["anchor_sizes"]
    table = read_table("train", load_detection_dataset(str(coco_set))["train"], (48, 64))
    covered = [
        coverage(best_anchor_ious(*boxes_of(table), AnchorSetting.from_config(config))[0])["covered"]
        for config in (fitted, given)
    ]
    assert covered[0] > covered[1]


def test_classes_are_those_of_the_data(coco_set, tmp_path):
    job = [*TINY, "--dataset", str(coco_set), "--output_dir", str(tmp_path), "--dry_run"]
    with pytest.raises(ValueError, match="gives id2label, num_labels: the classes are those of --dataset"):
        train.main([*job, "--config_overrides", '{"num_labels": 3, "id2label": {"0": "cell"}}'])


@pytest.mark.parametrize(("option", "value"), [("config_overrides", "nothing.json"), ("augmentation", "[1]")])
def test_options_in_json_say_what_is_wrong(option, value):
    with pytest.raises(ValueError, match=f"--{option} "):
        train.main([*TINY, f"--{option}", value, "--dry_run"])


def test_options_in_json_may_be_files(tmp_path):
    path = tmp_path / "anchors.json"
    path.write_text('{"aspect_ratios": [1.0]}')
    assert read_json_option("config_overrides", str(path)) == {"aspect_ratios": [1.0]}


def test_config_overrides_go_before_other_options(coco_set, tmp_path, capsys):
    write_small_dit(tmp_path / "dit", "tiny", 64)
    overrides = {"strides": [8, 16], "neck_channels": 16, "head_channels": [16], "timestep": 150, "condition": None}
    option = ["--config_overrides", json.dumps(overrides | {"id2label": {"0": "a", "1": "b"}})]
    convert.main([str(tmp_path / "dit"), str(tmp_path / "detector"), *option])
    assert "folded at timestep 150" in capsys.readouterr().out
    config = json.loads((tmp_path / "detector" / "config.json").read_text())
    assert (config["timestep"], config["id2label"]) == (150, {"0": "a", "1": "b"})
    job = [*TINY, "--dataset", str(coco_set), "--dry_run", "--output_dir", str(tmp_path / "out")]
    train.main([*job, "--config_overrides", json.dumps({"timestep": 150})])


@pytest.mark.parametrize(
    "said",
    [
        ["--resume_from_checkpoint", "last"],
        ["--resume-from-checkpoint=last"],
        ["--hub_token", "hf_secret"],
        ["--hub-token=hf_secret"],
    ],
)
def test_the_command_that_is_shown_neither_resumes_nor_tells_tokens(said):
    rest = ["--dataset", "my images", "--push_to_hub", "--seed", "0"]
    for place in range(len(rest) + 1):
        if place not in (1, 4):  # between an option and its value
            shown = shown_command([*rest[:place], *said, *rest[place:]])
            assert shown == "dit-detect train --dataset 'my images' --push_to_hub --seed 0"


@pytest.fixture
def few_shapes(monkeypatch):
    """Few images for the embedded job, which otherwise draws for seconds before it looks at the model."""
    monkeypatch.setattr(train, "draw_shapes_dataset", lambda **_: draw_shapes_dataset(4, 2, 2, image_size=64))


@pytest.mark.usefixtures("few_shapes")
def test_what_a_detector_has_settled_is_refused(tiny_model, coco_set, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "describe_cost", lambda *_: "")  # which takes its time
    tiny_model().save_pretrained(tmp_path)
    DiTDetectionImageProcessor(size=64).save_pretrained(tmp_path)
    job = ["--model", str(tmp_path), "--dataset", str(coco_set), "--output_dir", str(tmp_path / "out"), "--dry_run"]
    for option in (
        *(["--timestep", "10"], ["--condition", "1"], ["--vae", "none"]),
        *(["--image_size", "96"], ["--image_size", "512"]),
        *(["--config_overrides", '{"timestep": 7}'], ["--config_overrides", '{"out_indices": [1]}']),
    ):
        with pytest.raises(ValueError, match=rf"{option[0]} .*is a detector"):
            train.main([*job, *option])
    for name, value in (("pretrained_grid", 32), ("hidden_act", '"relu"'), ("hidden_size", 64)):
        with pytest.raises(ValueError, match=f"{name} is that of the DiT"):
            train.main([*job, "--config_overrides", f'{{"{name}": {value}}}'])
    train.main([*job, "--image_size", "64", "--timestep", "50", "--vae", "auto"])  # as it is
    # Without a data set the embedded job would have another canvas; nobody asked for it.
    train.main(["--model", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--dry_run"])


def test_the_embedded_job_has_a_rate_of_its_own(tmp_path):
    for dit in ([], ["--random_dit", "small"], ["--model", str(SMALL_DIT)]):
        _, _, args = parse_options(["--output_dir", str(tmp_path), *dit])
        assert args.learning_rate == EMBEDDED_JOB["learning_rate"] == 2e-3


@pytest.mark.parametrize(
    ("options", "rate", "decay", "frozen"),
    [
        ([], 1e-3, 0.85, 3),
        (["--random_dit=small"], 1e-3, 1.0, None),
        (["--random-dit", "small"], 1e-3, 1.0, None),
        (["--model", "a-dit"], 1e-4, 0.85, None),
        (["--model", "tiny-dit"], 1e-3, 0.85, 2),  # as `dit-detect pretrain` writes it
        (["--model=tiny-dit", "--learning-rate=3e-4"], 3e-4, 0.85, 2),
        (["--model", "tiny-dit", "--freeze_layers", "0"], 1e-3, 0.85, 0),
        (["--learning_rate", "3e-4", "--freeze_layers", "0"], 3e-4, 0.85, 0),
    ],
)
def test_rates_and_frozen_blocks_are_those_of_the_dit(options, rate, decay, frozen, tmp_path, monkeypatch):
    write_small_dit(tmp_path / "tiny-dit", "tiny", 64)
    monkeypatch.chdir(tmp_path)
    model_args, _, args = parse_options(["--dataset", "x", "--output_dir", str(tmp_path), *options])
    assert (args.learning_rate, args.layer_decay, model_args.freeze_layers) == (rate, decay, frozen)


@pytest.mark.usefixtures("few_shapes")
def test_a_small_dit_gets_the_detector_of_its_size(tmp_path, monkeypatch):
    models = []
    monkeypatch.setattr(train, "describe_cost", lambda model, *_: models.append(model))
    write_small_dit(tmp_path / "dit", "tiny", 64)
    job = ["--model", str(tmp_path / "dit"), "--output_dir", str(tmp_path / "out"), "--image_size", "64", "--dry_run"]
    train.main(job)
    train.main([*job, "--config_overrides", '{"neck_channels": 32, "out_indices": [1]}'])
    train.main([*job, "--config_overrides", '{"out_indices": [0]}'])
    assert models.pop().config.num_hidden_layers == 1  # of which half of four cannot be frozen
    train.main([*job, "--config_overrides", '{"strides": [8, 16]}'])
    assert [len(sizes) for sizes in models.pop().config.anchor_sizes] == [3, 3]  # those of other strides would not fit
    configs = [model.config for model in models]
    convert.main([str(tmp_path / "dit"), str(tmp_path / "detector")])
    configs.append(DiTDetectionConfig.from_pretrained(tmp_path / "detector"))
    assert [(c.neck_channels, c.out_indices) for c in configs] == [(64, [0, 3]), (32, [1]), (64, [0, 3])]
    assert all(c.strides == [8, 16, 32] and c.num_anchors_per_cell == 1 and c.timestep == 50 for c in configs)


@pytest.mark.usefixtures("few_shapes")
def test_the_timestep_is_that_of_the_schedule(tmp_path, monkeypatch):
    models = []
    monkeypatch.setattr(train, "describe_cost", lambda model, *_: models.append(model))
    job = ["--output_dir", str(tmp_path / "out"), "--image_size", "64", "--dry_run"]
    train.main(job)
    train.main([*job, "--timestep", "50"])
    convert.main([str(SMALL_DIT), str(tmp_path / "detector")])
    configs = [*(model.config for model in models), DiTDetectionConfig.from_pretrained(tmp_path / "detector")]
    assert [config.timestep for config in configs] == [200, 50, 200]  # flow matching


def test_one_precision_alone_is_the_one_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(train_options, "computes_bf16", lambda on_cpu: True)
    for options, fp16, bf16 in (
        ([], False, True),
        (["--fp16", "True"], True, False),
        (["--fp16"], True, False),
        (["--fp16", "--disable_tqdm", "True"], True, False),
        (["--fp16", "False"], False, True),
        (["--fp16=no"], False, True),
    ):
        args = parse_options(["--dataset", "x", "--output_dir", str(tmp_path), *options])[2]
        assert (args.fp16, args.bf16) == (fp16, bf16)


@pytest.mark.slow
def test_class_weights_stay_with_their_classes(tiny_model, coco_set, tmp_path):
    """A detector that was trained with weights goes on with them; for other classes it has none."""
    weights = [1.0, 2.0, 0.5, 1.0, 1.5]
    options = [*TINY[2:5], "--bf16", "False", "--disable_tqdm", "True", "--dataset", str(coco_set), "--max_steps", "1"]
    names = id2label_of(load_detection_dataset(coco_set))
    for kind, id2label, expected in (("same", names, weights), ("other", dict(enumerate("abcde")), None)):
        label2id = {name: label for label, name in id2label.items()}
        given = tiny_model(num_labels=5, id2label=id2label, label2id=label2id, class_weights=weights)
        given.save_pretrained(tmp_path / kind)
        DiTDetectionImageProcessor(size={"max_height": 48, "max_width": 64}).save_pretrained(tmp_path / kind)
        train.main([*options, "--model", str(tmp_path / kind), "--output_dir", str(tmp_path / "out" / kind)])
        assert json.loads((tmp_path / "out" / kind / "config.json").read_text())["class_weights"] == expected


def test_the_class_layer_is_that_of_the_classes(tiny_model, coco_set, tmp_path, caplog):
    """As many other classes, or the same in another order, begin with none of what it scored before."""
    dataset = load_detection_dataset(coco_set)
    names = list(id2label_of(dataset).values())
    for kind, classes in (
        ("same", names),
        ("order", names[::-1]),
        ("others", list("abcde")),
        ("more", list("abcdef")),
    ):
        label2id = {name: label for label, name in enumerate(classes)}
        given = tiny_model(num_labels=len(classes), id2label=dict(enumerate(classes)), label2id=label2id)
        given.save_pretrained(tmp_path / kind)
        DiTDetectionImageProcessor(size=64).save_pretrained(tmp_path / kind)
        model_args, _, _ = parse_options(["--model", str(tmp_path / kind)])
        caplog.clear()
        model, _ = starting_model._load_detector(str(tmp_path / kind), None, model_args, dataset, {})
        assert list(model.config.id2label.values()) == names
        assert torch.equal(model.head.box_predictor.weight, given.head.box_predictor.weight)
        layer = model.head.class_predictor
        if kind == "same":
            assert torch.equal(layer.weight, given.head.class_predictor.weight) and not caplog.text
        else:
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.2)
            assert (layer.bias + math.log(99)).abs().max() < 1e-6  # every class at its prior, 0.01
            assert "starts afresh: its classes are" in caplog.text


def test_what_the_card_calls_the_data(tmp_path, monkeypatch):
    (tmp_path / "cells" / "org" / "set").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cells")
    for dataset, expected in {
        None: {"dataset_name": "drawn shapes"},
        ".": {"dataset_name": "cells", "dataset_id": None},
        "org/set": {"dataset_name": "set", "dataset_id": None},  # a folder that is there
        "org/other": {"dataset_name": "other", "dataset_id": "org/other"},
    }.items():
        assert train._names_of(dataset) == expected


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--datas", "x"], "--datas"),  # would be read as --dataset, with the embedded job's settings
        (["--image_size", "64", "64", "64"], "a side, or height and width"),
        (["--image_size", "0"], "a side, or height and width"),
        (["--model", "x", "--random_dit", "tiny"], "--random_dit tiny stands in the place of --model x"),
        (
            ["--dataset", "x", "--streaming", "--max_steps", "1", "--test_fraction", "0.1"],
            "--test_fraction needs to see all",
        ),
        (["--class_names", "a", "b"], "--class_names is for --dataset"),
        (["--validation-fraction=0.9"], "--validation_fraction is for --dataset"),
        (["--num_views", "0"], "--num_views 0 must be 1 or more"),
        (["--num_views", "4", "--augmentation", "none"], "--num_views 4: with --augmentation none"),
        (["--random_dit", "tiny", "--dry_run", "--cache_frozen"], "nothing of this model is frozen"),
        (["--random_dit", "tiny", "--freeze_layers", "99"], "--freeze_layers 99 must lie between 0 and 4"),
        (["--random_dit", "tiny", "--freeze_layers", "-5"], "--freeze_layers -5 must lie between 0 and 4"),
        (
            [*("--random_dit", "tiny", "--class_weights", "balanced"), "--config_overrides", '{"class_weights": [1]}'],
            "both give class_weights",
        ),
    ],
)
@pytest.mark.usefixtures("few_shapes")
def test_options_that_cannot_be_meant(option, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        train.main(option)
    assert message in f"{capsys.readouterr().err} {error.value}"
