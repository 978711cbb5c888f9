import json
import shutil

import pytest
import tiny_training
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

from dit_detection import (
    DetectionTrainingArguments,
    DiTDetectionImageProcessor,
    DiTForObjectDetection,
    add_lora,
    id2label_of,
    load_detector,
)
from dit_detection.adapters import detector_of, is_adapter
from dit_detection.anchor_fit import AnchorSetting
from dit_detection.commands import convert
from dit_detection.data import draw_shapes_dataset
from dit_detection.training.frozen_dataset import FrozenDataset
from dit_detection.training.trainer import parameter_groups

# Whole trainings: together they take longer than all the fast tests may.
pytestmark = pytest.mark.slow

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def dataset():
    return draw_shapes_dataset(8, 3, 0, image_size=(48, 64))


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture
def adapted(tiny_model, tmp_path):
    """Makes a base on disk and an adapter on it whose every weight differs from the initial one."""

    def make(freeze=0, r=4, **config):
        base = tiny_model(**config)
        base.save_pretrained(tmp_path / "detector")
        base = DiTForObjectDetection.from_pretrained(tmp_path / "detector")
        if freeze:
            base.freeze_backbone(freeze)
        model = add_lora(base, r)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model.eval()

    return make


def trainable(model):
    return {
        name.removeprefix("base_model.model.").replace(".default", "")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def test_which_weights_train(tiny_model):
    model = tiny_model(num_hidden_layers=3, out_indices=[0, 2])
    own = {name for name, _ in model.named_parameters()}
    names = trainable(add_lora(model, 2))
    linears = ["attention.qkv", "attention.projection", "mlp.fc1", "mlp.fc2"]
    lora = {
        f"model.backbone.layers.{index}.{linear}.lora_{half}.weight"
        for index in range(3)
        for linear in linears
        for half in "AB"
    }
    full = {name.replace(".modules_to_save", "") for name in names - lora}
    assert names >= lora
    # Everything outside the blocks but the patch embedding: neck, head and the norms of the two taps.
    assert full == {name for name in own if "backbone.layers." not in name and "patch_embedding" not in name}


def test_frozen_blocks_get_no_lora(tiny_model):
    model = tiny_model(num_hidden_layers=3, out_indices=[0, 2])
    model.freeze_backbone(2)
    names = trainable(add_lora(model, 2))
    assert {name.split(".")[3] for name in names if ".layers." in name} == {"2"}
    assert model.model.backbone.num_frozen_layers() == 2


def test_layer_ten_is_not_layer_one(tiny_model):
    model = tiny_model(num_hidden_layers=12, out_indices=[11])
    model.freeze_backbone(10)
    names = trainable(add_lora(model, 1))
    assert {name.split(".")[3] for name in names if ".layers." in name} == {"10", "11"}


def test_an_autoencoder_is_left_alone(tiny_model):
    # Its attention has linear layers, too.
    encoder = dict(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).config)
    model = tiny_model(in_channels=4, patch_size=16, latent_encoder={**encoder, "_class_name": "AutoencoderKL"})
    assert any(isinstance(module, nn.Linear) for module in model.model.latent_encoder.modules())
    assert not any("latent_encoder" in name for name in trainable(add_lora(model, 1)))


@pytest.mark.parametrize(
    ("r", "freeze", "words"), [(0, 0, "r=0 must be at least 1"), (2, 2, "all 2 are. Freeze fewer")]
)
def test_what_cannot_be_adapted_is_refused(tiny_model, r, freeze, words):
    model = tiny_model()
    if freeze:
        model.freeze_backbone(freeze)
    with pytest.raises(ValueError, match=words):
        add_lora(model, r)


def test_fresh_lora_changes_nothing(tiny_model, pixels):
    expected = tiny_model()(pixels)
    outputs = add_lora(tiny_model(), 4).eval()(pixels)
    assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.pred_boxes, expected.pred_boxes)


def test_learning_rates_by_depth(tiny_model):
    model = add_lora(tiny_model(), 2)  # 2 blocks
    arguments = DetectionTrainingArguments(
        output_dir="unused", use_cpu=True, learning_rate=1e-3, backbone_learning_rate=1e-4, layer_decay=0.5
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[one]: group["lr"] for group in parameter_groups(model, arguments) for one in group["params"]}
    assert rates["base_model.model.model.backbone.layers.1.mlp.fc1.lora_A.default.weight"] == 1e-4
    assert rates["base_model.model.model.backbone.layers.0.attention.qkv.lora_B.default.weight"] == 5e-5
    assert rates["base_model.model.head.modules_to_save.default.class_predictor.weight"] == 1e-3
    assert len(rates) == sum(parameter.requires_grad for parameter in model.parameters())


