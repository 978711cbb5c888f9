import json
import shutil

import pytest
import tiny_training
import torch
from transformers import AutoImageProcessor, pipeline

from dit_detection import (
    DiTDetectionImageProcessor,
    DiTForObjectDetection,
    add_lora,
    id2label_of,
    load_detector,
)
from dit_detection.adapters import detector_of, is_adapter
from dit_detection.anchor_fit import AnchorSetting
from dit_detection.commands import convert, evaluate, starting_model, train
from dit_detection.commands.train_options import parse_options
from dit_detection.data import draw_shapes_dataset
from dit_detection.training.frozen_dataset import FrozenDataset

# Whole trainings: together they take longer than all the fast tests may.
pytestmark = pytest.mark.slow

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def dataset():
    return draw_shapes_dataset(8, 3, 0, image_size=(48, 64))


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1


def make_trainer(base, dataset, output_dir, freeze=0, **arguments):
    detector = DiTForObjectDetection.from_pretrained(base)
    if freeze:
        detector.freeze_backbone(freeze)
    torch.manual_seed(0)
    defaults = {"num_train_epochs": 3, "learning_rate": 1e-2}
    return tiny_training.make_trainer(add_lora(detector, 2), dataset, output_dir, **(defaults | arguments))


@pytest.fixture
def base(tiny_model, dataset, tmp_path):
    names = id2label_of(dataset)
    model = tiny_model(num_labels=5, id2label=names, label2id={name: label for label, name in names.items()})
    model.save_pretrained(tmp_path / "base")
    DiTDetectionImageProcessor(size=64).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def shapes_of(dataset):
    return list(id2label_of(dataset).values())


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_trains_resumes_and_loads_the_best(base, dataset, tmp_path):
    whole = make_trainer(base, dataset, tmp_path / "whole", load_best_model_at_end=False, save_total_limit=None)
    before = weights_of(whole.model)
    whole.train()
    after = weights_of(whole.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name, parameter in whole.model.named_parameters() if parameter.requires_grad}

    resumed = make_trainer(base, dataset, tmp_path / "resumed", load_best_model_at_end=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in weights_of(resumed.model).items():
        assert torch.equal(value, after[name]), name

    best = make_trainer(base, dataset, tmp_path / "best", metric_for_best_model="loss", greater_is_better=False)
    best.train()
    loss = min(entry["eval_loss"] for entry in best.state.log_history if "eval_loss" in entry)
    assert best.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-5)
    best.save_model()
    saved = {path.name for path in (tmp_path / "best").iterdir() if path.is_file()}
    assert saved >= {"adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json", "README.md"}
    assert "config.json" not in saved and "model.safetensors" not in saved
    assert json.loads((tmp_path / "best" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)

    # From the folder alone: what every command loads, and plain transformers.
    merged = load_detector(tmp_path / "best")
    best.model = best.model_wrapped = merged
    assert best.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-4)
    assert AutoImageProcessor.from_pretrained(tmp_path / "best").size == best.processing_class.size
    found = pipeline("object-detection", model=str(tmp_path / "best"))(
        dataset["validation"][0]["image"], threshold=0.0
    )
    assert found and {one["label"] for one in found} <= set(merged.config.id2label.values())


def test_frozen_blocks_are_cached(base, dataset, tmp_path):
    losses = []
    for cached in (False, True):
        trainer = make_trainer(
            base,
            dataset,
            tmp_path / f"cached_{cached}",
            freeze=1,
            cache_frozen=cached,
            frozen_cache_dir=str(tmp_path / "cache"),
            logging_strategy="steps",
            logging_steps=1,
        )
        trained_on = tiny_training.TrainedOn()
        trainer.add_callback(trained_on)
        trainer.train()
        assert isinstance(trained_on.datasets[0], FrozenDataset) == cached
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and len(losses[0]) == 6


def test_the_detector_inside(tiny_model):
    model = tiny_model()
    assert detector_of(model) is model
    assert detector_of(add_lora(model, 1)) is model


