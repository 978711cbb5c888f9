"""A Trainer that loses nothing: its checkpoints are whole or not there, and it goes on from any of them."""

import logging
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError
from torch import nn
from transformers import EarlyStoppingCallback, TrainerState
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
    has_optimizer,
    last_whole_checkpoint,
    publish_checkpoint,
    rotate_checkpoints,
)
from .ema import EmaCallback, averages_in_place, holds_averages
from .fault_tolerant_trainer import FaultTolerantTrainer, TrainingStoppedError

logger = logging.getLogger(__name__)

# Of a folder with both, `from_pretrained` would load the adapter.
DETECTOR_FILES = (CONFIG_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
ADAPTER_FILES = (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME)


class SafeTrainer(FaultTolerantTrainer):
    """
    A `Trainer` whose runs survive what breaks them.

    Invariants: a folder `checkpoint-N` is whole, from the moment it is there; a checkpoint is deleted only after
    another has been written.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Where a checkpoint is being written.
        self._unfinished: Path | None = None

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
            TrainingStoppedError: As of [`FaultTolerantTrainer`].
            ValueError: The checkpoint is not whole, or is none; its optimizer is of other weights; or its run averages
                them, and this one does not.
            OSError: `args.output_dir` cannot be written to.
        """
        checkpoint = self._checkpoint_to_load(resume_from_checkpoint)
        if self.args.should_save:
            _prepare_run_dir(Path(str(self.args.output_dir)), is_new=checkpoint is None)
        # Whoever saves when a step has been taken finds it averaged.
        self.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, EmaCallback))
        return super().train(checkpoint, trial, ignore_keys_for_eval)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """
        As `Trainer`, which (5.23) forgets the best checkpoint of a run whose folder was moved, goes on with a run that
        ended within an epoch, and takes the steps of all passes through a stream for those of one.
        """
        found = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        file = Path(resume_from_checkpoint or "", TRAINER_STATE_NAME)
        if resume_from_checkpoint is None or not file.is_file():
            return found
        saved = TrainerState.load_from_json(str(file))
        if self.state.best_model_checkpoint is None and saved.best_model_checkpoint is not None:
            moved = Path(resume_from_checkpoint).parent / Path(saved.best_model_checkpoint).name
            self.state.best_model_checkpoint = str(moved) if moved.is_dir() else None
        has_stopped = any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )
        if has_stopped or self.state.global_step >= max_steps:
            return num_train_epochs, 0  # done
        if has_length(self.train_dataset):
            return found
        num_passes = int(saved.epoch or 0)
        share = 0.0 if self.args.ignore_data_skip else (saved.epoch or 0) - num_passes
        return num_passes, round(share * saved.max_steps * self.args.gradient_accumulation_steps)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As `Trainer`; says which rates are those of the checkpoint, and not those that are asked for."""
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        asked = self._rates_and_decays()
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise ValueError(
                f"The optimizer of {checkpoint} is of other weights, or of others together: {error}. Which weights "
                "train, and which at one rate, must be as in that run (--freeze_layers, --layer_decay, --lora_r), or "
                "begin anew in another output_dir; --model takes the weights along."
            ) from error
        averages = any(isinstance(callback, EmaCallback) for callback in self.callback_handler.callbacks)
        if holds_averages(self.optimizer) and not averages:
            raise ValueError(
                f"The run of {checkpoint} averages its weights: go on with --ema_decay, as it was begun. Without it "
                "begin anew in another output_dir; --model takes the averages along."
            )
        for restored, given in zip(self._rates_and_decays(), asked, strict=True):
            if restored != given:
                logger.warning(
                    "Training goes on with the learning rates and weight decays of %s, such as %s, and not with those "
                    "that are asked for, %s. For these begin anew in another output_dir; --model takes the weights "
                    "along.",
                    checkpoint,
                    restored,
                    given,
                )
                break

    def _rates_and_decays(self) -> list[tuple[float | None, float | None]]:
        """Of each group of weights; no rate where the schedule keeps none of before it began."""
        return [(group.get("initial_lr"), group.get("weight_decay")) for group in self.optimizer.param_groups]

    def _run_epoch(self, model: nn.Module, **kwargs: Any) -> None:
        """As `Trainer`; the pass before, through a stream, may have ended within a step, and left its gradients."""
        model.zero_grad()
        super()._run_epoch(model=model, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer`, of what is saved."""
        with averages_in_place(self.callback_handler.callbacks, self.optimizer):
            return super()._evaluate(*args, **kwargs)

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
            with averages_in_place(self.callback_handler.callbacks, self.optimizer):
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


def _prepare_run_dir(run_dir: Path, is_new: bool) -> None:
    """Fail before the work begins, and not after an epoch; remove what a killed run left unfinished."""
    try:
        shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)
        (run_dir / UNFINISHED).mkdir(parents=True)
        (run_dir / UNFINISHED).rmdir()
    except OSError as error:
        raise type(error)(f"{run_dir} cannot be written to: {error}. Give another output_dir.") from error
    earlier = checkpoints_of(run_dir)
    if is_new and earlier:
        logger.warning(
            "%s is of an earlier run. This one begins anew; until it has got further, --resume_from_checkpoint last "
            "goes on from the earlier one.",
            earlier[-1],
        )


def _checked(checkpoint: Path) -> Path:
    """A checkpoint that the user named; one of another trainer has no checksums, and is taken as it is."""
    if others := checkpoints_of(checkpoint):
        raise ValueError(
            f"{checkpoint} is the folder of a run, not a checkpoint: resume_from_checkpoint takes 'last', with that "
            f"output_dir, or one of its checkpoints, such as {others[-1]}."
        )
    has_sums = (checkpoint / CHECKSUMS).is_file()
    if not has_sums and not (has_optimizer(checkpoint) and (checkpoint / TRAINER_STATE_NAME).is_file()):
        raise ValueError(
            f"{checkpoint} is no checkpoint: {TRAINER_STATE_NAME} or the optimizer is missing. "
            "resume_from_checkpoint takes a folder checkpoint-N, or 'last'; --model takes weights alone."
        )
    if has_sums and (damage := damage_of(checkpoint)):
        raise ValueError(
            f"{checkpoint} is not whole: {damage}. resume_from_checkpoint='last' goes on from the last whole one."
        )
    return checkpoint
