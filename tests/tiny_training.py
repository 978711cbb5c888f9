"""Detectors small enough to be trained, saved and loaded in a test."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dit_detection import (
    DetectionDataset,
    DetectionTrainer,
    DetectionTrainingArguments,
    DiTDetectionImageProcessor,
    id2label_of,
)

# An autoencoder in front. It halves each side twice, so that 4 x 4 latent cells are a token of 16 pixels.
LATENTS: dict[str, Any] = {
    "latent_encoder": {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [8, 8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "layers_per_block": 1,
        "act_fn": "silu",
        "norm_num_groups": 4,
        "scaling_factor": 0.18215,
    },
    "in_channels": 4,
    "patch_size": 4,
}
# Options of `dit-detect train`.
TINY = ["--random_dit", "tiny", "--image_size", "48", "64", "--bf16", "False", "--disable_tqdm", "True"]


class TrainedOn(TrainerCallback):
    """Remembers the data sets that training read from."""

    def __init__(self) -> None:
        self.datasets: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.datasets.append(kwargs["train_dataloader"].dataset)


def label_fields(dataset: Any) -> dict[str, Any]:
    """Of the configuration, for a data set's classes."""
    names = id2label_of(dataset)
    return {"num_labels": len(names), "id2label": names, "label2id": {name: label for label, name in names.items()}}


def make_trainer(model: Any, dataset: Any, output_dir: str | Path, more: Any = None, **arguments: Any) -> Any:
    """
    A `DetectionTrainer` on 64 x 64 pixels of a CPU, that prints nothing.

    Args:
        model (`nn.Module` or `None`): What is trained.
        dataset (`DatasetDict`): With splits train and validation.
        output_dir (`str` or `Path`): Of the run.
        more (`dict`, *optional*): Of the trainer's own arguments.
        arguments: Of `DetectionTrainingArguments`, where they differ from one epoch in batches of 4.
    """
    image_processor = DiTDetectionImageProcessor(size=64)
    defaults = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "report_to": "none"}
    return DetectionTrainer(
        model,
        DetectionTrainingArguments(str(output_dir), use_cpu=True, disable_tqdm=True, **(defaults | arguments)),
        processing_class=image_processor,
        train_dataset=DetectionDataset(dataset["train"], image_processor),
        eval_dataset=DetectionDataset(dataset["validation"], image_processor),
        **(more or {}),
    )
