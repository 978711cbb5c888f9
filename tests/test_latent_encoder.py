import json

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from dit_detection.model.latent_encoder import LatentEncoder


def random_autoencoder(kind, **overrides):
    if kind == "tiny":
        fields = {
            "latent_channels": 4,
            "encoder_block_out_channels": (16, 16, 16),
            "decoder_block_out_channels": (16, 16, 16),
            "num_encoder_blocks": (1, 2, 1),
            "num_decoder_blocks": (1, 2, 1),
        }
        autoencoder = AutoencoderTiny(**(fields | overrides))
    else:
        fields = {
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "norm_num_groups": 8,
        }
        autoencoder = AutoencoderKL(**(fields | overrides))
    torch.manual_seed(0)
    for parameter in autoencoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    return autoencoder.eval()


def latent_encoder_of(autoencoder):
    """Built from the whole config, through JSON, as it is stored."""
    config = {**autoencoder.config, "_class_name": type(autoencoder).__name__}
    encoder = LatentEncoder(json.loads(json.dumps(config)))
    weights = autoencoder.state_dict()
    encoder.load_state_dict({key: weights[key] for key in weights if key.startswith(("encoder.", "quant_conv."))})
    return encoder


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False},
        {"mid_block_add_attention": False, "layers_per_block": 2, "latent_channels": 16},
    ],
)
def test_autoencoder_kl_equals_the_mode_of_diffusers_encode(overrides):
    autoencoder = random_autoencoder("kl", **overrides)
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        mode = autoencoder.encode(pixels).latent_dist.mode()
    config = autoencoder.config
    expected = (mode - (config.shift_factor or 0.0)) * config.scaling_factor
    assert expected.shape == (2, config.latent_channels, 8, 12)
    torch.testing.assert_close(latent_encoder_of(autoencoder)(pixels), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("overrides", [{}, {"scaling_factor": 0.5, "shift_factor": 0.25}])
def test_autoencoder_tiny_equals_diffusers_encode(overrides):
    autoencoder = random_autoencoder("tiny", **overrides)
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        latents = autoencoder.encode(pixels).latents
    config = autoencoder.config
    expected = (latents - config.shift_factor) * config.scaling_factor
    torch.testing.assert_close(latent_encoder_of(autoencoder)(pixels), expected, atol=1e-6, rtol=1e-5)


def test_a_config_older_than_its_newest_keys_means_their_defaults():
    autoencoder = random_autoencoder("kl")
    encoder = latent_encoder_of(autoencoder)
    config = {**autoencoder.config, "_class_name": "AutoencoderKL"}
    for key in ("use_quant_conv", "shift_factor", "mid_block_add_attention"):
        del config[key]
    old = LatentEncoder(config)
    old.load_state_dict(encoder.state_dict())
    pixels = torch.rand(1, 3, 16, 16)
    assert torch.equal(old(pixels), encoder(pixels))


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_frozen_and_in_eval_mode_inside_a_model_in_train_mode(kind):
    encoder = latent_encoder_of(random_autoencoder(kind))
    model = nn.Sequential(encoder, nn.Conv2d(4, 1, 1)).train()
    assert model.training and not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    pixels = torch.rand(1, 3, 16, 16, requires_grad=True)
    model(pixels).sum().backward()
    assert pixels.grad is None and model[1].weight.grad is not None


def test_weights_that_a_loader_made_trainable_are_frozen_again():
    encoder = latent_encoder_of(random_autoencoder("tiny"))
    nn.Sequential(encoder.requires_grad_(True)).eval()  # the last thing that `from_pretrained` does
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_no_graph_even_when_unfrozen_and_checkpointed(kind):
    encoder = latent_encoder_of(random_autoencoder(kind)).requires_grad_(True)
    pixels = torch.rand(1, 3, 16, 16)
    expected = encoder(pixels)
    # What `gradient_checkpointing_enable` sets on every module that has the attribute, as diffusers' encoders do; with
    # autograd on, EncoderTiny would then skip the step from [-1, 1] to [0, 1] (diffusers 0.42).
    encoder.encoder.gradient_checkpointing = True
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor), lambda tensor: tensor):
        latents = encoder(pixels)
    assert not latents.requires_grad and not saved
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half(dtype):
    encoder = latent_encoder_of(random_autoencoder("kl")).to(dtype)
    assert encoder(torch.rand(1, 3, 16, 16, dtype=dtype)).dtype == dtype
