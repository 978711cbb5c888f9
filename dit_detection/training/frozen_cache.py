"""What the frozen part of a detector makes of each image, computed once and kept on disk."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from datasets.arrow_writer import ArrowWriter
from torch import Tensor
from torch.utils import data
from tqdm import tqdm

from ..data import DetectionDataset, collate_detection
from ..model.modeling_dit_detection import DiTForObjectDetection
from .frozen_dataset import FEATURES, FrozenDataset
from .frozen_key import frozen_key

logger = logging.getLogger(__name__)

# A shard is what an interruption loses at most, and what one process writes at a time.
SHARD_BYTES = 256 * 2**20


def cache_frozen(
    model: DiTForObjectDetection,
    dataset: DetectionDataset,
    *,
    dtype: torch.dtype = torch.float32,
    cache_dir: str | Path | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
) -> FrozenDataset:
    """
    Run all views of a data set through the frozen part of a detector, or find them on disk from an earlier run.

    Whatever they depend on (weights, data, image processor, augmentation, seed, views, precision) is in the name of
    their folder, so a change of any is never served what is stale. Every process of an `accelerate launch` writes its
    share of the shards; an interrupted run goes on with the missing ones.

    Args:
        model ([`DiTForObjectDetection`]): On the device that computes. Its latent encoder is frozen, and the blocks
            that `freeze_backbone` froze.
        dataset ([`DetectionDataset`]): With `num_views`, if it augments.
        dtype (`torch.dtype`): Of what is stored; below float32 it is also computed under autocast to that type.
        cache_dir (`str` or `Path`, *optional*): Shared by all processes; by default a folder of the cache of
            `datasets` (`HF_DATASETS_CACHE`).
        batch_size (`int`): Images at a time.
        num_workers (`int`): Processes that read and augment images.

    Raises:
        ValueError: Nothing is frozen, the image processor has no fixed canvas, or `num_views` is missing.
        OSError: The disk cannot hold it.
    """
    num_views = _num_views(dataset)
    shape, num_frozen_layers = states_shape(model, dataset.image_processor)
    if cache_dir is None:
        cache_dir = Path(datasets.config.HF_DATASETS_CACHE) / "dit_detection_frozen"
    folder = Path(cache_dir) / frozen_key(model, num_frozen_layers, dataset, num_views, dtype)

    bytes_per_row = int(np.prod(shape)) * dtype.itemsize
    num_rows = num_views * len(dataset)
    rows_per_shard = max(1, SHARD_BYTES // bytes_per_row)
    starts = range(0, num_rows, rows_per_shard)
    # The count is in the name: shards of another size are other shards.
    shards = [folder / f"{start:08d}-of-{num_rows:08d}-by-{rows_per_shard}.arrow" for start in starts]
    sizes = [min(rows_per_shard, num_rows - start) for start in starts]
    missing = [index for index in range(len(shards)) if not _is_whole(shards[index], sizes[index])]

    state = PartialState()
    # All must have looked before one writes: from different lists they would share the work out differently.
    state.wait_for_everyone()
    if missing:
        _check_disk(folder, sum(sizes[index] for index in missing) * bytes_per_row, num_rows * bytes_per_row)
        mine = missing[state.process_index :: state.num_processes]
        batches = [
            list(range(first, min(first + batch_size, starts[index] + sizes[index])))
            for index in mine
            for first in range(starts[index], starts[index] + sizes[index], batch_size)
        ]
        loader = data.DataLoader(
            _Views(dataset),
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate_detection,
            # It draws a seed. Not from the global one: training is the same whether the cache was there or not.
            generator=torch.Generator(),
        )
        progress = tqdm(
            loader, desc="Caching the frozen part", unit="batch", disable=not state.is_local_main_process, leave=False
        )
        encoded = _encode(model, iter(progress), dtype)
        for index in mine:
            _write_shard(shards[index], sizes[index], encoded)
    state.wait_for_everyone()
    lost = [shard for shard in shards if not shard.is_file()]
    if lost:
        raise OSError(
            f"{lost[0]} was written by another process, but is not here. With several machines the cache folder must "
            "be one that all of them see: name it with frozen_cache_dir."
        )
    return FrozenDataset(shards, shape, dtype, num_frozen_layers, num_views)


def states_shape(model: DiTForObjectDetection, image_processor: Any) -> tuple[tuple[int, ...], int]:
    """
    Shape of what the frozen part makes of one image, and the number of blocks it stands for.

    Raises:
        ValueError: If nothing is frozen, or the image processor has no fixed canvas.
    """
    height, width = canvas_of(image_processor)
    config = model.config
    num_frozen_layers = model.model.backbone.num_frozen_layers()
    stride: int = config.token_stride
    rows, columns = -(-height // stride), -(-width // stride)
    if num_frozen_layers:
        return config.frozen_states_shape(num_frozen_layers, rows, columns), num_frozen_layers
    if config.latent_encoder is None:
        raise ValueError("Nothing of this model is frozen that could be cached. Freeze blocks with --freeze_layers.")
    patch: int = config.patch_size
    return (config.in_channels, rows * patch, columns * patch), 0


def canvas_of(image_processor: Any) -> tuple[int, int]:
    """
    (height, width) of what an image processor makes of every image.

    Raises:
        ValueError: If that depends on the image.
    """
    canvas = getattr(image_processor, "pad_size", None) or image_processor.size
    height = canvas.get("height") or canvas.get("max_height")
    width = canvas.get("width") or canvas.get("max_width")
    if not (height and width and image_processor.do_pad):
        raise ValueError(
            f"This needs images of one size, but the image processor's size is {image_processor.size}: give it a "
            "fixed canvas, such as size=512, and do_pad=True."
        )
    return height, width


class _Views(data.Dataset[dict[str, Any]]):
    """All views of a data set in a row, view by view."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, position: int) -> dict[str, Any]:
        view, index = divmod(position, len(self.dataset))
        return self.dataset.get_view(index, view)


