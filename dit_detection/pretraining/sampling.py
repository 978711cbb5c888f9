"""What a Diffusion Transformer draws: images from noise."""

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from ..visualize import draw_grid
from .diffusion_model import DiffusionModel, is_flow


@torch.no_grad()
def sample_images(
    model: DiffusionModel, vae: Any, num_images: int, num_steps: int = 50, seed: int = 0
) -> list[Image.Image]:
    """
    Draw images from noise without any condition: by DDIM, or by Euler's method for flow matching.

    Args:
        model (`DiffusionModel`): On the device that computes.
        vae (`Any`): The autoencoder of a DiT on latents, else `None`.
        num_images (`int`), num_steps (`int`): How many, and with how many evaluations of the network each; as many as
            the schedule has timesteps at most.
        seed (`int`): Of the noise. The global random state is left as it was.
    """
    config: Any = model.transformer.config
    device = next(model.parameters()).device
    shape = (num_images, config.in_channels, config.sample_size, config.sample_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    values = {name: value for name, value in model.scheduler.config.items() if not name.startswith("_")}
    sampler = _euler(values) if is_flow(model.scheduler) else _ddim(values, clip_sample=vae is None)
    sampler.set_timesteps(min(num_steps, values["num_train_timesteps"]), device=device)
    was_training = model.training
    model.eval()
    for timestep in sampler.timesteps:
        output = model.predict(x, timestep.expand(num_images))[:, : config.in_channels].float()
        x = sampler.step(output, timestep, x).prev_sample
    model.train(was_training)
    return _to_images(x if vae is None else decode_latents(vae, x))


def _euler(config: dict[str, Any]) -> Any:
    """Euler's method with the shift of the scheduler; one that depends on the size of the image is left out."""
    return FlowMatchEulerDiscreteScheduler.from_config(config | {"use_dynamic_shifting": False})


def _ddim(config: dict[str, Any], clip_sample: bool) -> Any:
    """DDIM on the noise schedule of another scheduler; pixels end at -1 and 1, latents do not."""
    # DDIM itself does not know all the names of schedules.
    known: Any = DDPMScheduler.from_config(config)
    return DDIMScheduler.from_config(config | {"clip_sample": clip_sample, "trained_betas": known.betas.tolist()})


def sample_grid(images: list[Image.Image], columns: int = 4) -> Image.Image:
    """Images in rows, each in its own size."""
    return draw_grid(images, columns=columns, cell_size=images[0].width)


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Latents, shifted and scaled as a DiT knows them, → pixels in [-1, 1]."""
    vae = vae.to(latents.device)
    shift = vae.config.get("shift_factor") or 0.0
    latents = latents / vae.config.scaling_factor + shift
    return vae.decode(latents.to(vae.dtype)).sample.float()


def _to_images(pixels: Tensor) -> list[Image.Image]:
    """`(B, 3, H, W)` in [-1, 1] → pictures."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in values]
