"""Pipeline folders of diffusers: a DiT to go on from, and what is left behind."""

import os
from typing import Any

import diffusers
from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from huggingface_hub.errors import HFValidationError

from ..model.load_dit import load_dit
from .new_dit import new_scheduler


def load_pipeline(source: str, vae: str | None = "auto") -> tuple[DiTTransformer2DModel, Any, Any]:
    """
    Load a DiT to go on from.

    Args:
        source (`str`): Hub id or folder of a DiT pipeline, or of a bare transformer.
        vae (`str`, *optional*): As of [`load_dit`].

    Returns:
        The transformer in float32, its scheduler, and its autoencoder or `None`. A bare transformer gets the noise
        schedule of DiT, which predicts the noise.

    Raises:
        ValueError: If it is no DiT, or its scheduler is not one of diffusers.
    """
    loaded, autoencoder = load_dit(source, vae=vae)
    return loaded.float(), _load_scheduler(source), autoencoder


def save_pipeline(folder: str | os.PathLike, transformer: DiTTransformer2DModel, scheduler: Any, vae: Any) -> None:
    """Write a folder that `DiTPipeline.from_pretrained` reads (without an autoencoder: with `vae=None`)."""
    pipeline = DiTPipeline(transformer, vae, scheduler)
    if vae is None:
        pipeline._optional_components = ["vae"]  # or diffusers warns that None cannot be saved
    pipeline.save_pretrained(os.fspath(folder))


def _load_scheduler(source: str) -> Any:
    try:
        config: Any = DDPMScheduler.load_config(source, subfolder="scheduler")
    except (OSError, HFValidationError):
        return new_scheduler("epsilon", on_pixels=False)
    name = config.get("_class_name", "")
    scheduler_class = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if scheduler_class is None:
        raise ValueError(f"{source}: its scheduler is {name or 'of no class'}, which diffusers does not have.")
    return scheduler_class.from_config(config)
