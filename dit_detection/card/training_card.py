"""What a trainer knows about its detector → the facts, the pictures and the files of its model card."""

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import TrainingArguments

from ..data.fingerprint import count_objects, fingerprint_of
from ..visualize import plot_history
from .detection_report import ImageDetections, ImageErrors, choose_threshold, report_detections
from .model_card import DetectionModelCardData, create_model_card
from .report_pictures import (
    caption_of,
    draw_images,
    evenly_spaced,
    plot_confusion_matrix,
    plot_precision_recall,
    worst_images,
)

# The prefix under which Trainer evaluates while it trains; the card calls that split by its name.
EVAL, VALIDATION = "eval", "validation"
DEFAULT_THRESHOLD = 0.5
NUM_SAMPLES, NUM_WORST = 8, 8
# Of the log, so that neither card nor picture grows with a long run.
NUM_LOG_ENTRIES = 500
_HISTORY_KEYS = ("epoch", "loss", "eval_loss", "eval_map", "eval_map_50")
_PICTURES = {
    "sample_picture": "predictions.jpg",
    "worst_picture": "worst_predictions.jpg",
    "history_picture": "history.png",
    "curves_picture": "precision_recall.png",
    "confusion_picture": "confusion_matrix.png",
}


@dataclass(frozen=True)
class Evaluation:
    """
    An evaluation as the trainer remembers it.

    Args:
        prefix (`str`): Of its metrics: "eval" for the validation split, or the name of the split.
        step (`int`): Of the training that made the weights.
        metrics (`dict[str, float]`): With the prefix.
        images (`list[ImageDetections]`, *optional*): What was found, each image once, by id; not known if the metrics
            are the user's own.
        dataset (`Any`): What was evaluated.
    """

    prefix: str
    step: int
    metrics: Mapping[str, float]
    images: list[ImageDetections] | None
    dataset: Any

    @property
    def is_validation(self) -> bool:
        """Whether the data is what the checkpoint was chosen on; of several such sets each has its name behind it."""
        return self.prefix == EVAL or self.prefix.startswith(f"{EVAL}_")

    @property
    def split(self) -> str:
        """What the card calls the data."""
        return VALIDATION + self.prefix.removeprefix(EVAL) if self.is_validation else self.prefix


class Evaluations:
    """The evaluations of a trainer: of each prefix the latest, and the one of the best step so far."""

    def __init__(self) -> None:
        self._kept: list[Evaluation] = []

    def add(self, evaluation: Evaluation, best_step: int | None) -> None:
        """Remember one; what is neither new nor of the best step is forgotten."""
        self._kept = [
            one
            for one in self._kept
            if one.prefix != evaluation.prefix or (one.step == best_step and one.step != evaluation.step)
        ]
        self._kept.append(evaluation)

    def of(self, step: int) -> dict[str, Evaluation]:
        """By prefix, those of the weights of this step, in the order in which they were made."""
        return {one.prefix: one for one in self._kept if one.step == step}


