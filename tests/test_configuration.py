import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from dit_detection import DiTDetectionConfig, DiTForObjectDetection


def test_defaults_are_dit_xl_2_on_a_pyramid():
    config = DiTDetectionConfig()
    assert config.model_type == "dit_detection"
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1152, 18, 16)
    assert config.out_indices == [9, 13, 17]
    assert config.strides == [8, 16, 32, 64, 128]
    assert config.num_anchors_per_cell == 9
    # 4 strides times 1, 2^(1/3) and 2^(2/3): 32, 40.32, 50.80 on the finest level.
    assert config.anchor_sizes[0] == pytest.approx([32, 40.3175, 50.7968], abs=1e-4)
    assert config.anchor_sizes[4][0] == 512


@pytest.mark.parametrize(
    ("depth", "taps"), [(1, [0]), (2, [0, 1]), (6, [2, 4, 5]), (12, [6, 8, 11]), (18, [9, 13, 17])]
)
def test_default_taps_rise_to_the_last_block(depth, taps):
    # 10/18, 14/18 and 18/18 of the depth: of 12 blocks, after 6.7, 9.3 and 12, so 0-based 6, 8 and 11.
    assert DiTDetectionConfig(num_hidden_layers=depth, patch_size=16).out_indices == taps


def test_token_stride(tiny_config):
    kl = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 8, 8]}
    tiny = {"_class_name": "AutoencoderTiny", "encoder_block_out_channels": [8, 8, 8]}
    assert tiny_config().token_stride == 16  # pixels
    assert tiny_config(latent_encoder=kl, patch_size=2).token_stride == 16  # three halvings, 2 x 2 cells
    assert tiny_config(latent_encoder=tiny, patch_size=4).token_stride == 16  # two halvings, 4 x 4 cells


def test_survives_json_and_a_folder(tiny_config, tmp_path):
    config = tiny_config(
        strides=(8, 16),
        aspect_ratios=(1, 2.0),
        anchor_sizes=[[32, 40], [64, 80.5]],
        head_channels=(8, 8),
        out_indices=(0, 1),
        class_weights=[1, 2.5, 1],
        focal_gamma=2,
        id2label={0: "red", 1: "white", 2: "platelet"},
        label2id={"red": 0, "white": 1, "platelet": 2},
    )
    config.save_pretrained(tmp_path)
    for reloaded in (
        DiTDetectionConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        DiTDetectionConfig(**json.loads(config.to_json_string(use_diff=False))),
    ):
        assert type(reloaded) is DiTDetectionConfig
        assert reloaded.to_dict() == config.to_dict() | {"_name_or_path": reloaded.to_dict().get("_name_or_path", "")}
    assert reloaded.strides == [8, 16]
    assert reloaded.aspect_ratios == [1.0, 2.0]
    assert reloaded.id2label == {0: "red", 1: "white", 2: "platelet"}
    assert reloaded.num_labels == 3


