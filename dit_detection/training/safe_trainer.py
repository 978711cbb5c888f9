"""A Trainer that loses nothing: whole checkpoints or none, and faults that end a run with what was reached on disk."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy, TrainOutput, has_length
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from .checkpoint_files import (
    CHECKSUMS,
    UNFINISHED,
    checkpoints_of,
    damage_of,
    last_whole_checkpoint,
    publish_checkpoint,
    rotate_checkpoints,
)
from .ema import EmaCallback
from .sharded import ShardedTrainer

logger = logging.getLogger(__name__)

# Of a folder with both, `from_pretrained` would load the adapter.
DETECTOR_FILES = (CONFIG_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
ADAPTER_FILES = (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME)

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


class SafeTrainer(ShardedTrainer):
    """
    A `Trainer` whose runs survive what breaks them.

    Invariants: a folder `checkpoint-N` is whole, from the moment it is there; a checkpoint is deleted only after
    another has been written; the weights never take a step that is not finite.

    When a step cannot be computed, the checkpoint of the last good one is saved first. With several processes that is
    so for losses that are not finite, of which all hear together; after other faults the last regular checkpoint is
    what is there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_BeforeUpdate(self._check_update))
        # Where a checkpoint is being written.
        self._unfinished: Path | None = None
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

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): Folder of a checkpoint; or `True`, the last whole one
                in `args.output_dir`; or `"last"`, the same, but to begin anew if there is none yet.
            trial, ignore_keys_for_eval (*optional*): As of `Trainer.train`.

        Raises:
            TrainingStoppedError: A loss is not finite, memory or disk do not suffice, an image cannot be read, or a
                process that reads them died.
            ValueError: The checkpoint is not whole.
            OSError: The folder for checkpoints cannot be written to.
        """
        checkpoint = self._checkpoint_to_load(resume_from_checkpoint)
        if self.args.should_save and self.args.save_strategy != "no":
            _prepare_run_dir(Path(str(self.args.output_dir)), is_new=checkpoint is None)
        self._good_step, self._reads_batches = None, False
        try:
            return super().train(checkpoint, trial, ignore_keys_for_eval)
        except Exception as error:
            kept = self._keep_good_step(error, trial)
            reason = self._reason(error)
            if reason is None:
                if kept:
                    logger.error(kept)
                raise
            stopped = NonFiniteLossError if isinstance(error, NonFiniteLossError) else TrainingStoppedError
            raise stopped(f"{reason} {kept}".strip()) from error

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """As `Trainer`, which takes the steps of all passes through a stream for those of one (5.23)."""
        found = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        file = Path(resume_from_checkpoint or "", TRAINER_STATE_NAME)
        if resume_from_checkpoint is None or has_length(self.train_dataset) or not file.is_file():
            return found
        if self.state.global_step >= max_steps:
            return num_train_epochs, 0  # done
        saved = TrainerState.load_from_json(str(file))
        num_passes = int(saved.epoch or 0)
        share = 0.0 if self.args.ignore_data_skip else (saved.epoch or 0) - num_passes
        return num_passes, round(share * saved.max_steps * self.args.gradient_accumulation_steps)

    def _run_epoch(self, model: nn.Module, **kwargs: Any) -> None:
        """As `Trainer`; the pass before, through a stream, may have ended within a step, and left its gradients."""
        model.zero_grad()
        super()._run_epoch(model=model, **kwargs)

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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As `Trainer`, but aside, and with its own name only once all processes have written their part."""
        run_dir = Path(self._get_output_dir(trial))
        unfinished = run_dir / UNFINISHED
        folder = unfinished / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._unfinished = unfinished
            super()._save_checkpoint(model, trial)
            self._unfinished = None
            # Trainer names it where it was written; a run that is gone on with may have moved.
            best = run_dir / Path(self.state.best_model_checkpoint or folder).name
            if self.state.best_model_checkpoint is not None and (best.name == folder.name or best.is_dir()):
                self.state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
                keep = {path for path in (publish_checkpoint(folder), best) if path.is_dir()}
                rotate_checkpoints(run_dir, self.args.save_total_limit, keep)
                shutil.rmtree(unfinished, ignore_errors=True)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            if should_reduce_batch_size(error):
                raise
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise TrainingStoppedError(
                f"{run_dir / folder.name} could not be written: {error}. Make room on the disk, or see to it that the "
                "folder can be written to."
            ) from error
        finally:
            self._unfinished = None

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As `Trainer`, of the weights that are saved: if the best are to be loaded at the end, others cannot be."""
        saves = self.control.should_save or self.args.save_strategy == SaveStrategy.BEST
        if self.args.load_best_model_at_end and not saves:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As `Trainer`; a detector of an earlier run goes where an adapter is saved, and the other way round."""
        super()._save(output_dir, state_dict)
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        for name in DETECTOR_FILES if hasattr(self.model, "peft_config") else ADAPTER_FILES:
            if self.args.should_save:
                (folder / name).unlink(missing_ok=True)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _checkpoint_to_load(self, wanted: str | bool | None) -> str | None:
        """The folder to go on from, if any; every process gets what the first one found."""
        found: list[Any] = [None, None]
        if wanted and self.is_world_process_zero():
            run_dir = Path(str(self.args.output_dir))
            try:
                if wanted is True or wanted == "last":
                    found[0] = last_whole_checkpoint(run_dir)
                    if found[0] is None and wanted is True:
                        raise ValueError(f"There is no checkpoint in {run_dir} to resume from.")
                else:
                    found[0] = _checked(Path(wanted))
            except ValueError as error:
                found[1] = str(error)
        broadcast_object_list(found)
        checkpoint, fault = found
        if fault is not None:
            raise ValueError(fault)
        return None if checkpoint is None else str(checkpoint)

    def _keep_good_step(self, error: Exception, trial: Any) -> str:
        """Save what was reached before a step failed, where it can be; a sentence on where it is."""
        if self.args.save_strategy == "no" or trial is not None:
            return ""
        run_dir = Path(self._get_output_dir(trial))
        step, self._good_step = self._good_step, None
        if step and (self.args.world_size == 1 or isinstance(error, NonFiniteLossError)):
            try:
                for callback in self.callback_handler.callbacks:
                    if isinstance(callback, EmaCallback):  # checkpoints hold the averages in the place of the weights
                        callback.on_epoch_end(
                            self.args, self.state, TrainerControl(should_save=True), optimizer=self.optimizer
                        )
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


def _prepare_run_dir(run_dir: Path, is_new: bool) -> None:
    """Fail before the work begins, and not after an epoch; remove what a killed run left unfinished."""
    try:
        shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)
        (run_dir / UNFINISHED).mkdir(parents=True)
        (run_dir / UNFINISHED).rmdir()
    except OSError as error:
        raise type(error)(f"Checkpoints cannot be written to {run_dir}: {error}. Give another output_dir.") from error
    earlier = checkpoints_of(run_dir)
    if is_new and earlier:
        logger.warning(
            "%s is of an earlier run. This one begins anew; until it has got further, --resume_from_checkpoint last "
            "goes on from the earlier one.",
            earlier[-1],
        )


def _checked(checkpoint: Path) -> Path:
    """A checkpoint that the user named; one of another trainer has no checksums, and is taken as it is."""
    damage = damage_of(checkpoint) if (checkpoint / CHECKSUMS).is_file() else None
    if damage is not None:
        raise ValueError(
            f"{checkpoint} is not whole: {damage}. resume_from_checkpoint='last' goes on from the last whole one."
        )
    return checkpoint


def _as_json(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)
