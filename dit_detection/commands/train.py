"""Annotated images → a trained detector, its mAP, and pictures of what it sees."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import set_seed

from ..adapters import detector_of
from ..card.model_card_data import is_hub_id
from ..data import (
    DetectionAugmentation,
    DetectionDataset,
    DetectionIterableDataset,
    class_weights_of,
    draw_shapes_dataset,
    load_detection_dataset,
)
from ..data.transforms import plain_inputs
from ..model.image_processing_dit_detection import DiTDetectionImageProcessor
from ..training.trainer import DetectionTrainer
from .dry_run import describe_cost
from .starting_model import load_starting_model
from .train_options import (
    VIEWS_IN_CACHE,
    DataArguments,
    parse_options,
    read_augmentation,
    read_config_overrides,
    shown_command,
)

logger = logging.getLogger(__name__)

# Rows of a stream that are drawn from; of photographs that are embedded about 150 MB.
SHUFFLE_BUFFER = 1000


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the job; returns the metrics of the held-out split (none after a dry run)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    model_args, data_args, args = parse_options(argv)
    logging.basicConfig(level=logging.INFO if args.process_index == 0 else logging.ERROR, format="%(message)s")
    if args.process_index != 0:
        datasets.disable_progress_bars()
        transformers.logging.set_verbosity_error()
    set_seed(args.seed)
    overrides = read_config_overrides(model_args.config_overrides)
    if classes := sorted(overrides.keys() & {"id2label", "label2id", "num_labels"}):
        raise ValueError(
            f"--config_overrides gives {', '.join(classes)}: the classes are those of --dataset. Leave it out."
        )
    augmentation = read_augmentation(data_args.augmentation)

    with args.main_process_first(desc="reading the data set"):
        dataset = _load_dataset(data_args, args.seed)
    if data_args.class_weights == "balanced":
        if "class_weights" in overrides:
            raise ValueError("--class_weights balanced and --config_overrides both give class_weights. Leave one out.")
        overrides["class_weights"] = class_weights_of(dataset["train"])
    model, image_processor = load_starting_model(model_args, dataset, args, overrides)
    if model_args.dry_run:
        if args.process_index == 0:
            num_views = data_args.num_views or VIEWS_IN_CACHE
            print(describe_cost(detector_of(model), image_processor, dataset, args, num_views))
        return {}
    trainer = DetectionTrainer(
        model,
        args,
        processing_class=image_processor,
        train_dataset=_training_inputs(dataset["train"], image_processor, augmentation, data_args, args.seed),
        eval_dataset=plain_inputs(dataset["validation"], image_processor),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    minutes = trainer.state.log_history[-1]["minutes"]
    # Before anything else can fail: the images below may be ones that nobody has looked at yet.
    trainer.save_model(_internal_call=True)  # of no push, which comes last, with the card

    # The split that training never saw; without a test split, or objects in it, the one that chose the checkpoint.
    for held_out in [split for split in ("test", "validation") if split in dataset]:
        metrics = trainer.evaluate(plain_inputs(dataset[held_out], image_processor), metric_key_prefix=held_out)
        if metrics[f"{held_out}_map"] != -1:
            break
        logger.warning("No image of the %s split has an object: nothing can be measured on it.", held_out)
    trainer.log_metrics(held_out, metrics)
    trainer.save_metrics(held_out, {**metrics, "train_minutes": round(minutes, 2)})
    trainer.save_state()
    trainer.card_facts = {
        **_names_of(data_args.dataset),
        "command": shown_command(argv),
        "limits": ["Its DiT began with random weights, not with pretrained ones."] if model_args.random_dit else [],
    }
    if args.push_to_hub:
        trainer.push_to_hub()  # writes the card, too
    else:
        trainer.create_model_card()
    logger.info(
        "%s: map %.3f, map_50 %.3f, after %.1f minutes of training. Detector, metrics, card and pictures: %s",
        held_out,
        metrics[f"{held_out}_map"],
        metrics[f"{held_out}_map_50"],
        minutes,
        args.output_dir,
    )
    if model_args.model is None:
        logger.info("This was a small DiT. A large one: --model facebook/DiT-XL-2-256 (weights under CC BY-NC 4.0).")
    trainer.accelerator.end_training()
    return metrics


def _names_of(dataset: str | None) -> dict[str, Any]:
    """What the card calls the data: a folder by its name, a data set on the Hub by its id, too."""
    if dataset is None:
        return {"dataset_name": "drawn shapes"}
    on_hub = is_hub_id(dataset) and not Path(dataset).exists()
    return {"dataset_name": Path(os.path.abspath(dataset)).name, "dataset_id": dataset if on_hub else None}


def _training_inputs(
    rows: Dataset | IterableDataset,
    image_processor: DiTDetectionImageProcessor,
    augmentation: DetectionAugmentation | None,
    data_args: DataArguments,
    seed: int,
) -> Any:
    if isinstance(rows, IterableDataset):
        shuffled = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        return DetectionIterableDataset(shuffled, image_processor, augmentation, seed=seed)
    return DetectionDataset(rows, image_processor, augmentation, seed=seed, num_views=data_args.num_views)


def _load_dataset(data_args: DataArguments, seed: int) -> DatasetDict | IterableDatasetDict:
    if data_args.dataset is None:
        return draw_shapes_dataset(num_train=2000, num_validation=60, num_test=200)
    dataset = load_detection_dataset(
        data_args.dataset,
        on_invalid=data_args.on_invalid,
        format=data_args.format,
        name=data_args.dataset_config_name,
        revision=data_args.dataset_revision,
        class_names=data_args.class_names,
        validation_fraction=data_args.validation_fraction,
        test_fraction=data_args.test_fraction,
        group_by=data_args.group_by,
        seed=seed,
        streaming=data_args.streaming,
    )
    if "train" not in dataset:
        raise ValueError(f"--dataset {data_args.dataset} has no split to train on, only {sorted(dataset)}.")
    return dataset