def test_the_commands(pixels, tmp_path, monkeypatch):
    job = ["--output_dir", str(tmp_path / "out"), "--image_size", "64", "--num_train_epochs", "1", "--lora_r", "2"]
    shapes = draw_shapes_dataset(4, 2, 2, image_size=(48, 64))
    shapes.save_to_disk(str(tmp_path / "shapes"))
    job += [
        "--dataset",
        str(tmp_path / "shapes"),
        "--freeze_layers",
        "2",
        "--disable_tqdm",
        "True",
    ]
    metrics = train.main([*job, "--random_dit", "tiny"])
    out = tmp_path / "out"
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(out / "base")
    assert not (out / "config.json").exists()
    # A resumed run keeps its base, whatever anchors a new one would get.
    other = AnchorSetting((8, 16, 32), ((9.0,), (21.0,), (47.0,)), (1.0,))
    monkeypatch.setattr(starting_model, "fit_to_splits", lambda *args: (other, True))
    made = (out / "base" / "config.json").read_bytes()
    resumed = ["--num_train_epochs", "2", "--resume_from_checkpoint", "last"]
    metrics = train.main([*job, "--random_dit", "tiny", *resumed])
    with pytest.raises(ValueError, match=r"base is of another detector: classes circle, .* begin anew"):
        train.main([*job, "--random_dit", "tiny", *resumed, "--class_names", *reversed(shapes_of(shapes))])
    assert (out / "base" / "config.json").read_bytes() == made
    convert.main([str(out), str(tmp_path / "merged")])
    with torch.no_grad():
        expected = load_detector(out)(pixels).logits
        assert torch.equal(DiTForObjectDetection.from_pretrained(tmp_path / "merged")(pixels).logits, expected)
    found = evaluate.main([str(out), "--dataset", str(tmp_path / "shapes"), "--batch_size", "2"])
    assert found["test_map"] == pytest.approx(metrics["test_map"], abs=1e-3)

    with pytest.raises(SystemExit):
        convert.main([str(out), str(tmp_path / "other"), "--timestep", "10"])
    for target in (out, out / "base"):
        with pytest.raises(SystemExit):
            convert.main([str(out), str(target)])
    with pytest.raises(ValueError, match="merge it first: dit-detect convert"):
        train.main([*job, "--model", str(out)])
    # On a detector that fits as it is, that is the base.
    job[1] = str(tmp_path / "again")
    train.main([*job, "--model", str(tmp_path / "merged")])
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "merged")
    assert not (tmp_path / "again" / "base").exists()

    # In a folder of earlier runs: what is loaded is what was trained last.
    job[1] = str(out)
    job += ["--bf16", "False"]
    for options in (["--model", str(tmp_path / "merged")], ["--random_dit", "tiny"]):
        # Of the same base when resumed, and not of the one that an earlier run has left.
        for resumed in ([], ["--num_train_epochs", "2", "--resume_from_checkpoint", "last"]):
            for path in out.glob("checkpoint-*") if not resumed else ():
                shutil.rmtree(path)
            metrics = train.main([*job, *options, *resumed])
            found = evaluate.main([str(out), "--dataset", str(tmp_path / "shapes"), "--batch_size", "2"])
            assert found["test_loss"] == pytest.approx(metrics["test_loss"], abs=1e-4)
    lora = job.index("--lora_r")
    metrics = train.main([*job[:lora], *job[lora + 2 :], "--model", str(tmp_path / "merged")])
    assert not is_adapter(out)
    found = evaluate.main([str(out), "--dataset", str(tmp_path / "shapes"), "--batch_size", "2"])
    assert found["test_loss"] == pytest.approx(metrics["test_loss"], abs=1e-4)
    train.main([*job, "--model", str(tmp_path / "merged")])
    assert is_adapter(out) and not (out / "model.safetensors").exists() and not (out / "config.json").exists()


def test_an_adapter_in_the_folder_of_its_base(dataset, tmp_path):
    """The run writes over what is there, the detector and its checkpoints: the adapter has a copy."""

    dataset.save_to_disk(str(tmp_path / "shapes"))
    job = ["--dataset", str(tmp_path / "shapes"), "--bf16", "False", "--disable_tqdm", "True", "--num_train_epochs"]
    for base in ("", "checkpoint-1"):
        out = tmp_path / f"run{base}"
        train.main([*job, "1", "--output_dir", str(out), "--random_dit", "tiny", "--image_size", "48", "64"])
        again = ["--output_dir", str(out), "--model", str(out / base), "--lora_r", "2"]
        for more in (["1"], ["2", "--resume_from_checkpoint", "last"]):
            metrics = train.main([*job, *more, *again])
            assert is_adapter(out) and not is_adapter(out / "base")
            assert load_detector(out).config.id2label == id2label_of(dataset)
        found = evaluate.main([str(out), "--dataset", str(tmp_path / "shapes"), "--split", "validation"])
        assert found["validation_loss"] == pytest.approx(metrics["validation_loss"], abs=1e-4)


def test_a_dry_run_does_not_count_lora():

    with pytest.raises(SystemExit):
        parse_options(["--dry_run", "--lora_r", "8"])
