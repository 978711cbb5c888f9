"""The frozen encoder against diffusers' own `encode`: the same convolutions, ours with the channels last in memory."""

from collections.abc import Iterator
from functools import partial

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny

from dit_detection.model.latent_encoder import LatentEncoder

from .backbone import DTYPES, check_equal, fill
from .measure import Pair, Row, Settings, count_parameters


def rows(settings: Settings) -> Iterator[Row]:
    """The Stable Diffusion VAE and its tiny stand-in on one image of 256 px."""
    for name in ("TAESD", "SD-VAE"):
        for dtype in DTYPES:
            if settings.quick and (name, dtype) == ("SD-VAE", "fp32"):
                continue
            build = partial(encode, name, dtype, settings.device)
            yield Row(f"encoder: LatentEncoder / diffusers encode, {name}, 256 px, {dtype}", build, aim=1.0)


def encode(name: str, dtype: str, device: str) -> Pair:
    """Pixels → latents, by the mode of the posterior."""
    with init_empty_weights(include_buffers=False):
        autoencoder = sd_vae() if name == "SD-VAE" else AutoencoderTiny()
        encoder = LatentEncoder({**autoencoder.config, "_class_name": type(autoencoder).__name__})
    fill(autoencoder, seed=0)
    weights = autoencoder.state_dict()
    kept = {key: weights[key] for key in weights if key.startswith(("encoder.", "quant_conv."))}
    encoder.load_state_dict(kept, assign=True)
    pixels = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1

    def theirs() -> torch.Tensor:
        encoded = autoencoder.encode(pixels)
        latents = encoded.latents if name == "TAESD" else encoded.latent_dist.mode()
        return latents * autoencoder.config.scaling_factor

    autoencoder.to(device)
    encoder.to(device)
    with torch.no_grad():
        check_equal(encoder(pixels), theirs())
    pixels = pixels.to(DTYPES[dtype])
    autoencoder.to(DTYPES[dtype])
    encoder.to(DTYPES[dtype])
    parameters = count_parameters(encoder), count_parameters(autoencoder)
    return Pair(lambda: encoder(pixels), torch.no_grad()(theirs), parameters)


def sd_vae() -> AutoencoderKL:
    """The published Stable Diffusion VAE's configuration."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
