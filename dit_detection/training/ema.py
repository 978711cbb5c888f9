"""Moving averages of the trained weights, which are evaluated, saved and kept in their place."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# In the optimizer's state, beside Adam's own averages: checkpoints then hold it like them.
_SLOT = "ema"


class EmaCallback(TrainerCallback):
    """
    Averages the trained weights over the steps, `ema = decay * ema + (1 - decay) * weights`.

    The averages take the place of the weights while the model is evaluated and saved, for which [`SafeTrainer`] sees
    to it with [`averages_in_place`] that it does not matter who asks and when, and when training ends; so
    `model.safetensors` of a checkpoint are averages, the best checkpoint is the one whose averages are best, and
    training goes on from the weights themselves, which are in the checkpoint's optimizer state. Each process averages
    the same weights to the same values. What is frozen is left out.

    Args:
        decay (`float`): Share of the averages that each step keeps. In the first steps less is kept,
            `(1 + step) / (10 + step)`, so that the initial weights are soon forgotten.

    Raises:
        ValueError: If `decay` is not between 0 and 1; when training begins, if the weights are sharded over processes;
            after the first step, if the optimizer keeps no state.

    Source: Polyak averaging; the warm-up is that of TensorFlow's `ExponentialMovingAverage`.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay={decay} must lie between 0 and 1, such as 0.999.")
        self.decay = decay
        # Whether the model holds the averages, and the optimizer's state the weights.
        self.is_swapped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the averages of a checkpoint, or begin anew."""
        if state.global_step == 0:
            for values in kwargs["optimizer"].state.values():
                values.pop(_SLOT, None)
        self.is_swapped = holds_averages(kwargs["optimizer"])

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from the weights themselves, of which a checkpoint has the averages in the model."""
        if self.is_swapped:
            self.swap(kwargs["optimizer"])

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average."""
        if not args.fp16 and not _states(kwargs["optimizer"]):  # float16 may have left the step out
            raise ValueError(
                f"ema_decay={self.decay} needs an optimizer that keeps a state, which holds the averages: "
                f"optim={args.optim.value!r} has none. Take adamw_torch, or leave ema_decay out."
            )
        averages, weights = [], []
        for weight, values in _states(kwargs["optimizer"]):
            if _SLOT in values:
                averages.append(values[_SLOT])
                weights.append(weight)
            else:
                values[_SLOT] = weight.detach().clone()
        if averages:
            decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
            get_ema_multi_avg_fn(decay)(averages, weights, None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the averages in the model, unless those of the best checkpoint have just been loaded."""
        has_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if not has_best and not self.is_swapped:
            self.swap(kwargs["optimizer"])

    @torch.no_grad()
    def swap(self, optimizer: Any) -> None:
        """Exchange the weights of the model and what the optimizer's state holds of them."""
        for weight, values in _states(optimizer):
            if _SLOT in values:
                # Copied, not exchanged: a compiled or distributed model keeps the addresses of its weights.
                before = weight.detach().clone()
                weight.copy_(values[_SLOT])
                values[_SLOT].copy_(before)
        self.is_swapped = not self.is_swapped


def holds_averages(optimizer: Any) -> bool:
    """Whether the optimizer's state has the averages of a run, or while these are in the model, its weights."""
    return any(_SLOT in values for values in optimizer.state.values())


@contextmanager
def averages_in_place(callbacks: Iterable[TrainerCallback], optimizer: Any) -> Iterator[None]:
    """
    While this lasts the model has the averages, if any are made of it; then again what it had.

    Args:
        callbacks (`Iterable[TrainerCallback]`): Of the trainer; those that average are [`EmaCallback`].
        optimizer (`torch.optim.Optimizer`): Of the trainer.
    """
    swapped = [one for one in callbacks if isinstance(one, EmaCallback) and not one.is_swapped]
    for callback in swapped:
        callback.swap(optimizer)
    try:
        yield
    finally:
        for callback in swapped:
            callback.swap(optimizer)


def _states(optimizer: Any) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """
    Each trained weight with its state.

    Left out are those without: an optimizer sets up what is empty at the weight's first gradient, until which the
    weight is its own average.
    """
    return [(weight, values) for weight, values in optimizer.state.items() if values]
