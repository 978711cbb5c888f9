"""A detector on images → boxes as JSON, COCO, YOLO or Parquet, and pictures."""

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, IterableDataset

from ..adapters import load_detector, load_image_processor
from ..data import InvalidDatasetError
from ..data.image_listing import is_dataset, list_images, open_dataset, open_list
from ..inference.batch_inference import predict_images, settings_of
from ..inference.batch_predictor import model_class_names
from ..inference.prediction_formats import write_predictions, yolo_label_names
from ..inference.prediction_shards import PredictionShards, SettingsChangedError
from ..model.load_dit import refuse_revision
from .shared_options import add_checkpoint

UNREADABLE = 3  # the exit code when all is done, but not all images could be read
MAX_NAMED = 10  # unreadable images in the message at the end


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job."""
    parser = argparse.ArgumentParser(
        prog="dit-detect predict",
        description=f"{__doc__} Run again, it goes on where it was stopped; with `accelerate launch` it runs on "
        "several devices. Exit code 3: done, but some images could not be read; their predictions say why.",
    )
    add_checkpoint(parser)
    parser.add_argument(
        "images", nargs="+", help="image files and folders of them (searched in depth), or one data set of `datasets`"
    )
    parser.add_argument("--output_dir", default="predictions", help="for the predictions and what a later run needs")
    parser.add_argument(
        "--format",
        default="json",
        choices=["json", "coco", "yolo", "parquet"],
        help="predictions.json with pictures, coco.json, yolo/, or the shards alone, which are always there",
    )
    parser.add_argument("--threshold", type=float, default=0.3, help="scores must be above it")
    parser.add_argument("--nms_threshold", type=float, help="overlap above which one is dropped; default: the model's")
    parser.add_argument("--batch_size", type=int, default=8, help="images at a time, on each device")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that read images, for each device")
    parser.add_argument("--shard_size", type=int, default=256, help="images per shard: what a kill loses at most")
    parser.add_argument("--no_pictures", action="store_true", help="draw none")
    parser.add_argument("--overwrite", action="store_true", help="throw away what is in --output_dir and start afresh")
    group = parser.add_argument_group("of a data set")
    group.add_argument("--dataset_config_name", help="needed if it has several configurations")
    group.add_argument("--split", help="needed if there are several")
    group.add_argument("--dataset_revision", help="commit, branch or tag on the Hub")
    group.add_argument("--streaming", action="store_true", help="read it as it passes, without a copy on this disk")
    args = parser.parse_args(argv)
    for name, least in {"batch_size": 1, "shard_size": 1, "num_workers": 0}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; it must be {least} or more.")
    for name in ("threshold", "nms_threshold"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            parser.error(f"--{name} is {value}; it must lie between 0 and 1.")

    refuse_revision(args.checkpoint, args.revision)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    shards, listing = PredictionShards(output_dir), output_dir / "images.arrow"
    # What an image's predictions, and the files they lie in, depend on beside the model.
    how = {"threshold": args.threshold, "nms_threshold": args.nms_threshold, "shard_size": args.shard_size}
    # Without `cpu`, processes on a machine without a GPU would not know of each other.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # A process that has done its share waits for the slowest, which may take longer than any other collective call.
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
    try:
        images = _open_images(args, state, listing)
        model = load_detector(args.checkpoint, revision=args.revision).to(state.device).eval()
        image_processor = load_image_processor(args.checkpoint, revision=args.revision)
        pictures = output_dir / "pictures" if args.format == "json" and not args.no_pictures else None
        if state.is_main_process:
            # Without them it does not matter whether an earlier run drew some.
            more = {} if pictures is None else {"pictures": True}
            if isinstance(images, IterableDataset):
                names = ("dataset_config_name", "split", "dataset_revision")
                more |= {"source": args.images} | {name: getattr(args, name) for name in names}
            if args.overwrite:  # now that all there is to read has been found
                shards.remove()
            shards.start(settings_of(model, image_processor, images, **how, **more))
        state.wait_for_everyone()
        predict_images(
            model,
            image_processor,
            images,
            shards,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            pictures=pictures,
            **how,
        )
        state.wait_for_everyone()
        if state.is_main_process:
            manifest = shards.finish(len(images) if isinstance(images, Dataset) else None)
            target = output_dir / "shards"
            if args.format != "parquet":
                target = write_predictions(shards, output_dir, args.format, model_class_names(model))
            by = "" if state.num_processes == 1 else f", by {state.num_processes} processes"
            print(f"{manifest['num_detections']} detections in {manifest['num_images']} images{by}: {target}")
            _report_unreadable(shards, manifest["num_unreadable"])
    except (InvalidDatasetError, SettingsChangedError) as error:
        parser.error(str(error))
    finally:
        if state.is_main_process:
            listing.unlink(missing_ok=True)
        state.destroy_process_group()


def _open_images(args: argparse.Namespace, state: PartialState, listing: Path) -> Dataset | IterableDataset:
    if any(map(is_dataset, args.images)):
        if len(args.images) > 1:
            raise InvalidDatasetError(f"{', '.join(args.images)}: name one data set, or image files and folders.")
        source = Path(args.images[0])
        if source.is_dir() and Path(args.output_dir).resolve().is_relative_to(source.resolve()):
            raise InvalidDatasetError(
                f"--output_dir {args.output_dir} lies in the data set, which from then on would have the predictions "
                "among its rows. Name a folder outside."
            )
        with state.main_process_first():  # the others find in the cache what it prepares
            options = (args.dataset_config_name, args.split, args.dataset_revision, args.streaming)
            return open_dataset(args.images[0], *options)
    for source in args.images:
        if source.endswith(".parquet") and Path(source).is_file():
            raise InvalidDatasetError(f"{source} is no image. Of a data set in files name the folder they lie in.")
    if args.streaming or args.dataset_config_name or args.split or args.dataset_revision:
        given = "--streaming, --dataset_config_name, --split and --dataset_revision"
        raise InvalidDatasetError(f"{given} are for a data set, not for files and folders.")
    # By one process, so that a file which appears in the meantime is in the list of all or of none.
    if state.is_main_process:
        list_images(args.images, listing)
    state.wait_for_everyone()
    images = open_list(listing)
    if args.format == "yolo":  # two images of one label file are found before all are predicted
        yolo_label_names([encoded["path"] for encoded in images.with_format(None)["image"]])
    return images


def _report_unreadable(shards: PredictionShards, count: int) -> None:
    if count:
        broken = islice((f"{found['file']} {found['error']}" for found in shards if found["error"]), MAX_NAMED)
        named = "\n  ".join(broken)
        print(
            f"dit-detect predict: {count} of the images could not be read; their predictions say why:\n  {named}",
            file=sys.stderr,
        )
        sys.exit(UNREADABLE)
