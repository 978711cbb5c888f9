"""One optimizer step: its images are spread over processes and over the batches of gradient accumulation."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import DataLoader

from ..model.labels import pad_labels
from ..model.matcher import IGNORE

# What the shapes of a batch are read from.
INPUTS = ("pixel_values", "pixel_mask", "latents", "frozen_states")


def match_global_batch(
    model: Any, batches: list[dict[str, Any]], accelerator: Accelerator
) -> tuple[list[dict[str, Any]], Tensor]:
    """
    Match the anchors of this process's batches of a step, so that their number is known before the first is computed.

    Args:
        model ([`DiTForObjectDetection`]): None of its weights are read: they may be sharded.
        batches (`list[dict]`): At least one, of `collate_detection`.
        accelerator (`Accelerator`): Its data loader has just yielded the last of them.

    Returns:
        The batches, labels as rectangles with `matched_idxs`; and how many anchors are matched in them, `()`.
    """
    matched_batches = []
    for batch in batches:
        # Rectangles, because a compiled model then sees no new number of objects.
        labels = pad_labels(batch["labels"], model.config.num_labels)
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        labels["matched_idxs"] = model.match_anchors(labels, **inputs)
        matched_batches.append({**batch, "labels": labels})
    if accelerator.gradient_state.end_of_dataloader:
        last = matched_batches[-1]["labels"]["matched_idxs"]
        # The shape of all other batches, but no loss and no gradient.
        last[len(last) - num_repeated(accelerator.gradient_state.active_dataloader, len(last)) :] = IGNORE
    counts = [(batch["labels"]["matched_idxs"] >= 0).sum() for batch in matched_batches]
    return matched_batches, torch.stack(counts).sum()


def num_repeated(loader: DataLoader, batch_size: int) -> int:
    """
    How many images at the end of this process's last batch of an epoch the epoch had before.

    With several processes accelerate fills the last global batch up with the epoch's first images; a single process
    leaves it short. (A stream is filled up too, but nobody knows how long it was.)
    """
    shard: Any = loader.batch_sampler
    while shard is not None and not isinstance(shard, BatchSamplerShard):  # around it, one that skips batches
        shard = getattr(shard, "batch_sampler", None)
    if shard is None or shard.drop_last or not shard.even_batches:
        return 0
    num_left = len(shard.batch_sampler.sampler) % (shard.num_processes * batch_size)
    num_own = min(max(num_left - shard.process_index * batch_size, 0), batch_size)
    return batch_size - num_own if num_left else 0
