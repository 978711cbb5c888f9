"""A detector on annotated images → COCO metrics."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..adapters import load_detector, load_image_processor
from ..data import InvalidDatasetError, load_detection_dataset
from ..data.transforms import plain_inputs
from ..inference.batch_predictor import model_class_names
from ..training.trainer import DetectionTrainer
from ..training.training_args import DetectionTrainingArguments
from .shared_options import add_checkpoint, add_data_options, data_arguments, refuse_output


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the job; returns the metrics."""
    parser = argparse.ArgumentParser(prog="dit-detect evaluate", description=__doc__)
    add_checkpoint(parser)
    parser.add_argument("--dataset", required=True, help="annotated images, in any form that `dit-detect train` reads")
    parser.add_argument(
        "--split",
        default="test",
        help="train (all of it, unless --validation_fraction or --test_fraction is given), validation or test",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="images at a time, on each device")
    parser.add_argument("--output", help="JSON file for the metrics")
    # With those that the detector was trained with, a split that was set aside then is the same one now.
    group = add_data_options(parser, has_classes=True)
    group.add_argument("--streaming", action="store_true", help="of a stream, other images are set aside")
    fraction = parser.get_default("validation_fraction")
    parser.set_defaults(validation_fraction=None)
    args = parser.parse_args(argv)
    # Images that are held out in a file of their own are its split "train", of which nothing is to be left out.
    if args.validation_fraction is None and (args.split != "train" or args.test_fraction is not None):
        args.validation_fraction = fraction
    if args.class_names is not None:
        parser.error(f"--class_names: the classes are those of {args.checkpoint}.")
    if args.output:
        refuse_output(parser, "output", args.output, is_picture=False)

    model = load_detector(args.checkpoint, revision=args.revision)
    # In the order of the checkpoint's labels, whatever order the annotations have.
    options = data_arguments(args) | {"class_names": model_class_names(model)}
    try:
        dataset = load_detection_dataset(
            args.dataset, on_invalid=args.on_invalid, streaming=args.streaming, splits=[args.split], **options
        )
    except InvalidDatasetError as error:
        if "is none of class_names" not in str(error):
            raise
        raise InvalidDatasetError(
            f"{error}\nclass_names are here the classes of {args.checkpoint}, which finds no others: rename them in "
            "the data, or leave the objects of other classes out with --on_invalid drop."
        ) from error
    if args.split not in dataset:
        parser.error(f"--split {args.split}: {args.dataset} has {', '.join(dataset)}.")
    image_processor = load_image_processor(args.checkpoint, revision=args.revision)
    with TemporaryDirectory() as unused:  # every Trainer makes itself a folder
        trainer = DetectionTrainer(
            model,
            DetectionTrainingArguments(
                unused,
                eval_strategy="no",
                save_strategy="no",
                load_best_model_at_end=False,
                per_device_eval_batch_size=args.batch_size,
                use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
            ),
            processing_class=image_processor,
            eval_dataset=plain_inputs(dataset[args.split], image_processor),
        )
        metrics = trainer.evaluate(metric_key_prefix=args.split)
    trainer.log_metrics(args.split, metrics)
    if args.output and trainer.is_world_process_zero():
        Path(args.output).write_text(json.dumps(metrics, indent=1))
    trainer.accelerator.end_training()
    return metrics
