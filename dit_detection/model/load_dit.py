# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""Read a Diffusion Transformer (DiT) and its autoencoder with diffusers: what they are and every key is checked."""

import json
import os
import re
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from huggingface_hub import ModelCard, snapshot_download
from safetensors import safe_open
from yaml import YAMLError

# DiT-XL/2 by its authors, in diffusers' layout or the original one.
PUBLISHED_DIT = re.compile(r"DiT-XL-2-(256|512)")
_AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


def load_dit(
    source: str | os.PathLike | DiTTransformer2DModel | Transformer2DModel | DiTPipeline,
    *,
    vae: str | os.PathLike | AutoencoderKL | AutoencoderTiny | None = "auto",
    revision: str | None = None,
) -> tuple[DiTTransformer2DModel | Transformer2DModel, AutoencoderKL | AutoencoderTiny | None]:
    """
    Load a DiT and the autoencoder in whose latent space it works, each in the dtype of its own file.

    Args:
        source: Hub id or local folder of a DiT pipeline or of a bare `DiTTransformer2DModel`, or a loaded diffusers
            transformer or pipeline. Loaded objects are returned as they are.
        vae: `"auto"` takes the pipeline's own, or none for a bare transformer on 3 channels. Else a Hub id or folder
            (of the autoencoder, or of a pipeline that has one), a loaded one, or `None` for a DiT on pixels.
        revision (`str`, *optional*): Branch, tag or commit of a `source` on the Hub.

    Raises:
        `ValueError`: When `source` is not a DiT, a weight is missing, unexpected or misshapen, or `vae` does not fit.
    """
    autoencoder = None
    if isinstance(source, DiTPipeline):
        transformer, autoencoder = source.transformer, source.vae
    elif isinstance(source, str | os.PathLike):
        folder = fetch_folder(source, "source", ["*.json"], revision)
        subfolder = "transformer" if (folder / "transformer" / "config.json").is_file() else ""
        _check_is_dit(_read_config(folder, subfolder), source)
        transformer = _load_model(DiTTransformer2DModel, source, "source", subfolder, revision)
        if vae == "auto" and (folder / "vae" / "config.json").is_file():
            autoencoder = load_autoencoder(source, "source", revision)
    else:
        is_diffusers_transformer = isinstance(source, DiTTransformer2DModel | Transformer2DModel)
        name = type(source).__name__
        _check_is_dit({**(source.config if is_diffusers_transformer else {}), "_class_name": name}, name)
        transformer = source

    in_channels = transformer.config.in_channels
    if vae is None or isinstance(vae, torch.nn.Module):
        autoencoder = vae
    elif vae != "auto":
        autoencoder = load_autoencoder(vae, "vae")
    elif autoencoder is None and in_channels != 3:
        raise ValueError(
            f"source holds a DiT on latents of {in_channels} channels, but no autoencoder: pass the one that it was "
            f"trained with as vae=..., such as vae='stabilityai/sd-vae-ft-ema' for the published DiT, SiT and REPA."
        )
    _check_fits(in_channels, autoencoder)
    return transformer, autoencoder


def default_timestep(source: Any, family: str | None = None, revision: str | None = None) -> int:
    """
    The timestep to fold a DiT at where none is asked for: 50 of 1000, and of flow matching, whose path is a straight
    one, 200: a quarter as much noise as image, as at 73 of DiT's.

    Args:
        source, revision: As of [`load_dit`]; a transformer alone does not tell how it was trained, and is taken for
            one of DiT.
        family (`str`, *optional*): Of a file of the original format.

    Source: model_cards/evidence, "Timestep of a tuned DiT".
    """
    if family is not None:
        is_flow = family != "dit"
    elif isinstance(source, str | os.PathLike):
        file = pipeline_folder(source, revision) / "scheduler" / "scheduler_config.json"
        is_flow = file.is_file() and str(read_json(file).get("_class_name")).startswith("FlowMatch")
    else:
        is_flow = type(getattr(source, "scheduler", None)).__name__.startswith("FlowMatch")
    return 200 if is_flow else 50


def source_name(source: Any) -> str | None:
    """
    The Hub id of a source, or of what a folder's model card says that it was made from, licence and all; or the name
    of its folder: paths of this machine are nobody else's business.
    """
    if not isinstance(source, str | os.PathLike):
        # Of a pipeline the transformer says where its weights are from: it may be another's.
        parts = (getattr(source, "transformer", None), source)
        configs = [getattr(part, "config", None) or {} for part in parts]
        source = next((name for config in configs if (name := config.get("_name_or_path"))), "")
    name = os.fspath(source)
    is_hub_id = name.count("/") == 1 and not name.startswith(("/", ".")) and not os.path.exists(name)
    if not name or is_hub_id:
        return name or None
    folder = Path(name)
    if folder.name in ("", ".."):
        folder = folder.resolve()
    if folder.name == "transformer" and (folder.parent / "model_index.json").is_file():
        folder = folder.parent.resolve()
    if made_from := _made_from(folder / "README.md"):
        return made_from
    repository, snapshots = ("", "", *folder.parts)[-3:-1]
    if snapshots == "snapshots" and repository.startswith("models--"):  # in the Hub's cache
        return "/".join(repository.split("--")[1:])
    return folder.name


