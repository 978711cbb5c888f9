import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from dit_detection import (
    DetectionTrainingArguments,
    DiTDetectionImageProcessor,
    DiTForObjectDetection,
    add_lora,
    load_detector,
)
from dit_detection.adapters import is_adapter
from dit_detection.commands import convert
from dit_detection.training.trainer import parameter_groups

# Whole trainings: together they take longer than all the fast tests may.
pytestmark = pytest.mark.slow

pytest.importorskip("peft")


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
    with pytest.raises(OSError, match="There is no folder no/such/folder" if source == "no/such/folder" else None):
        load_detector(source)
