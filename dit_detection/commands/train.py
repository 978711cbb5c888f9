"""Annotated images → a trained detector, its mAP, and pictures of what it sees."""

import json
import logging
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import transformers
from datasets import DatasetDict
from transformers import AutoConfig, HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..data import (
    DetectionAugmentation,
    DetectionTransform,
    draw_shapes_dataset,
    id2label_of,
    load_detection_dataset,
)
from ..model.image_processing_dit_detection import DiTDetectionImageProcessor
from ..model.modeling_dit_detection import DiTForObjectDetection
from ..small_dit import DETECTORS, write_small_dit
from ..trainer import DetectionTrainer, DetectionTrainingArguments
from ..visualize import plot_history
from .predict import draw_samples

logger = logging.getLogger(__name__)

# What the embedded job trains with: it must be done in 4 minutes on 2 cores.
EMBEDDED_JOB = {
    "random_dit": "tiny",
    "image_size": [128],
    "num_train_epochs": 4,
    "learning_rate": 2e-3,
    "augmentation": '{"scale_probability": 0.0}',
}
# Random weights learn faster and have no pretrained depth to protect.
RANDOM_WEIGHTS = {"learning_rate": 1e-3, "layer_decay": 1.0}


@dataclass
class ModelArguments:
    """Which DiT, and how it is turned into a detector."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "DiT of diffusers: Hub id or folder of a pipeline (facebook/DiT-XL-2-256) or bare transformer; or "
            "a detector of this library to go on from. Default: a small DiT on pixels with random weights."
        },
    )
    random_dit: Literal["tiny", "small"] = field(
        default="small",
        metadata={"help": "Without --model: size of the random DiT; with its detector 1.2 M or 3.6 M parameters."},
    )
    vae: str = field(
        default="auto",
        metadata={"help": "Hub id or folder of the autoencoder; 'auto': the pipeline's own; 'none': a DiT on pixels."},
    )
    timestep: int = field(default=50, metadata={"help": "Diffusion timestep whose features are used, 0 to 999."})
    condition: int | None = field(default=None, metadata={"help": "Class the DiT is conditioned on. Default: none."})
    image_size: list[int] = field(
        default_factory=lambda: [512],
        metadata={"help": "Canvas that every image is fitted into, in pixels: a side, or height and width."},
    )
    freeze_layers: int | None = field(
        default=None, metadata={"help": "Freeze the patch embedding and this many blocks, from the first; -1: all."}
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "sdpa, eager, flash_attention_2, … Default on a CPU with bf16: eager."}
    )
    config_overrides: str = field(
        default="{}",
        metadata={"help": 'More of DiTDetectionConfig, as JSON: \'{"matcher": "max_iou", "box_loss": "smooth_l1"}\'.'},
    )


@dataclass
class DataArguments:
    """Which images, and what to do about broken annotations."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Folder of images with COCO JSON, or a folder or Hub id of a data set with an `objects` column. "
            "Default: shapes that the library draws itself."
        },
    )
    on_invalid: Literal["error", "drop", "clip"] = field(
        default="error",
        metadata={
            "help": "Broken rows: stop, 'drop' them, or 'clip' boxes to the image.",
            "choices": ["error", "drop", "clip"],
        },
    )
    validation_fraction: float = field(
        default=0.15, metadata={"help": "Share of the training images to validate on, where there is no such split."}
    )
    augmentation: str = field(
        default="{}",
        metadata={
            "help": "Of DetectionAugmentation, as JSON: '{\"vertical_flip\": 0.5}'; or 'none': images as they are."
        },
    )


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the job; returns the metrics of the held-out split."""
    argv = list(sys.argv[1:] if argv is None else argv)
    model_args, data_args, args = _parse(argv)
    logging.basicConfig(level=logging.INFO if args.process_index == 0 else logging.ERROR, format="%(message)s")
    if args.process_index != 0:
        datasets.disable_progress_bars()
        transformers.logging.set_verbosity_error()
    set_seed(args.seed)

    with args.main_process_first(desc="reading the data set"):
        dataset = _load_dataset(data_args, args.seed)
    model, image_processor = _load_model(model_args, dataset, args)
    augmentation = None
    if data_args.augmentation != "none":
        augmentation = DetectionAugmentation(**json.loads(data_args.augmentation))
    trainer = DetectionTrainer(
        model,
        args,
        processing_class=image_processor,
        train_dataset=DetectionTransform(image_processor, augmentation).attach(dataset["train"]),
        eval_dataset=DetectionTransform(image_processor).attach(dataset["validation"]),
    )
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    minutes = (time.monotonic() - start) / 60

    # The split that training never saw, not even to choose the checkpoint.
    held_out = "test" if "test" in dataset else "validation"
    metrics = trainer.evaluate(
        DetectionTransform(image_processor).attach(dataset[held_out]), metric_key_prefix=held_out
    )
    trainer.log_metrics(held_out, metrics)
    trainer.save_metrics(held_out, {**metrics, "train_minutes": round(minutes, 2)})
    trainer.save_state()
    trainer.save_model()
    if trainer.is_world_process_zero():
        output_dir = Path(str(args.output_dir))
        draw_samples(trainer.model, image_processor, dataset[held_out]).save(
            output_dir / "predictions.jpg", quality=90
        )
        plot_history(trainer.state.log_history).save(output_dir / "history.png")
        trainer.card_facts = {
            "dataset_name": Path(data_args.dataset).name if data_args.dataset else "drawn shapes",
            "split_sizes": {split: rows.num_rows for split, rows in dataset.items()},
            "class_counts": count_classes(dataset),
            "metrics": {name.removeprefix(f"{held_out}_"): value for name, value in metrics.items()},
            "metrics_split": held_out,
            "command": shlex.join(["dit-detect", "train", *argv]),
            "minutes": minutes,
            "sample_picture": "predictions.jpg",
            "history_picture": "history.png",
            "limits": [] if model_args.model else ["Its DiT began with random weights, not with pretrained ones."],
        }
        trainer.create_model_card()
        logger.info(
            "%s: map %.3f, map_50 %.3f, after %.1f minutes of training. Detector, metrics, card and pictures: %s",
            held_out,
            metrics[f"{held_out}_map"],
            metrics[f"{held_out}_map_50"],
            minutes,
            output_dir,
        )
        if model_args.model is None:
            logger.info(
                "This DiT began with random weights. Pretrained ones: --model facebook/DiT-XL-2-256 (CC BY-NC 4.0)."
            )
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()
    return metrics


def count_classes(dataset: DatasetDict) -> dict[str, dict[str, int]]:
    """Objects per split and class name."""
    names = list(id2label_of(dataset).values())
    counts = {}
    for split, rows in dataset.items():
        labels = Counter(
            label for objects in rows.select_columns("objects")["objects"] for label in objects["category"]
        )
        counts[split] = {name: labels[index] for index, name in enumerate(names)}
    return counts


def _parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, DetectionTrainingArguments]:
    parser = HfArgumentParser((ModelArguments, DataArguments, DetectionTrainingArguments), prog="dit-detect train")
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    parser.set_defaults(
        output_dir="outputs",
        use_cpu=on_cpu,
        bf16=_computes_bf16(on_cpu),
        per_device_train_batch_size=8,
        # torch's fused attention on CPUs has no bf16 kernels: at 400 tokens plain matrix products take half the time.
        attn_implementation="eager" if on_cpu and _computes_bf16(on_cpu) else "sdpa",
        # On a CPU the workers would take the cores from the model.
        dataloader_num_workers=0 if on_cpu else 4,
    )
    if not _names(argv, "--model"):
        parser.set_defaults(**RANDOM_WEIGHTS)
    if not _names(argv, "--dataset"):
        parser.set_defaults(**EMBEDDED_JOB)
    model_args, data_args, args = parser.parse_args_into_dataclasses(args=argv)
    if args.resume_from_checkpoint == "last":
        args.resume_from_checkpoint = get_last_checkpoint(args.output_dir)
    return model_args, data_args, args


def _names(argv: list[str], option: str) -> bool:
    return any(argument == option or argument.startswith(f"{option}=") for argument in argv)


def _computes_bf16(on_cpu: bool) -> bool:
    """Whether bf16 is faster here: a CPU without matrix units for it computes it slower than float32."""
    if on_cpu:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _load_dataset(data_args: DataArguments, seed: int) -> DatasetDict:
    if data_args.dataset is None:
        return draw_shapes_dataset(num_train=2000, num_validation=60, num_test=200)
    dataset = load_detection_dataset(
        data_args.dataset,
        on_invalid=data_args.on_invalid,
        validation_fraction=data_args.validation_fraction,
        seed=seed,
    )
    if "train" not in dataset:
        raise ValueError(f"--dataset {data_args.dataset} has no split to train on, only {sorted(dataset)}.")
    return dataset


def _load_model(
    model_args: ModelArguments, dataset: DatasetDict, args: DetectionTrainingArguments
) -> tuple[DiTForObjectDetection, DiTDetectionImageProcessor]:
    overrides: dict[str, Any] = {"attn_implementation": model_args.attn_implementation}
    overrides |= json.loads(model_args.config_overrides)
    id2label = id2label_of(dataset)
    source = model_args.model
    if source is not None and _is_detector(source):
        label2id = {name: index for index, name in id2label.items()}
        model = DiTForObjectDetection.from_pretrained(
            source,
            id2label=id2label,
            label2id=label2id,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            **overrides,
        )
        image_processor = DiTDetectionImageProcessor.from_pretrained(source)
    else:
        if source is None:
            source = str(Path(args.output_dir) / "small-dit")
            with args.main_process_first(desc="writing the small DiT"):
                if args.process_index == 0:
                    write_small_dit(source, model_args.random_dit, max(model_args.image_size), args.seed)
            overrides = DETECTORS[model_args.random_dit] | {"base_model": None} | overrides
        # Weights that are trained stay in float32, whatever the file holds; autocast computes in bf16.
        model = DiTForObjectDetection.from_diffusers(
            source,
            vae=None if model_args.vae == "none" else model_args.vae,
            timestep=model_args.timestep,
            condition=model_args.condition,
            id2label=id2label,
            dtype=torch.float32,
            **overrides,
        )
        height, width = model_args.image_size[0], model_args.image_size[-1]
        image_processor = DiTDetectionImageProcessor(size={"max_height": height, "max_width": width})
    if model_args.freeze_layers is not None:
        model.freeze_backbone(None if model_args.freeze_layers < 0 else model_args.freeze_layers)
    return model, image_processor


def _is_detector(source: str) -> bool:
    try:
        return AutoConfig.from_pretrained(source).model_type == "dit_detection"
    except (OSError, ValueError, KeyError):  # a diffusers checkpoint: its config is not one of transformers
        return False