def _made_from(card: Path) -> str | None:
    """What a model card says that the weights beside it were made from; the published DiT's own card names itself."""
    if not card.is_file():
        return None
    try:
        content = ModelCard.load(card, ignore_metadata_errors=True)
        base_model, license = content.data.get("base_model"), content.data.get("license")
    except (ValueError, YAMLError):  # it is asked for a name alone
        return None
    if isinstance(base_model, str):
        return base_model
    published = PUBLISHED_DIT.search(content.text)
    return f"facebook/{published[0]}" if published and license == "cc-by-nc-4.0" else None


def _check_is_dit(config: dict[str, Any], source: Any) -> None:
    """Refuse, by name, what is not a class-conditional DiT with adaLN-Zero."""
    name = config.get("_class_name") or ", ".join(config.get("architectures") or [config.get("model_type", "")])
    is_legacy_dit = config.get("norm_type") == "ada_norm_zero" and config.get("patch_size") is not None
    if name == "DiTTransformer2DModel" or (name == "Transformer2DModel" and is_legacy_dit):
        return
    if name == "DiTPipeline":
        raise ValueError(f"source={source!r} is a DiTPipeline without transformer/config.json. Download it again.")
    if config.get("model_type") == "beit" or name.startswith("Beit"):
        raise ValueError(
            f"source={source!r} is a BEiT ({name}), like Microsoft's *Document Image Transformer*, also called "
            f"DiT. A *Diffusion* Transformer is needed, such as 'facebook/DiT-XL-2-256'."
        )
    raise ValueError(
        f"source={source!r} is {name or 'no model that has a config.json'}, not a Diffusion Transformer: needed is "
        f"a DiTPipeline or DiTTransformer2DModel of diffusers (in old configs a Transformer2DModel with patch_size "
        f"and norm_type='ada_norm_zero'), such as 'facebook/DiT-XL-2-256'."
    )


def _check_fits(in_channels: int, autoencoder: AutoencoderKL | AutoencoderTiny | None) -> None:
    """Refuse an autoencoder that this DiT cannot have been trained on, or none where it needs one."""
    if autoencoder is None:
        if in_channels != 3:
            raise ValueError(
                f"vae=None is for a DiT on pixels, with 3 channels; this one reads latents of {in_channels} channels. "
                f"Pass the autoencoder that it was trained with."
            )
        return
    name = type(autoencoder).__name__
    if name not in _AUTOENCODERS:
        raise ValueError(f"vae is {name}; supported are {' and '.join(_AUTOENCODERS)}, or None for a DiT on pixels.")
    config: Any = autoencoder.config
    if config.latent_channels != in_channels or config.in_channels != 3:
        raise ValueError(
            f"vae maps {config.in_channels} to {config.latent_channels} channels, but must map 3 (RGB) to the "
            f"{in_channels} that this DiT reads. Pass the autoencoder that it was trained with."
        )
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise ValueError("vae has latents_mean or latents_std, which DiT pipelines ignore: set both to None.")


