"""What the autoencoder makes of each view of each image, computed once and kept on disk."""

import hashlib
import json
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from ..weight_digest import digest_weights
from .image_views import Views

logger = logging.getLogger(__name__)

BATCH_SIZE = 8


class CachedLatents:
    """
    Views that went through the autoencoder already. Made by `cache_latents`.

    Args:
        path (`Path`): NumPy file `(V, images, C, h, w)` of float16.
    """

    def __init__(self, path: Path) -> None:
        self.latents = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return self.latents.shape[1]

    def get(self, index: int, epoch: int) -> Tensor:
        """Latents `(C, h, w)` of the view that the epoch shows: view e modulo V."""
        return torch.from_numpy(self.latents[epoch % len(self.latents), index].astype(np.float32))


@torch.no_grad()
def cache_latents(
    views: Views,
    vae: Any,
    *,
    num_views: int,
    key: dict[str, Any],
    device: torch.device,
    batch_size: int = BATCH_SIZE,
    cache_dir: str | Path | None = None,
) -> CachedLatents:
    """
    Encode the first views of all images, or find them on disk from an earlier run.

    The name of the file covers the autoencoder's weights and `key`. Every process of an `accelerate launch` encodes
    its share; an interrupted run begins again.

    Args:
        views (`Views`): Pixels.
        vae (`Any`): `AutoencoderKL` (of whose posterior the mode is taken, as the detector does) or `AutoencoderTiny`.
        num_views (`int`): Of each image.
        key (`dict`): All that the views depend on, as JSON.
        device (`torch.device`): Where to compute.
        batch_size (`int`): Images at a time.
        cache_dir (`str` or `Path`, *optional*): By default a folder of the cache of `datasets` (`HF_DATASETS_CACHE`).

    Raises:
        OSError: The disk cannot hold it.
    """
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "dit_detection_latents")
    path = folder / f"{_digest(vae, {**key, 'num_views': num_views, 'num_images': len(views)})}.npy"
    state = PartialState()
    # Another run may be at the same latents: its file is another, and all processes go by what one has seen.
    token, is_there = broadcast_object_list([secrets.token_hex(4), path.is_file()])
    unfinished = path.with_suffix(f".{token}.unfinished")
    if not is_there:
        vae = vae.to(device).eval()
        sample = encode_pixels(vae, views.get(0, 0)[None].to(device))
        shape = (num_views, len(views), *sample.shape[1:])
        if state.is_main_process:
            _reserve(unfinished, shape)
        state.wait_for_everyone()
        latents = np.load(unfinished, mmap_mode="r+")
        shares = range(state.process_index, len(views), state.num_processes)
        mine = [(view, index) for view in range(num_views) for index in shares]
        is_silent = not state.is_local_main_process
        for start in tqdm(range(0, len(mine), batch_size), "Encoding views", disable=is_silent, leave=False):
            places = mine[start : start + batch_size]
            pixels = torch.stack([views.get(index, view) for view, index in places]).to(device)
            for place, encoded in zip(places, encode_pixels(vae, pixels).cpu().numpy(), strict=True):
                latents[place] = encoded
        latents.flush()
        del latents
        state.wait_for_everyone()
        if state.is_main_process:
            if not path.is_file():  # or the other run was first; it may be reading its own
                unfinished.replace(path)
            for leftover in folder.glob(f"{path.stem}.*.unfinished"):  # this run's, and those of runs that were killed
                leftover.unlink(missing_ok=True)
        vae.to("cpu")
    state.wait_for_everyone()
    return CachedLatents(path)


def encode_pixels(vae: Any, pixels: Tensor) -> Tensor:
    """8-bit pixels `(B, 3, H, W)` → latents, shifted and scaled as a DiT knows them."""
    encoded = vae.encode((pixels.float() / 127.5 - 1).to(vae.dtype))
    mode = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return ((mode - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor).float()


def _digest(vae: Any, key: dict[str, Any]) -> str:
    # Without what diffusers notes of defaults, a set: its order is another one in every process.
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    digest = hashlib.blake2b(json.dumps({**key, "vae": config}, sort_keys=True, default=str).encode(), digest_size=16)
    digest_weights(digest, vae.state_dict().items())
    return digest.hexdigest()


def _reserve(path: Path, shape: tuple[int, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    num_bytes, free = 2 * int(np.prod(shape)), shutil.disk_usage(path.parent).free
    logger.info(
        "The latents of %d views of %d images are kept in %s: %.2f GB.", *shape[:2], path.parent, num_bytes / 1e9
    )
    advice = "Keep fewer views (--num_views), or let HF_DATASETS_CACHE name another disk."
    if num_bytes * 1.02 > free:
        raise OSError(
            f"The latents take {num_bytes / 1e9:.2f} GB, but {path.parent} has {free / 1e9:.2f} GB free. {advice}"
        )
    np.lib.format.open_memmap(os.fspath(path), mode="w+", dtype=np.float16, shape=shape).flush()
    if not hasattr(os, "posix_fallocate"):
        return
    # The file has its length, but no room yet: on a disk that fills up later, writing to it would kill the process.
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink()
        raise OSError(f"{path.parent} has no room for the latents: {error}. {advice}") from error
