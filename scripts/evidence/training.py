"""The plain loop that trains the detectors of others: optimizer, warm-up and cosine, averages of the weights."""

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from dit_detection import DetectionDataset, collate_detection
from dit_detection.data.transforms import make_generator

from .machine import Machine, Spent, Stopwatch
from .settings import Settings

WARMUP = 0.05  # of the budget, as of DetectionTrainingArguments


def rate_at(share: float) -> float:
    """The learning rate after a share of the budget, relative to its peak: a line up, half a cosine down to 0."""
    if share < WARMUP:
        return share / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (share - WARMUP) / (1 - WARMUP))))


def make_optimizer(model: nn.Module, training: dict[str, Any]) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW; vectors (biases, norms) are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": training["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    if training["optimizer"] == "sgd":
        return torch.optim.SGD(groups, lr=training["learning_rate"], momentum=0.9)
    return torch.optim.AdamW(groups, lr=training["learning_rate"])


def train_baseline(
    model: nn.Module, dataset: DetectionDataset, settings: Settings, machine: Machine, minutes: float | None = None
) -> Spent:
    """
    Train until the budget is used up; the model ends with its last weights, averaged as ours are.

    The learning rate follows the share of the budget that is used, so that either budget gets a whole schedule.

    Args:
        model (`nn.Module`): Gives the loss of a batch.
        dataset ([`DetectionDataset`]): What ours trains on.
        minutes (`float`, *optional*): By `machine.clock`. By default the budget is `settings.passes`.

    Raises:
        RuntimeError: The loss is not finite.
    """
    model.to(machine.device).train()
    model.to(memory_format=torch.channels_last)  # in which convolutions are faster
    batch_size = min(settings.batch_size, len(dataset))
    loader = DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=machine.num_workers,
        persistent_workers=machine.num_workers > 0,
        collate_fn=collate_detection,
        generator=make_generator(settings.seed),
    )
    optimizer = make_optimizer(model, settings.training)
    averages = copy.deepcopy(model) if settings.ema_decay is not None else None
    num_steps = max(1, settings.passes // batch_size)
    watch, step = Stopwatch(), 0
    for batch in _endless(loader):
        spent = watch.spent(step * batch_size)
        share = step / num_steps if minutes is None else getattr(spent, machine.clock) / minutes
        if share >= 1 and step > 0:
            break
        for group in optimizer.param_groups:
            # Not 0 in the first step, which would be none.
            group["lr"] = settings.training["learning_rate"] * max(rate_at(share), 1e-3)
        batch["pixel_values"] = batch["pixel_values"].to(machine.device)
        with torch.autocast(machine.device, torch.bfloat16) if machine.bf16 else nullcontext():
            loss = model(batch)
        if not loss.isfinite():
            raise RuntimeError(f"The loss of step {step} is {loss.item()}: lower the learning rate.")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.training["max_grad_norm"])
        optimizer.step()
        step += 1
        if averages is not None and settings.ema_decay is not None:
            update_averages(averages, model, min(settings.ema_decay, (1 + step) / (10 + step)))
    if averages is not None:
        model.load_state_dict(averages.state_dict())
    return watch.spent(step * batch_size)


def _endless(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """Epoch after epoch, each in its own views."""
    for epoch in itertools.count():
        loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        yield from loader


@torch.no_grad()
def update_averages(averages: nn.Module, model: nn.Module, decay: float) -> None:
    """`averages = decay * averages + (1 - decay) * weights`, running statistics of batch norms included."""
    current = model.state_dict()
    for name, average in averages.state_dict().items():
        if average.is_floating_point():
            average.lerp_(current[name], 1 - decay)
        else:
            average.copy_(current[name])