def test_merged_equals_adapter(adapted, pixels, tmp_path):
    model = adapted()
    with torch.no_grad():
        expected = model(pixels)
        base = DiTForObjectDetection.from_pretrained(tmp_path / "detector")(pixels)
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not torch.allclose(expected.logits, base.logits, atol=1e-2)

    merged = load_detector(tmp_path / "adapter")
    assert type(merged) is DiTForObjectDetection and not merged.training
    merged.save_pretrained(tmp_path / "merged")
    for model in (merged, DiTForObjectDetection.from_pretrained(tmp_path / "merged")):
        with torch.no_grad():
            outputs = model(pixels)
        torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes, atol=1e-5, rtol=0)


def test_plain_transformers_loads_the_adapter(adapted, pixels, tmp_path):
    model = adapted(freeze=1)
    with torch.no_grad():
        expected = model(pixels)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        outputs = loaded(pixels)
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes, atol=1e-6, rtol=0)


def test_an_adapter_in_a_subfolder(adapted, pixels, tmp_path):
    model = adapted()
    with torch.no_grad():
        expected = model(pixels).logits
    model.save_pretrained(tmp_path / "runs" / "second")
    with torch.no_grad():
        logits = load_detector(tmp_path / "runs", subfolder="second", local_files_only=True)(pixels).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_the_hub_is_asked_for_adapters_as_for_detectors(monkeypatch):
    asked = []

    def find(source, **kwargs):
        asked.append((source, kwargs))
        raise OSError("not there")

    monkeypatch.setattr("dit_detection.adapters.find_adapter_config_file", find)
    places = {"token": "hf_x", "cache_dir": "there", "subfolder": "second"}
    assert not is_adapter("someone/private", "v1", **places, dtype="float32")
    assert asked == [("someone/private", {"revision": "v1", **places})]


@pytest.mark.parametrize("is_own", [True, False])
def test_a_base_beside_the_adapter_goes_first_if_it_is_the_one(adapted, tiny_model, pixels, tmp_path, is_own):
    model = adapted()
    with torch.no_grad():
        expected = model(pixels).logits
    if is_own:  # as after a move: the path that it names is gone
        model.peft_config["default"].base_model_name_or_path = "moved/base"
        (tmp_path / "adapter").mkdir()
        (tmp_path / "detector").rename(tmp_path / "adapter" / "base")
    else:  # left by an earlier run in the same folder
        tiny_model(num_labels=2).save_pretrained(tmp_path / "adapter" / "base")
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        logits = load_detector(tmp_path / "adapter")(pixels).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("named", ["C:\\runs\\my-adapter\\base", "/gone/my-adapter/base"])
def test_a_base_beside_is_found_whatever_machine_named_it(adapted, pixels, tmp_path, named):
    model = adapted()
    with torch.no_grad():
        expected = model(pixels).logits
    model.peft_config["default"].base_model_name_or_path = named
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "detector").rename(tmp_path / "adapter" / "base")
    with torch.no_grad():
        torch.testing.assert_close(load_detector(tmp_path / "adapter")(pixels).logits, expected, atol=1e-5, rtol=0)


def test_a_base_that_is_gone_is_named_with_the_adapter(adapted, tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "detector")
    with pytest.raises(OSError, match=r"adapter is an adapter whose base '.*detector' cannot be loaded: write its"):
        load_detector(tmp_path / "adapter")


def test_merging_keeps_the_base_and_needs_no_image_processor_of_the_adapter(adapted, pixels, tmp_path, capsys):
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    before = (tmp_path / "detector" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        convert.main([str(tmp_path / "adapter"), str(tmp_path / "detector")])
    assert "would be written over" in capsys.readouterr().err
    assert (tmp_path / "detector" / "model.safetensors").read_bytes() == before
    with pytest.raises(OSError):  # neither has one, and nothing is written
        convert.main([str(tmp_path / "adapter"), str(tmp_path / "merged")])
    assert not (tmp_path / "merged").exists()
    DiTDetectionImageProcessor(size=96).save_pretrained(tmp_path / "detector")
    convert.main([str(tmp_path / "adapter"), str(tmp_path / "merged")])
    assert AutoImageProcessor.from_pretrained(tmp_path / "merged").size["max_height"] == 96
    with torch.no_grad():
        expected = model(pixels).logits
        torch.testing.assert_close(load_detector(tmp_path / "merged")(pixels).logits, expected, atol=1e-5, rtol=0)


def test_an_adapter_without_a_base_says_so(tiny_model, tmp_path):
    add_lora(tiny_model(), 1).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="names no base_model_name_or_path"):
        load_detector(tmp_path)


def test_a_detector_is_loaded_as_it_is(tiny_model, pixels, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_detector(tmp_path)(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("source", ["no/such/folder", "not a repo!!", "nobody/nothing"])
def test_what_is_nowhere_is_no_adapter(source):
    assert not is_adapter(source)
    with pytest.raises(OSError):
        load_detector(source)


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
    from dit_detection.commands import convert, evaluate, train

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
    monkeypatch.setattr(train, "fit_to_splits", lambda *args: (other, True))
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
    from dit_detection.commands import evaluate, train

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
    from dit_detection.commands.train_options import parse_options

    with pytest.raises(SystemExit):
        parse_options(["--dry_run", "--lora_r", "8"])