def training_facts(
    model: Any,
    args: Any,
    log_history: Sequence[Mapping[str, Any]],
    datasets_by_split: Mapping[str, Any],
    evaluations: Mapping[str, Evaluation],
    images_per_step: int,
    is_trained: bool,
) -> dict[str, Any]:
    """
    Fields of [`DetectionModelCardData`] that follow from a training and its evaluations, but for the report.

    Args:
        model (`nn.Module`): As it was trained.
        args (`DetectionTrainingArguments`): It was trained with.
        log_history (`Sequence[Mapping]`): Of the trainer's state.
        datasets_by_split (`Mapping[str, Any]`): What it was trained and validated on.
        evaluations (`Mapping[str, Evaluation]`): Of its weights, by prefix.
        images_per_step (`int`): In all processes.
        is_trained (`bool`): Whether there was a training. A detector may be loaded and evaluated only: what trained it
            is not known then.
    """
    facts: dict[str, Any] = {
        "model_name": Path(args.output_dir).resolve().name,
        "config": model.config,
        "base_model": model.config.base_model,
        "dataset_name": "unnamed data",
        "split_sizes": {},
        "class_counts": {},
        "fingerprints": {},
    }
    if is_trained:
        facts |= {
            "seed": args.seed,
            "hardware": hardware_of(args),
            "versions": {name: version(name) for name in ("torch", "transformers", "diffusers", "dit_detection")},
            "hyperparameters": {
                **_length(args),
                "images per step": images_per_step,
                "learning rate": args.learning_rate,
                "weight decay": args.weight_decay,
                "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
                **_trained_parts(model),
                **({} if args.ema_decay is None else {"decay of the weights' averages": args.ema_decay}),
            },
            "history": _short_history(log_history),
        }
    adapters = getattr(model, "peft_config", None)  # what peft calls its adapters' settings
    if adapters:
        adapter = next(iter(adapters.values()))
        facts["adapter_of"] = adapter.base_model_name_or_path
        if is_trained:
            facts["hyperparameters"]["rank of LoRA"] = adapter.r
    ends = [entry["minutes"] for entry in log_history if "train_runtime" in entry and "minutes" in entry]
    if ends:
        facts["minutes"] = ends[-1]
    names = {int(label): name for label, name in model.config.id2label.items()}
    by_split = {one.split: one for one in evaluations.values()}
    given = datasets_by_split if is_trained else {}
    for split, dataset in {**given, **{split: one.dataset for split, one in by_split.items()}}.items():
        rows = getattr(dataset, "rows", None)
        if isinstance(rows, datasets.Dataset):
            facts["dataset_name"] = rows.info.dataset_name or facts["dataset_name"]
            facts["split_sizes"][split] = len(rows)
            facts["class_counts"][split], facts["fingerprints"][split] = _counts_and_fingerprint(rows)
        elif split in by_split and (images := by_split[split].images):  # a stream: known is what came through
            facts["split_sizes"][split] = len(images)
            labels, crowds = np.concatenate([image.expected[:, 4:6] for image in images]).astype(np.int64).T
            counts = np.bincount(labels[crowds == 0], minlength=len(names))
            facts["class_counts"][split] = {name: int(counts[label]) for label, name in names.items()}
    return facts


def _length(args: Any) -> dict[str, float]:
    """How long training was to be; it may have ended before, if it was told to."""
    unit, number = ("steps", args.max_steps) if args.max_steps > 0 else ("epochs", args.num_train_epochs)
    return {unit if args.early_stopping_patience is None else f"{unit} at most": number}


def report_facts(evaluations: Mapping[str, Evaluation], id2label: Mapping[int, str]) -> dict[str, Any]:
    """
    Fields of [`DetectionModelCardData`] about the held-out split. The threshold is chosen on the validation split.

    Args:
        evaluations (`Mapping[str, Evaluation]`): Of the weights, by prefix.
        id2label (`Mapping[int, str]`): The classes.
    """
    validation = next((one for one in evaluations.values() if one.is_validation), None)
    held_out = held_out_of(evaluations)
    if held_out is None:
        return {}
    metrics = {key.removeprefix(f"{held_out.prefix}_"): value for key, value in held_out.metrics.items()}
    facts: dict[str, Any] = {
        "metrics": {key: float(value) for key, value in metrics.items() if key.startswith(("map", "mar_"))},
        "metrics_split": held_out.split,
    }
    if not held_out.images:
        return facts
    threshold = None if validation is None else choose_threshold(validation.images or [], id2label)
    report, _ = report_detections(held_out.images, id2label, DEFAULT_THRESHOLD if threshold is None else threshold)
    return facts | {
        "threshold": report.threshold,
        "threshold_split": None if threshold is None or validation is None else validation.split,
        "report": report,
    }


def held_out_of(evaluations: Mapping[str, Evaluation]) -> Evaluation | None:
    """
    The evaluation that the card reports: "test", or the last that is not of the validation split, or else that; one
    with objects, if there is any.
    """
    found = {
        prefix: one for prefix, one in evaluations.items() if one.metrics.get(f"{one.prefix}_map") != -1
    } or evaluations
    others = [one for one in found.values() if not one.is_validation] or list(found.values())
    return found.get("test", others[-1] if others else None)


