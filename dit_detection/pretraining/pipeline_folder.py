"""Pipeline folders of diffusers: a DiT to go on from, and what is left behind."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiTPipeline, DiTTransformer2DModel

from ..model.load_dit import load_dit, pipeline_folder, read_json, source_name
from .new_dit import new_scheduler

logger = logging.getLogger(__name__)

INDEX = DiTPipeline.config_name


def load_pipeline(
    source: str, vae: str | None = "auto", revision: str | None = None
) -> tuple[DiTTransformer2DModel, Any, Any]:
    """
    Load a DiT to go on from.

    Args:
        source (`str`): Hub id or folder of a DiT pipeline, or of a bare transformer.
        vae (`str`, *optional*), revision (`str`, *optional*): As of [`load_dit`].

    Returns:
        The transformer in float32, its scheduler, and its autoencoder or `None`. A bare transformer that is not part
        of a pipeline gets the noise schedule of DiT, which predicts the noise.

    Raises:
        ValueError: If it is no DiT, or its scheduler is lost, damaged or not one of diffusers.
    """
    loaded, autoencoder = load_dit(source, vae=vae, revision=revision)
    return loaded.float(), _load_scheduler(source, revision), autoencoder


def save_pipeline(folder: str | os.PathLike, transformer: DiTTransformer2DModel, scheduler: Any, vae: Any) -> None:
    """
    Write a folder that `DiTPipeline.from_pretrained` reads (without an autoencoder: with `vae=None`).

    The autoencoder of a pipeline that was there before goes, if there is none now: readers would take it for its own.
    """
    for part in (transformer, vae):
        if part is not None and (place := part.config.get("_name_or_path")):
            part.register_to_config(_name_or_path=source_name(place))  # of a folder its name, not where it lies
    pipeline = DiTPipeline(transformer, vae, scheduler)
    if vae is None:
        index = Path(folder, INDEX)
        if index.is_file() and read_json(index).get("vae", [None])[0] is not None:
            shutil.rmtree(Path(folder, "vae"), ignore_errors=True)
        pipeline._optional_components = ["vae"]  # or diffusers warns that None cannot be saved
    pipeline.save_pretrained(os.fspath(folder))


def _load_scheduler(source: str, revision: str | None) -> Any:
    folder = pipeline_folder(source, revision)
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        if (folder / INDEX).is_file():
            raise ValueError(f"{source} is a pipeline without scheduler/{file.name}. Download it again.")
        logger.warning(
            "%s has no scheduler, and is taken for a DiT that predicts the noise, as the first ones.", source
        )
        return new_scheduler("epsilon", on_pixels=False)
    config = read_json(file)
    name = config.get("_class_name", "")
    scheduler_class = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if scheduler_class is None:
        raise ValueError(f"{source}: its scheduler is {name or 'of no class'}, which diffusers does not have.")
    return scheduler_class.from_config(config)
