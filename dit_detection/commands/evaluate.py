"""A detector on annotated images → COCO metrics."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoImageProcessor

from ..adapters import load_detector
from ..data import DetectionDataset, load_detection_dataset
from ..data.formats import FORMATS
from ..training.trainer import DetectionTrainer, DetectionTrainingArguments


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the job; returns the metrics."""
    parser = argparse.ArgumentParser(prog="dit-detect evaluate", description=__doc__)
    parser.add_argument("checkpoint", help="detector: folder or Hub id")
    parser.add_argument("--dataset", required=True, help="annotated images, in any form that `dit-detect train` reads")
    parser.add_argument("--split", default="test", help="train, validation or test")
    parser.add_argument(
        "--on_invalid", default="error", choices=["error", "drop", "clip"], help="see `dit-detect train`"
    )
    parser.add_argument("--format", choices=FORMATS, help="see `dit-detect train`")
    parser.add_argument("--batch_size", type=int, default=8, help="images at a time, on each device")
    parser.add_argument("--output", help="JSON file for the metrics")
    args = parser.parse_args(argv)

    model = load_detector(args.checkpoint)
    # In the order of the checkpoint's labels, whatever order the annotations have.
    class_names = [model.config.id2label[label] for label in range(model.config.num_labels)]
    dataset = load_detection_dataset(
        args.dataset, on_invalid=args.on_invalid, format=args.format, class_names=class_names
    )
    if args.split not in dataset:
        parser.error(f"--split {args.split}: {args.dataset} has {', '.join(dataset)}.")
    image_processor = AutoImageProcessor.from_pretrained(args.checkpoint)
    trainer = DetectionTrainer(
        model,
        DetectionTrainingArguments(
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            per_device_eval_batch_size=args.batch_size,
            use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        ),
        processing_class=image_processor,
        eval_dataset=DetectionDataset(dataset[args.split], image_processor),
    )
    metrics = trainer.evaluate(metric_key_prefix=args.split)
    trainer.log_metrics(args.split, metrics)
    if args.output and trainer.is_world_process_zero():
        Path(args.output).write_text(json.dumps(metrics, indent=1))
    trainer.accelerator.end_training()
    return metrics