def test_two_configs_share_nothing():
    one, other = DiTDetectionConfig(), DiTDetectionConfig()
    one.strides.append(256)
    one.anchor_sizes[0].append(1.0)
    assert other.strides == [8, 16, 32, 64, 128]
    assert len(other.anchor_sizes[0]) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 30}, "hidden_size=30 must be a multiple of num_attention_heads=4"),
        ({"hidden_size": 30, "num_attention_heads": 3}, "hidden_size=30 must be a multiple of 4"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
        ({"patch_size": 0}, "patch_size=0 must be at least 1"),
        ({"out_indices": [1, 0]}, r"out_indices=\[1, 0\] must rise"),
        ({"out_indices": [1, 1]}, r"out_indices=\[1, 1\] must rise"),
        ({"out_indices": [-1, 1]}, r"out_indices=\[-1, 1\] must rise"),
        ({"out_indices": [0]}, "blocks after the deepest tap would never run"),
        ({"out_indices": [0, 2]}, "num_hidden_layers - 1 = 1"),
        ({"strides": []}, r"strides=\[\] must double"),
        ({"strides": [8, 24]}, r"strides=\[8, 24\] must double"),
        ({"strides": [16, 8]}, r"strides=\[16, 8\] must double"),
        ({"strides": [0]}, r"strides=\[0\] must double"),
        ({"strides": [-8, -16]}, r"strides=\[-8, -16\] must double"),
        ({"strides": [32, 64]}, "must start at the token stride 16"),
        ({"strides": [12, 24]}, "must start at the token stride 16"),
        ({"neck_channels": None}, r"Without a neck .* strides=\[16\] instead of \[8, 16, 32\]"),
        ({"anchor_sizes": [[32.0]]}, "same number of sizes for each of the 3 strides"),
        ({"anchor_sizes": [[32.0], [64.0], [96.0, 128.0]]}, "same number of sizes for each of the 3 strides"),
        ({"anchor_sizes": [[32.0], [64.0], [0.0]]}, "must be positive"),
        ({"anchor_sizes": [[32.0], [64.0], [float("nan")]]}, "must be positive"),
        ({"anchor_sizes": [[], [], []]}, "at least one anchor per cell"),
        ({"aspect_ratios": []}, "at least one anchor per cell"),
        ({"aspect_ratios": [1.0, -2.0]}, "must be positive"),
        ({"predictor_kernel_size": 2}, "predictor_kernel_size=2 must be odd"),
        ({"foreground_iou": 0.3}, "background_iou=0.4 <= foreground_iou=0.3"),
        ({"background_iou": 0.0}, "background_iou=0.0"),
        ({"foreground_iou": 1.1}, "foreground_iou=1.1"),
        ({"prior_probability": 1.0}, "prior_probability=1.0 must lie between 0 and 1"),
        ({"prior_probability": 0.0}, "prior_probability=0.0 must lie between 0 and 1"),
        ({"smooth_l1_beta": -0.1}, "smooth_l1_beta=-0.1 must be at least 0"),
        ({"focal_gamma": -1}, "focal_gamma=-1 must be at least 0"),
        ({"box_loss_weight": -0.5}, "box_loss_weight=-0.5 must be at least 0"),
        ({"focal_alpha": -1}, "focal_alpha=-1 must lie between 0 and 1"),
        ({"class_weights": [1, -1]}, r"class_weights=\[1, -1\] must be at least 0"),
        ({"neck_channels": 0}, "neck_channels=0 and .* must be at least 1; for no pyramid neck_channels=None"),
        ({"head_channels": [0]}, r"head_channels=\[0\] must be at least 1"),
        ({"max_candidates": 0}, "max_candidates=0 must be at least 1"),
        ({"atss_candidates": 0}, "atss_candidates=0 must be at least 1"),
        ({"latent_encoder": {"_class_name": "VQModel"}}, "'VQModel'; AutoencoderKL and AutoencoderTiny"),
        ({"latent_encoder": {}}, "None; AutoencoderKL and AutoencoderTiny"),
    ],
)
def test_what_could_not_run_is_refused(tiny_config, overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        {"hidden_size": "32"},
        {"hidden_size": 32.0},
        {"strides": [8.0, 16.0]},
        {"strides": 16},
        {"matcher": "hungarian"},
        {"class_loss": "softmax"},
        {"box_loss": "ciou"},
        {"qkv_bias": "yes"},
        {"class_weights": ["1"]},
        {"condition": "dog"},
        {"focal_gamma": "2"},
    ],
)
def test_wrong_types_are_refused(tiny_config, overrides):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(overrides))):
        tiny_config(**overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"class_weights": [1.0, 2.0]}, "class_weights has 2 entries for num_labels=3.*class_weights=None"),
        ({"num_labels": 2, "id2label": {1: "cat", 2: "dog"}}, r"classes \[1, 2\].*numbered from 0"),
        ({"num_labels": 2, "id2label": {0: "cat", 1: "cat"}}, "several classes 'cat'"),
        ({"id2label": {}, "label2id": {}}, "at least one"),
        ({"strides": [8, 16, 40]}, r"strides=\[8, 16, 40\] must double"),
        ({"max_candidates": 0}, "max_candidates=0 must be at least 1"),
        ({"num_hidden_layers": 1}, "blocks after the deepest tap"),
    ],
)
def test_what_is_set_afterwards_is_checked_before_a_model_is_made_of_it(tiny_config, overrides, message):
    config = tiny_config()
    for name, value in overrides.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        DiTForObjectDetection(config)


@pytest.mark.parametrize("keys", [int, str])
def test_other_names_of_classes_go_with_their_numbers(tiny_model, tmp_path, keys):
    tiny_model().save_pretrained(tmp_path)
    names = {keys(label): name for label, name in enumerate("xyzu")}
    model = DiTForObjectDetection.from_pretrained(tmp_path, id2label=names, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path)
    config = DiTDetectionConfig.from_pretrained(tmp_path)
    assert config.id2label == {0: "x", 1: "y", 2: "z", 3: "u"}
    assert config.label2id == {"x": 0, "y": 1, "z": 2, "u": 3}


def test_a_detector_goes_on_with_other_classes(tiny_model, tmp_path):
    tiny_model(class_weights=[1.0, 2.0, 3.0]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="class_weights has 3 entries for num_labels=5"):
        DiTForObjectDetection.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    model = DiTForObjectDetection.from_pretrained(
        tmp_path, num_labels=5, class_weights=None, ignore_mismatched_sizes=True
    )
    assert model(torch.zeros(1, 3, 64, 64)).logits.shape[2] == 5
    refilled = DiTForObjectDetection.from_pretrained(
        tmp_path, anchor_sizes=[[20.0], [40.0], [80.0]], aspect_ratios=[1.0], ignore_mismatched_sizes=True
    )
    assert refilled(torch.zeros(1, 3, 64, 64)).logits.shape == (1, 8 * 8 + 4 * 4 + 2 * 2, 3)
