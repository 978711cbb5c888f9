import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_inputs import assert_same_outputs, pixels
from tiny_training import LATENTS
from torch import nn
from transformers import AutoModel, AutoModelForObjectDetection

from dit_detection import (
    DiTForObjectDetection,
)

NUM_ANCHORS = 9 * (8 * 8 + 4 * 4 + 2 * 2)  # of 64 x 64 pixels
PRIOR_BIAS = -math.log(0.99 / 0.01)


@pytest.mark.parametrize("overrides", [{}, LATENTS], ids=["pixels", "latents"])
def test_reloads_bit_by_bit(tiny_model, tmp_path, overrides):
    model = tiny_model(**overrides)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    reloaded, info = AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert type(reloaded) is DiTForObjectDetection
    assert not reloaded.training
    assert_same_outputs(reloaded(pixels()), model(pixels()))
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(pixels()).last_hidden_state, model(pixels()).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reloads_in_its_own_dtype(tiny_model, tmp_path, dtype):
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path)
    reloaded = DiTForObjectDetection.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert reloaded.dtype == dtype
    assert_same_outputs(reloaded(pixels()), model(pixels()))


def assert_fresh(predictor):
    """As RetinaNet starts: a narrow normal distribution, and the prior probability as the bias."""
    assert torch.equal(predictor.bias, torch.full_like(predictor.bias, PRIOR_BIAS))
    assert 0.005 < predictor.weight.std() < 0.015
    assert predictor.weight.mean().abs() < 0.002


def test_new_classes_start_only_the_class_predictor_afresh(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    id2label = dict(enumerate("abcde"))
    new_classes = {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        DiTForObjectDetection.from_pretrained(tmp_path, **new_classes)
    reloaded, info = DiTForObjectDetection.from_pretrained(
        tmp_path, **new_classes, ignore_mismatched_sizes=True, output_loading_info=True
    )
    fresh = {"head.class_predictor.weight", "head.class_predictor.bias"}
    assert {key[0] for key in info["mismatched_keys"]} == fresh
    assert reloaded.config.num_labels == 5
    assert reloaded(pixels()).logits.shape == (2, NUM_ANCHORS, 5)
    assert_fresh(reloaded.head.class_predictor)
    old = model.state_dict()
    for name, tensor in reloaded.state_dict().items():
        assert name in fresh or torch.equal(tensor, old[name]), name


def test_a_checkpoint_without_the_head_gets_a_fresh_one(tiny_model, tmp_path):
    # On transformers 5 a model is built without memory first: what no initialisation reaches is whatever lay there.
    model = tiny_model()
    model.model.save_pretrained(tmp_path)
    reloaded, info = DiTForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"neck", "head"}
    assert_fresh(reloaded.head.class_predictor)
    assert (reloaded.head.box_predictor.bias == 0).all()
    assert 0.005 < reloaded.head.box_predictor.weight.std() < 0.015
    assert (reloaded.neck.mix.weight == 0).all()
    for module in (*reloaded.neck.modules(), *reloaded.head.modules()):
        if isinstance(module, nn.GroupNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(reloaded.model.state_dict()[name], tensor)
    # The same as built anew.
    anew = DiTForObjectDetection(model.config)
    for one, other in zip(reloaded.head.parameters(), anew.head.parameters(), strict=True):
        torch.testing.assert_close(one.mean(), other.mean(), atol=0.01, rtol=0)
        if one.numel() > 500:
            torch.testing.assert_close(one.std(), other.std(), atol=0.01, rtol=0.1)


def test_what_a_checkpoint_lacks_starts_as_if_built_anew(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = [name for name in weights if ".scale" in name or "norm" in name or "mix" in name or "predictor" in name]
    save_file(
        {name: weights[name] for name in weights if name not in gone}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    reloaded = DiTForObjectDetection.from_pretrained(tmp_path)
    for layer in reloaded.model.backbone.layers:
        for module in (layer.scale1, layer.scale2, layer.norm1, layer.norm2):
            assert (module.weight == 1).all()
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in reloaded.model.backbone.tap_norms)
    assert (reloaded.neck.mix.weight == 0).all()
    assert_fresh(reloaded.head.class_predictor)
