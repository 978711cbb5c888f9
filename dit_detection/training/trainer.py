"""The HF Trainer for detection: learning rates per depth, exact mAP at any batch size and process count."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, EvalPrediction
from transformers.trainer_utils import BestRun, TrainOutput

from ..adapters import detector_of
from ..card.detection_report import ImageDetections
from ..data import EpochCallback, collate_detection
from ..metrics import CocoMetric
from .data_trainer import DataTrainer
from .ema import EmaCallback
from .fault_tolerant_trainer import NonFiniteLossError
from .global_batch import match_global_batch
from .hp_search import eval_map, hp_space
from .resumed_model import resumed_config
from .safe_trainer import SafeTrainer
from .training_args import DetectionTrainingArguments

logger = logging.getLogger(__name__)

# Fills what is ragged up to a rectangle; the value that Trainer itself pads with across batches and processes.
PADDING = -100


class DetectionTrainer(DataTrainer, SafeTrainer):
    """
    Trains and evaluates a [`DiTForObjectDetection`]. Used as any `Trainer`; `processing_class` is the image processor.

    `evaluate` returns COCO metrics (`eval_map`, `eval_map_50`, `eval_map_<class>`, …, see [`CocoMetric`]) and
    `eval_loss`, the mean loss per image. Both are the same for every batch size and number of processes.

    Data sets yield `pixel_values`, `pixel_mask` and `labels`, as `DetectionDataset` makes them, or what
    `encode_frozen` made of the pixels, as `FrozenDataset` does.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DetectionTrainingArguments | None = None,
        *,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if processing_class is None:
            raise ValueError(
                "DetectionTrainer needs processing_class, the image processor: it turns outputs into boxes."
            )
        args = DetectionTrainingArguments() if args is None else args
        if not isinstance(args, DetectionTrainingArguments):
            raise TypeError(f"DetectionTrainer needs args of DetectionTrainingArguments, not {type(args).__name__}.")
        if args.n_gpu > 1:
            # DataParallel, which Trainer takes for them, would cut labels by their fields and not by images.
            logger.warning("This process trains on 1 of %d GPUs: accelerate launch --multi_gpu uses all.", args.n_gpu)
            args._n_gpu = 1
        self._resumed_anchors: dict[str, Any] = {}
        kwargs.setdefault("data_collator", collate_detection)
        kwargs.setdefault("compute_metrics", self._compute_coco_metrics)
        super().__init__(model, args, processing_class=processing_class, **kwargs)
        self.add_callback(EpochCallback())
        if self.args.ema_decay is not None:
            self.add_callback(EmaCallback(self.args.ema_decay))
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        self._has_made_optimizer = self._has_told_of_undefined = False

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`; with `args.cache_frozen` the frozen part first runs over the data sets, once."""
        if self._has_made_optimizer:
            # Since an earlier training other weights may have been frozen, or other rates set.
            self.optimizer: Any = None
            self._has_made_optimizer = False
        return super().train(*args, **kwargs)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As `Trainer.call_model_init`; a run that goes on keeps its anchors."""
        model = super().call_model_init(trial)
        detector_of(model).config.update(self._resumed_anchors)
        return model

    def hyperparameter_search(
        self,
        hp_space: Callable[..., dict[str, Any]] = hp_space,
        compute_objective: Callable[[dict[str, float]], float] = eval_map,
        n_trials: int = 20,
        direction: str = "maximize",
        **kwargs: Any,
    ) -> BestRun:
        """As `Trainer.hyperparameter_search`; by default the recipe's knobs ([`hp_space`]) for the best last mAP."""
        if kwargs.get("backend") in (None, "optuna"):
            kwargs.setdefault("catch", (NonFiniteLossError,))  # which ends a trial, but not the search
        return super().hyperparameter_search(hp_space, compute_objective, n_trials, direction, **kwargs)

    def _checkpoint_to_load(self, wanted: str | bool | None) -> str | None:
        """
        As of [`SafeTrainer`]; the model gets the anchors of the checkpoint, whose head has learnt with those: they are
        no weights, and `dit-detect train` fits them to images, of which there may be more now.

        Raises:
            ValueError: The checkpoint is of another detector.
        """
        checkpoint = super()._checkpoint_to_load(wanted)
        self._resumed_anchors = {}
        saved = None if checkpoint is None else resumed_config(Path(checkpoint), self.model)
        if saved is not None:
            self._resumed_anchors = {name: getattr(saved, name) for name in ("anchor_sizes", "aspect_ratios")}
            config = detector_of(self.model).config
            if any(getattr(config, name) != value for name, value in self._resumed_anchors.items()):
                logger.warning(
                    "Training goes on with the anchors of %s, %s, with which its head has learnt. For others begin "
                    "anew, in another output_dir.",
                    checkpoint,
                    self._resumed_anchors,
                )
                config.update(self._resumed_anchors)
        return checkpoint

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As of [`SafeTrainer`]; -1, the mAP and the recall where no image has an object, is no score."""
        name = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if not name.startswith(("map", "mar")) or metrics.get(f"eval_{name}") != -1:
            return super()._determine_best_metric(metrics, trial)
        if not self._has_told_of_undefined:
            logger.warning(
                "%s is undefined, with no objects to measure it on: no checkpoint is the best, and training ends with "
                "the last weights. Annotate validation images, or take --metric_for_best_model loss.",
                name,
            )
            self._has_told_of_undefined = True
        return False

    def _load_callback_state(self) -> None:
        """As `Trainer`; but patience is what these arguments say, and not those of the checkpoint."""
        super()._load_callback_state()
        patience = self.args.early_stopping_patience
        for callback in self.callback_handler.callbacks if patience is not None else ():
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience = patience

    def _get_learning_rate(self) -> float:
        """The rate of neck and head, which is what `learning_rate` means. Trainer logs that of the slowest block."""
        if self.is_deepspeed_enabled or self.optimizer is None:
            return super()._get_learning_rate()
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of `args.optim`, with a learning rate and weight decay per parameter."""
        if self.optimizer is None:
            model = self.model if model is None else model
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and parameter.dtype == torch.float16:
                    raise ValueError(
                        f"{name} is float16, in which the steps of training are lost. Load the model with "
                        "dtype=torch.float32; fp16=True or bf16=True still compute in 16 bits."
                    )
            given = self.optimizer_cls_and_kwargs
            optimizer_cls, optimizer_kwargs = given or self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_cls(parameter_groups(model, self.args), **optimizer_kwargs)
            self._has_made_optimizer = True
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The batches of a step, anchors matched, and how many are in all processes: what the loss is divided by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        batches, num_matched = match_global_batch(self.model, batches, self.accelerator)
        if self.args.average_tokens_across_devices:
            num_matched = self.accelerator.reduce(num_matched, reduction="sum")
        return batches, num_matched

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """
        Detections and targets of a batch as rectangles, because Trainer concatenates tensors and nothing else right.

        Returns:
            No loss (it is averaged over images, with the metrics); detections `(B, K, 6)` (xyxy in original pixels,
            score, label) and losses `(B,)`; targets `(B, M, 7)` (xyxy, label, iscrowd, area) and image ids `(B, 1)`.
            Missing rows are `PADDING`.
        """
        inputs = self._prepare_inputs(inputs)
        if "labels" not in inputs:
            raise ValueError(
                "These images have no labels, so nothing can be measured on them. What is in them is told by "
                "`dit-detect predict`, or by pipeline('object-detection')."
            )
        labels = inputs["labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        if prediction_loss_only:
            return outputs.loss.detach(), None, None
        sizes = torch.stack([image_labels["orig_size"] for image_labels in labels])
        results = self.processing_class.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        detections = [torch.cat([r["boxes"], r["scores"][:, None], r["labels"][:, None]], dim=1) for r in results]
        targets = [_target_rows(image_labels) for image_labels in labels]
        image_ids = torch.stack([image_labels["image_id"] for image_labels in labels])
        max_detections = self.processing_class.max_detections
        return (
            None,
            (_pad_rows(detections, max_detections), outputs.loss_per_image.float()),
            (_pad_rows(targets, max(len(rows) for rows in targets)), image_ids),
        )

    def _compute_coco_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Trainer's gathered rectangles → COCO metrics."""
        (detections, losses), (targets, image_ids) = prediction.predictions, prediction.label_ids
        metric = CocoMetric(self.model.config.id2label, keep_in_memory=True)
        images = []
        for found, expected, image_id in zip(detections, targets, image_ids[:, 0].tolist(), strict=True):
            found, expected = found[found[:, 5] != PADDING], expected[expected[:, 4] != PADDING]
            images.append(ImageDetections(image_id, found, expected))
            metric.add(
                prediction={"image_id": image_id, "boxes": found[:, :4], "scores": found[:, 4], "labels": found[:, 5]},
                reference={
                    "image_id": image_id,
                    "boxes": expected[:, :4],
                    "labels": expected[:, 4],
                    "iscrowd": expected[:, 5],
                    "area": expected[:, 6],
                },
            )
        self.remember_images(images)
        return {"loss": float(losses.mean()), **metric.compute()}


def parameter_groups(model: nn.Module, args: DetectionTrainingArguments) -> list[dict[str, Any]]:
    """
    One group of trainable parameters per learning rate and weight decay.

    Neck, head and the taps' norms learn at `learning_rate`; block i of n at `backbone_learning_rate *
    layer_decay ** (n - 1 - i)`, the patch embedding as a block before the first. Vectors (biases, norms, layer scales)
    are not decayed.
    """
    backbone_rate = args.learning_rate if args.backbone_learning_rate is None else args.backbone_learning_rate
    num_layers: int = model.config.num_hidden_layers  # type: ignore[union-attr, assignment]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate: float = args.learning_rate
        block = re.search(r"backbone\.layers\.(\d+)\.", name)
        if block or "backbone.patch_embedding." in name:
            depth = int(block[1]) if block else -1
            rate = backbone_rate * args.layer_decay ** (num_layers - 1 - depth)
        decay = args.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _target_rows(labels: Mapping[str, Tensor]) -> Tensor:
    """One image's labels → `(M, 7)`: xyxy in original pixels, label, iscrowd, area in original pixels."""
    height, width = labels["orig_size"].tolist()
    centers, sides = labels["boxes"].cpu().double().split(2, dim=1)  # Apple's GPUs have no float64
    boxes = torch.cat([centers - sides / 2, centers + sides / 2], dim=1)
    boxes = boxes * boxes.new_tensor([width, height, width, height])
    columns = [labels["class_labels"], labels["iscrowd"], labels["area"]]
    return torch.cat([boxes.float().to(columns[0].device), *(column[:, None].float() for column in columns)], dim=1)


def _pad_rows(tables: list[Tensor], num_rows: int) -> Tensor:
    """Tables of `(m, C)`, m at most `num_rows` → `(B, num_rows, C)`."""
    padded = tables[0].new_full((len(tables), num_rows, tables[0].shape[1]), PADDING)
    for image, table in zip(padded, tables, strict=True):
        image[: len(table)] = table
    return padded
