"""
A small autoencoder, so that a DiT on latents can be held against one on pixels where no published autoencoder is.

Shape letters: B images, H W pixels, C latent channels, h w latent cells.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import concatenate_datasets
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dit_detection.pretraining.image_sources import draw_training_images, list_training_images
from dit_detection.pretraining.image_views import CentreCrops, DecodedImages, RandomCrops

# A cell is 4 x 4 pixels and has 4 channels: 12 times fewer numbers than the pixels.
NETWORK = {
    "encoder_block_out_channels": (32, 32, 32),
    "num_encoder_blocks": (0, 1, 2),
    "decoder_block_out_channels": (32, 32, 32),
    "num_decoder_blocks": (2, 1, 0),
    "latent_channels": 4,
}
# As the DiT of the package was pretrained: model_cards/small-dit/README.md.
IMAGE_SIZE, CROP_AREA, NUM_SHAPES, HELD_OUT_SHARE = 128, 0.1, 1000, 0.05
PATCH, BATCH_SIZE, STEPS, LEARNING_RATE = 64, 16, 3000, 2e-3
# Added to latents in training, which are held between -3 and 3: neighbours in that space then look alike.
LATENT_NOISE = 0.1


def train_autoencoder(folder: Path, sources: Sequence[Path], *, steps: int = STEPS, seed: int = 0) -> float:
    """
    Train on views like those of `dit-detect pretrain`, by absolute errors, and write it for `--vae`.

    Args:
        folder (`Path`): Where to.
        sources (`Sequence[Path]`): As `--images` takes them; shapes are drawn beside them, and the same images held
            out, as `dit-detect pretrain --num_shapes 1000` does with this seed.
        steps (`int`), seed (`int`): Of training.

    Returns:
        `float`: Peak signal-to-noise ratio on the held-out images, dB.
    """
    torch.manual_seed(seed)
    images = _read_images(sources, seed)
    order = np.random.default_rng(seed).permutation(len(images))
    num_held_out = round(HELD_OUT_SHARE * len(images))
    views = RandomCrops(images, order[num_held_out:], IMAGE_SIZE, CROP_AREA, seed)
    held_out = CentreCrops(images, order[:num_held_out], IMAGE_SIZE)

    model = AutoencoderTiny(**NETWORK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    for pixels in tqdm(_patches(views, steps, seed), "Training the autoencoder", steps):
        latents = model.encode(pixels).latents
        decoded = model.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample
        loss = F.l1_loss(decoded, pixels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return _finish(model, torch.stack([held_out.get(index, 0) for index in range(len(held_out))]), folder)


@torch.no_grad()
def _finish(model: AutoencoderTiny, pixels: Tensor, folder: Path) -> float:
    """Scale its latents of these 8-bit pixels `(B, 3, H, W)` to mean 0 and variance 1, write it, and measure it."""
    pixels = _scaled(pixels)
    latents = model.encode(pixels).latents
    model.register_to_config(shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std()))
    model.save_pretrained(folder)
    error = F.mse_loss(model.decode(latents).sample.clamp(-1, 1), pixels)
    return 10 * math.log10(4 / float(error))  # values are 2 apart at most


def _read_images(sources: Sequence[Path], seed: int) -> DecodedImages:
    """The images of `dit-detect pretrain`, in its order."""
    listed = list_training_images([str(source) for source in sources])
    rows = concatenate_datasets([listed, draw_training_images(NUM_SHAPES, IMAGE_SIZE, seed)])
    return DecodedImages(rows, round(IMAGE_SIZE / CROP_AREA**0.5), max_bytes=2**32, show_progress=True)


def _patches(views: RandomCrops, steps: int, seed: int) -> Iterator[Tensor]:
    """Batches of `(B, 3, PATCH, PATCH)` between -1 and 1, each a part of a view."""
    rng = np.random.default_rng((seed, 3))
    for step in range(steps):
        batch = []
        for position in range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE):
            epoch, index = divmod(position, len(views))  # in order: the order of the images is random already
            top, left = rng.integers(IMAGE_SIZE - PATCH + 1, size=2)
            batch.append(views.get(index, epoch)[:, top : top + PATCH, left : left + PATCH])
        yield _scaled(torch.stack(batch))


def _scaled(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1