def plot_card(data: DetectionModelCardData) -> dict[str, Any]:
    """The plots that follow from the saved state of a card alone: images by the name of the field that names them."""
    plots = {}
    if any(key in entry for entry in data.history for key in _HISTORY_KEYS[1:]):
        plots["history_picture"] = plot_history(data.history)
    if data.report is not None:
        if any(one.curve for one in data.report.classes):
            plots["curves_picture"] = plot_precision_recall(data.report)
        plots["confusion_picture"] = plot_confusion_matrix(data.report)
    return plots


def write_card(folder: str | Path, data: DetectionModelCardData) -> None:
    """Write `README.md`, and `model_card.json`, from which it can be written again."""
    data.save(Path(folder) / "model_card.json")
    create_model_card(data).save(Path(folder) / "README.md")


def write_pictures(
    folder: str | Path, data: DetectionModelCardData, held_out: Evaluation | None
) -> dict[str, str | None]:
    """
    Draw what there is to draw.

    Args:
        folder (`str` or `Path`): Of the card.
        data ([`DetectionModelCardData`]): What the card says.
        held_out ([`Evaluation`], *optional*): What the report was made of.

    Returns:
        `dict`: The names of the files by the field that holds them; `None` for what there is not.
    """
    pictures = plot_card(data)
    rows = None if held_out is None else getattr(held_out.dataset, "rows", None)
    if held_out is not None and held_out.images and data.report is not None and rows is not None:
        _, errors = report_detections(held_out.images, data.id2label, data.report.threshold)
        chosen = {
            "sample_picture": evenly_spaced(errors, NUM_SAMPLES),
            "worst_picture": worst_images(errors, NUM_WORST),
        }
        for name, indices in chosen.items():
            if indices:
                pictures[name] = draw_images(
                    rows,
                    [held_out.images[index] for index in indices],
                    [_caption(name, place, errors[index]) for place, index in enumerate(indices, 1)],
                    data.id2label,
                    data.report.threshold,
                )
    names: dict[str, str | None] = {}
    for name, file_name in _PICTURES.items():
        if name in pictures:
            pictures[name].save(Path(folder) / file_name, **({"quality": 90} if file_name.endswith(".jpg") else {}))
        names[name] = file_name if name in pictures else None
    return names


@lru_cache(maxsize=8)  # a card is written with every push on the way
def _counts_and_fingerprint(rows: datasets.Dataset) -> tuple[dict[str, int], str]:
    return count_objects(rows), fingerprint_of(rows)


def _caption(name: str, place: int, errors: ImageErrors) -> str:
    return f"worst {place}: {caption_of(errors)}" if name == "worst_picture" else caption_of(errors)


def _short_history(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is plotted of a log, in its order."""
    entries = [
        {key: entry[key] for key in _HISTORY_KEYS if key in entry and np.isfinite(entry[key])} for entry in log_history
    ]
    losses = [entry for entry in entries if "loss" in entry]
    scores = [entry for entry in entries if "eval_map" in entry]
    return [dict(entry) for part in (losses, scores) for entry in _sampled(part, NUM_LOG_ENTRIES)]


def _sampled(entries: Sequence[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    """Up to `limit` of the entries, evenly spaced, the first and the last among them."""
    if len(entries) <= limit:
        return list(entries)
    return [entries[round(index * (len(entries) - 1) / (limit - 1))] for index in range(limit)]


def _trained_parts(model: Any) -> dict[str, str]:
    """How many blocks are frozen, and the share of the parameters that learns."""
    blocks: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        block = re.search(r"backbone\.layers\.(\d+)\.", name)
        if block:
            blocks[block[1]] = blocks.get(block[1], True) and not parameter.requires_grad
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "frozen blocks": f"{sum(blocks.values())} of {len(blocks)}",
        "parameters that are trained": f"{trained / 1e6:.2f} M of {total / 1e6:.2f} M",
    }


def hardware_of(args: TrainingArguments) -> str:
    """What a training with these arguments runs on, all processes together."""
    if args.device.type == "cuda":
        return f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    processes = "" if args.world_size == 1 else f", {args.world_size} processes"
    if args.device.type != "cpu":
        return f"{platform.machine()} {args.device.type}{processes}"
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}{processes}"