def fetch_folder(source: str | os.PathLike, argument: str, patterns: list[str], revision: str | None = None) -> Path:
    """
    The local folder of a source, where files of these patterns are downloaded if it is a Hub id.

    Args:
        source: Hub id or local folder.
        argument (`str`): What errors call it.
        patterns (`list[str]`): As of `snapshot_download`.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.

    Raises:
        `ValueError`: When it is neither, or a folder of which a revision is wanted.
    """
    refuse_revision(source, revision)
    if os.path.isdir(source):
        return Path(source)
    try:
        return Path(snapshot_download(os.fspath(source), revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{argument}={os.fspath(source)!r} is neither a folder nor a Hub repository that can be read: {error}"
        ) from error


def refuse_revision(source: Any, revision: str | None) -> None:
    """Raise a ValueError if a revision is given of what is not on the Hub: it would change nothing."""
    is_path = isinstance(source, str | os.PathLike)
    if revision is not None and (not is_path or os.path.exists(source)):
        shown = os.fspath(source) if is_path else type(source).__name__
        raise ValueError(f"revision={revision!r} is of a repository on the Hub, and {shown} is none. Leave it out.")


def pipeline_folder(source: str | os.PathLike, revision: str | None = None) -> Path:
    """The local folder of a source's configurations; of the transformer of a pipeline, that of the pipeline."""
    folder = Path(os.path.abspath(fetch_folder(source, "source", ["*.json"], revision)))
    return folder.parent if folder.name == "transformer" and (folder.parent / "model_index.json").is_file() else folder


def _read_config(folder: Path, subfolder: str) -> dict[str, Any]:
    for path in (folder / subfolder / "config.json", folder / "model_index.json"):
        if path.is_file():
            return read_json(path)
    return {}


def read_json(path: Path) -> dict[str, Any]:
    """
    The JSON object in a file.

    Raises:
        `ValueError`: When it holds none.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, but is a {type(config).__name__}. Correct it.")
    return config


def load_autoencoder(
    source: str | os.PathLike, argument: str, revision: str | None = None
) -> AutoencoderKL | AutoencoderTiny:
    """
    Load an autoencoder from a Hub id or folder, of itself or of a pipeline that has one.

    Args:
        source: Hub id or local folder.
        argument (`str`): What errors call it.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.

    Raises:
        `ValueError`: When it is none that is supported, or a weight is missing, unexpected or misshapen.
    """
    folder = fetch_folder(source, argument, ["*.json"], revision)
    subfolder = "vae" if (folder / "vae" / "config.json").is_file() else ""
    name = _read_config(folder, subfolder).get("_class_name")
    if name not in _AUTOENCODERS:
        raise ValueError(
            f"{argument}={os.fspath(source)!r} holds {name or 'no autoencoder'}; supported are "
            f"{' and '.join(_AUTOENCODERS)}, or vae=None for a DiT on pixels."
        )
    return _load_model(_AUTOENCODERS[name], source, argument, subfolder, revision)


def _load_model(
    model_class: Any, source: str | os.PathLike, argument: str, subfolder: str, revision: str | None
) -> Any:
    """Load a diffusers model in the dtype of its file, `.safetensors` before `.bin`, every key accounted for."""
    prefix = f"{subfolder}/" if subfolder else ""
    for extension in ("safetensors", "bin"):
        patterns = [f"{prefix}diffusion_pytorch_model{part}.{extension}" for part in ("", "-*-of-*")]
        folder = fetch_folder(source, argument, patterns, revision)
        files = [file for pattern in patterns for file in folder.glob(pattern)]
        if files:
            break
    else:
        raise ValueError(
            f"{argument}={os.fspath(source)!r} has no weights: neither {prefix}diffusion_pytorch_model.safetensors "
            f"nor .bin."
        )
    try:
        model, info = model_class.from_pretrained(
            folder / subfolder,
            torch_dtype=_file_dtype(files),
            use_safetensors=extension == "safetensors",
            output_loading_info=True,
        )
    except Exception as error:  # a broken file raises whatever its reader raises
        raise ValueError(
            f"{argument}={os.fspath(source)!r} cannot be read as {model_class.__name__}: {unpickling_reason(error)}"
        ) from None
    # The earliest checkpoints may carry the position table, which is computed.
    unexpected = set(info["unexpected_keys"]) - {"pos_embed.pos_embed"}
    for fault, keys in (("lacks", info["missing_keys"]), ("has unexpected", unexpected)):
        if keys:
            raise ValueError(
                f"{argument}={os.fspath(source)!r} {fault} weights for {model_class.__name__}: "
                f"{', '.join(sorted(keys))}. Download it again, or correct its config.json."
            )
    return model


def unpickling_reason(error: Exception) -> str:
    """What torch refuses in a pickle; the rest of its message tells how to switch the protection off."""
    text = str(error)
    return text.rpartition("WeightsUnpickler error: ")[2].partition("\n")[0] if "weights_only" in text else text


def _file_dtype(files: list[Path]) -> torch.dtype:
    """The narrowest dtype that holds every weight of the files: diffusers would widen float16 to float32."""
    return reduce(torch.promote_types, (dtype for file in files for dtype in _dtypes_in(file)))


def _dtypes_in(file: Path) -> set[torch.dtype]:
    with file.open("rb") as opened:
        if opened.read(24).startswith(b"version https://git-lfs"):
            raise ValueError(f"{file.name} is a pointer of git-lfs, not the weights. Run `git lfs pull` there.")
    names = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    try:
        if file.suffix != ".safetensors":
            return {tensor.dtype for tensor in torch.load(file, map_location="meta", weights_only=True).values()}
        with safe_open(file, framework="pt") as weights:
            found = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    except Exception as error:  # a broken file raises whatever its reader raises
        raise ValueError(f"{file.name} cannot be read ({unpickling_reason(error)}). Download it again.") from None
    if others := found - names.keys():
        raise ValueError(f"{file.name} has weights in {', '.join(sorted(others))}; {', '.join(names)} are supported.")
    return {names[name] for name in found}