def _num_views(dataset: DetectionDataset) -> int:
    if not isinstance(dataset, DetectionDataset):
        raise ValueError(
            f"Frozen states are cached of a DetectionDataset, not of a {type(dataset).__name__}: what is streamed or "
            "made by other code has no numbered views."
        )
    if dataset.augmentation is None:
        return 1
    if dataset.num_views is None:
        raise ValueError(
            "An augmented data set shows another view in every epoch, and not all can be cached: give "
            "DetectionDataset num_views, the number of views per image that training shall see."
        )
    return dataset.num_views


def _encode(
    model: DiTForObjectDetection, batches: Iterator[dict[str, Any]], dtype: torch.dtype
) -> Iterator[tuple[Tensor, Any]]:
    """The states and labels of each image in turn."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    try:
        for batch in batches:
            with autocast:
                encoded = model.model.encode_frozen(batch["pixel_values"].to(device))
            states = encoded["latents"] if "latents" in encoded else encoded["frozen_states"]
            states = states.to("cpu", dtype)
            if not states.isfinite().all():
                raise ValueError(
                    f"The frozen part gives values that {dtype} cannot hold. Train in bf16 or in float32 instead."
                )
            yield from zip(states, batch["labels"], strict=True)
    finally:
        model.train(was_training)


def _write_shard(path: Path, num_rows: int, encoded: Iterator[tuple[Tensor, Any]]) -> None:
    """Write the next rows to a file of their own, which has its name only once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".unfinished-{os.getpid()}")
    try:
        with ArrowWriter(features=FEATURES, path=str(unfinished), writer_batch_size=16) as writer:
            for _, (states, labels) in zip(range(num_rows), encoded, strict=False):
                stored = {name: labels[name].tolist() for name in FEATURES["labels"]}
                writer.write({"states": states.contiguous().view(torch.uint8).numpy().tobytes(), "labels": stored})
            writer.finalize()
        # A run beside this one may have written the shard in the meantime and taken this file for a leftover.
        if unfinished.exists() or not path.is_file():
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    for leftover in path.parent.glob(f"{path.stem}.unfinished-*"):  # of runs that were killed
        leftover.unlink(missing_ok=True)


def _is_whole(shard: Path, num_rows: int) -> bool:
    if not shard.is_file():
        return False
    try:
        return len(datasets.Dataset.from_file(str(shard))) == num_rows
    except (OSError, ValueError):  # pyarrow's errors are either
        logger.warning("%s is damaged and is written again.", shard)
        return False


def _check_disk(folder: Path, num_missing_bytes: int, num_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    logger.info(
        "The frozen part of the model is computed once and kept in %s: %.2f GB, %.2f GB of it still to be written.",
        folder,
        num_bytes / 1e9,
        num_missing_bytes / 1e9,
    )
    if num_missing_bytes * 1.02 > free:
        raise OSError(
            f"The frozen states take {num_missing_bytes / 1e9:.2f} GB, but {folder} has {free / 1e9:.2f} GB free. "
            "Cache fewer views (--num_views) or a smaller canvas (--image_size), name another disk "
            "(--frozen_cache_dir), or train without --cache_frozen."
        )
