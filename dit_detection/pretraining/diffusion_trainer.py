"""The HF Trainer for diffusion pretraining: moving averages, a comparable held-out loss, samples as it goes."""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput

from ..data import EpochCallback
from ..training.ema import EmaCallback
from ..training.safe_trainer import SafeTrainer
from .diffusion_model import DiffusionModel
from .sampling import sample_grid, sample_images

logger = logging.getLogger(__name__)

NUM_SAMPLES = 8
SAMPLING_STEPS = 25


@dataclass
class PretrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with defaults that are right for pretraining.

    Args:
        ema_decay (`float`): Of the moving averages of the weights, which are evaluated, sampled from and saved; 0 for
            none.
        save_samples (`bool`): Write a picture of samples at each evaluation.
    """

    ema_decay: float = field(default=0.999, metadata={"help": "Of the moving averages that are saved. 0: off."})
    save_samples: bool = field(default=True, metadata={"help": "Write a picture of samples at each evaluation."})

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.02, metadata={"help": "Steps (1 or more) or share of all steps (below 1)."})
    max_steps: int = field(default=20_000, metadata={"help": "Optimizer steps."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to measure the loss and to draw samples."})
    eval_steps: float | None = field(default=0.1, metadata={"help": "Steps, or share of all steps (below 1)."})
    save_strategy: str = field(default="steps", metadata={"help": "When to save a checkpoint."})
    save_steps: float = field(default=0.1, metadata={"help": "Steps, or share of all steps (below 1)."})
    logging_steps: float = field(default=0.01, metadata={"help": "Steps, or share of all steps (below 1)."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept."})
    # A step that is not finite ends the training; to look at every loss once more would cost time.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Not needed: such steps are not taken."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: there are none."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Not needed: all are used."})


class DiffusionTrainer(SafeTrainer):
    """
    Trains a [`DiffusionModel`] on [`NoisedViews`]; evaluates on [`FixedNoise`].

    Args:
        model (`DiffusionModel`), args (`PretrainingArguments`): As of `Trainer`.
        vae (`Any`): What turns sampled latents into pixels; `None` for a DiT on pixels.
        kwargs: Of `Trainer`.
    """

    def __init__(self, model: DiffusionModel, args: PretrainingArguments, *, vae: Any, **kwargs: Any) -> None:
        super().__init__(model, args, data_collator=default_collate, **kwargs)
        self.vae = vae
        self._started: float | None = None
        self._minutes_before: float | None = None
        self.add_callback(EpochCallback())
        if args.ema_decay:
            self.add_callback(EmaCallback(args.ema_decay))
        if args.device.type == "cpu" and args.bf16:
            # torch's fused attention has no bf16 kernels for CPUs.
            for block in model.transformer.transformer_blocks:
                block.attn1.set_processor(AttnProcessor())

    @property
    def samples_dir(self) -> Path:
        """Where pictures of samples go."""
        return Path(str(self.args.output_dir)) / "samples"

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`."""
        self._started, self._minutes_before = time.monotonic(), None
        try:
            return super().train(*args, **kwargs)
        finally:
            self._started = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; while training, with the minutes so far, those before an interruption included."""
        if self._started is not None:
            if self._minutes_before is None:
                # The history of a run that goes on is that of its checkpoint.
                self._minutes_before = (self.state.log_history or [{}])[-1].get("minutes", 0.0)
            logs["minutes"] = round(self._minutes_before + (time.monotonic() - self._started) / 60, 2)
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; also draws samples."""
        metrics = super().evaluate(*args, **kwargs)
        if self.args.save_samples:
            self.draw_samples()
        return metrics

    def draw_samples(self) -> Path | None:
        """Write a picture of samples of the present weights; its path, in the process that wrote it."""
        if not self.is_world_process_zero():
            return None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            logger.warning("No samples are drawn of weights that are sharded over processes.")
            return None
        model: Any = self.accelerator.unwrap_model(self.model)
        with self.accelerator.autocast():
            images = sample_images(model, self.vae, NUM_SAMPLES, SAMPLING_STEPS, seed=self.args.seed)
        path = self.samples_dir / f"step-{self.state.global_step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sample_grid(images).save(path)
        return path

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """The mean loss of a batch."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None
