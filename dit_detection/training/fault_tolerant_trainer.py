"""A Trainer that faults end with a message that says what to do, and with what was reached on disk."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput, has_length

from .checkpoint_files import checkpoints_of
from .sharded import ShardedTrainer

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = (
    "Out of memory: {error} Lower --per_device_train_batch_size (raise --gradient_accumulation_steps by as much, and "
    "the steps stay the same), --per_device_eval_batch_size or --image_size; recompute what the backward pass needs "
    "(--gradient_checkpointing True); or train less of the model (--freeze_layers, --lora_r)."
)
WORKER_DIED = (
    "A process that reads images died: {error} Often memory was short: lower --dataloader_num_workers or "
    "--per_device_train_batch_size."
)


class TrainingStoppedError(RuntimeError):
    """Training cannot go on. The message says why, what to do, and where what was reached is kept."""


class NonFiniteLossError(TrainingStoppedError):
    """The loss or its gradient is infinite or not a number; the weights are those before the step."""


class FaultTolerantTrainer(ShardedTrainer):
    """
    A `Trainer` whose weights never take a step that is not finite, and that saves what a fault would lose.

    When a step cannot be computed, the checkpoint of the last good one is saved first. With several processes that is
    so for losses that are not finite, of which all hear together; after other faults the last regular checkpoint is
    what is there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_BeforeUpdate(self._check_update))
        # The step that weights and optimizer are of, while they are of one that is done with.
        self._good_step: int | None = None
        self._reads_batches = False
        # Of the batches of a step.
        self._image_ids: list[list[Tensor]] = []
        self._losses: list[Tensor] = []

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        As `Trainer.train`.

        Raises:
            TrainingStoppedError: A loss is not finite, memory or disk do not suffice, an image cannot be read, or a
                process that reads them died.
        """
        self._good_step, self._reads_batches = None, False
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except Exception as error:
            kept = self._keep_good_step(error, trial)
            reason = self._reason(error)
            if reason is None:
                if kept:
                    logger.error(kept)
                raise
            stopped = NonFiniteLossError if isinstance(error, NonFiniteLossError) else TrainingStoppedError
            raise stopped(f"{reason} {kept}".strip()) from error

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        """
        As `Trainer`; no image is left out of an evaluation.

        Raises:
            ValueError: There is no batch to train on, of which Trainer (5.23) makes a training without a step.
        """
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last
        if is_training and has_length(loader) and len(loader) == 0:
            raise ValueError(
                f"{len(loader.dataset)} images make no batch of {self._train_batch_size * self.args.world_size}, and "
                "--dataloader_drop_last takes no smaller ones. Leave it out, or lower --per_device_train_batch_size."
            )
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """As `Trainer.get_batch_samples`; remembers which images they are."""
        self._good_step, self._reads_batches = self.state.global_step, True
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._reads_batches = False
        self._losses = []
        self._image_ids = [
            [labels["image_id"] for labels in batch.get("labels", []) if "image_id" in labels] for batch in batches
        ]
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As `Trainer.training_step`; remembers the loss."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        return loss

    def _check_update(self, model: nn.Module) -> None:
        """Called with the gradients of a step, before the weights change."""
        losses = torch.stack(self._losses)
        norm = losses.new_zeros(())
        if self.accelerator.scaler is None:  # which leaves out by itself the steps whose gradients overflow
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            parts = [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients]
            norm = torch.nn.utils.get_total_norm(parts)
        is_finite = losses.isfinite().all() & norm.isfinite()
        if self.args.world_size > 1:
            is_finite = self.accelerator.reduce(is_finite.float(), "sum") == self.args.world_size
        if not is_finite:
            raise self._non_finite(losses.tolist(), norm.item())
        self._good_step = None

    def _non_finite(self, losses: list[float], norm: float) -> NonFiniteLossError:
        """Save which images the batches of this step have, in all processes, and tell."""
        step = self.state.global_step + 1
        details = {
            "image_ids": gather_object([[int(image_id) for image_id in batch] for batch in self._image_ids]),
            "losses": [_as_json(loss) for loss in gather_object(losses)],
            "gradient_norm": _as_json(norm),
            "learning_rate": self._get_learning_rate(),
            "step": step,
        }
        path = Path(str(self.args.output_dir)) / f"not_finite_step_{step}.json"
        if self.is_world_process_zero():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(details, indent=2) + "\n", encoding="utf-8")
        image_ids = [image_id for batch in details["image_ids"] for image_id in batch]
        return NonFiniteLossError(
            f"Step {step} is not finite: loss {sum(losses):.4g}, gradient {norm:.4g}; images {image_ids}, see {path}. "
            "The weights did not take it. If `dit-detect check` and `preview` find nothing wrong with these images, "
            "train anew with a lower --learning_rate (from the weights below: --model FOLDER), or in float32."
        )

    def _keep_good_step(self, error: Exception, trial: Any) -> str:
        """Save what was reached before a step failed, where it can be; a sentence on where it is."""
        if self.args.save_strategy == "no" or trial is not None:
            return ""
        run_dir = Path(self._get_output_dir(trial))
        step, self._good_step = self._good_step, None
        if step and (self.args.world_size == 1 or isinstance(error, NonFiniteLossError)):
            try:
                self._save_checkpoint(self.model, trial)
                checkpoint = run_dir / f"checkpoint-{step}"
                return (
                    f"All {step} steps before are kept: {checkpoint}; --resume_from_checkpoint last goes on from it."
                )
            except Exception as second:  # the first one is what stopped the training
                logger.warning("What was reached could not be saved: %s", second)
        return "--resume_from_checkpoint last goes on from the last checkpoint." if checkpoints_of(run_dir) else ""

    def _reason(self, error: Exception) -> str | None:
        """What to tell of a fault that is not one of the program; `None` of others."""
        text = str(error)
        if isinstance(error, TrainingStoppedError):
            return text
        if isinstance(error, MemoryError) or should_reduce_batch_size(error):
            return OUT_OF_MEMORY.format(error=text.partition("\n")[0])
        if isinstance(error, RuntimeError) and "DataLoader worker" in text:
            return WORKER_DIED.format(error=text.partition("\n")[0].strip())
        if self._reads_batches and isinstance(error, (OSError, ValueError)):
            # From another process it comes with that one's traceback in front.
            return text.rpartition(f"\n{type(error).__name__}: ")[2].strip()
        return None


class _BeforeUpdate(TrainerCallback):
    def __init__(self, check: Callable[[nn.Module], None]) -> None:
        self.check = check

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.check(kwargs["model"])


def _as_json(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)
