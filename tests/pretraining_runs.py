"""Options of short runs of `dit-detect pretrain`, and a tiny pipeline to go on from."""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from dit_detection.data import draw_shapes_dataset

QUIET = ["--bf16", "False", "--disable_tqdm", "True", "--report_to", "none", "--per_device_train_batch_size", "4"]
NEW = [*QUIET, "--size", "tiny", "--image_size", "16"]


def write_ten_images(folder):
    for index, row in enumerate(draw_shapes_dataset(10, 0, 0, image_size=(32, 48))["train"]):
        row["image"].save(folder / f"{index}.png")
    return folder


def randomized(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.eval()


def latent_pipeline():
    """As the published DiT, but tiny: 4 channels in, 8 out, classes, and a scheduler that is not all defaults."""
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        sample_size=8,
        out_channels=8,
        num_embeds_ada_norm=5,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    scheduler = DDPMScheduler(beta_end=0.03, clip_sample=False, num_train_timesteps=500)
    return DiTPipeline(randomized(dit), randomized(vae), scheduler)
