"""The HF Trainer for diffusion pretraining: moving averages, a comparable held-out loss, samples as it goes."""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import EvalPrediction, TrainingArguments
from transformers.trainer_utils import TrainOutput

from ..data import EpochCallback
from ..training.ema import EmaCallback
from ..training.fault_tolerant_trainer import NonFiniteLossError
from ..training.global_batch import num_repeated
from ..training.safe_trainer import SafeTrainer
from .diffusion_model import DiffusionModel
from .sampling import sample_grid, sample_images

logger = logging.getLogger(__name__)

NUM_SAMPLES = 8
SAMPLING_STEPS = 25
# In a checkpoint; earlier ones have the fingerprint of the images alone.
BEGAN_WITH = "began_with.json"
FINGERPRINT = "images.fingerprint"


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
        began_with (`dict[str, Any]`, *optional*): What is held out, and how the loss is measured, depend on it, as
            JSON; "images" is their fingerprint. A checkpoint of something else is refused: it may have learnt from
            what is held out here, and its losses are others.
        kwargs: Of `Trainer`.
    """

    def __init__(
        self,
        model: DiffusionModel,
        args: PretrainingArguments,
        *,
        vae: Any,
        began_with: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            # DataParallel, which Trainer takes for them, would cut the number of images, too.
            logger.warning("This process trains on 1 of %d GPUs: accelerate launch --multi_gpu uses all.", args.n_gpu)
            args._n_gpu = 1
        super().__init__(model, args, data_collator=default_collate, compute_metrics=_mean_loss, **kwargs)
        self.vae, self.began_with = vae, began_with or {}
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

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The batches of a step, and how many images are in all processes: what the loss is divided by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        counted = [torch.ones(len(batch["time"]), dtype=torch.bool, device=device) for batch in batches]
        if self.accelerator.gradient_state.end_of_dataloader:
            last, loader = counted[-1], self.accelerator.gradient_state.active_dataloader
            last[len(last) - num_repeated(loader, len(last)) :] = False
        batches = [batch | {"is_counted": mask} for batch, mask in zip(batches, counted, strict=True)]
        num_images = torch.cat(counted).sum()
        if self.args.average_tokens_across_devices:
            num_images = self.accelerator.reduce(num_images, reduction="sum")
        return batches, num_images

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As `Trainer`; with what the run began with."""
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.began_with:
            folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
            (folder / BEGAN_WITH).write_text(json.dumps(self.began_with, indent=2) + "\n", encoding="utf-8")

    def _checkpoint_to_load(self, wanted: str | bool | None) -> str | None:
        """As of [`SafeTrainer`]; one that did not begin with the same is refused."""
        checkpoint = super()._checkpoint_to_load(wanted)
        before = {} if checkpoint is None else _began_with(Path(checkpoint))
        changed = [name for name, value in self.began_with.items() if before.get(name, value) != value]
        if changed:
            others = ["other images" if name == "images" else f"another {name}" for name in changed]
            raise ValueError(
                f"{checkpoint} is of a run with {', '.join(others)}: what is held out now may be what it has "
                "learnt from, and its losses cannot be compared. Bring back what was there, or begin anew in another "
                "--output_dir."
            )
        return checkpoint

    def _non_finite(self, losses: list[float], norm: float) -> NonFiniteLossError:
        """As of [`FaultTolerantTrainer`]; but these images have no ids, and no annotations that may be wrong."""
        super()._non_finite(losses, norm)
        step = self.state.global_step + 1
        return NonFiniteLossError(
            f"Step {step} is not finite: loss {sum(losses):.4g}, gradient {norm:.4g}; see "
            f"{Path(str(self.args.output_dir)) / f'not_finite_step_{step}.json'}. The weights did not take it. Train "
            "anew with a lower --learning_rate, or in float32 (--bf16 False)."
        )

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
            try:
                self.draw_samples()
            except Exception as error:  # training does not need them
                logger.warning("No samples could be drawn after step %d: %s", self.state.global_step, error)
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
        """
        What Trainer gathers of all processes, without the images that fill up the last batch.

        Returns:
            No loss (it is averaged over images, in the end); losses `(B,)`; and times `(B,)`, for Trainer averages
            nothing that has no labels.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return None, model(**inputs)["loss_per_image"], inputs["time"]


def _mean_loss(prediction: EvalPrediction) -> dict[str, float]:
    return {"loss": float(prediction.predictions.mean())}


def _began_with(checkpoint: Path) -> dict[str, Any]:
    """What the run of a checkpoint began with, as far as it tells."""
    if (file := checkpoint / BEGAN_WITH).is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    file = checkpoint / FINGERPRINT
    return {"images": file.read_text(encoding="utf-8").strip()} if file.is_file() else {}
