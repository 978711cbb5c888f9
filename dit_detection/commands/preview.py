"""A picture grid of exactly what the model is fed: each image plain, then as the first epochs of training show it."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data import DetectionDataset, class_names_of, load_detection_dataset
from ..model.image_processing_dit_detection import DiTDetectionImageProcessor
from ..visualize import draw_detections, draw_grid
from .shared_options import add_data_options, data_arguments, refuse_output
from .train_options import read_augmentation

MAX_IMAGES = 100  # more rows would be higher than a JPEG can be
STRIPE = 8  # pixels; the padding is drawn in stripes of two greys


def main(argv: Sequence[str] | None = None) -> Image.Image:
    """Run the job; returns the picture that is written."""
    parser = argparse.ArgumentParser(prog="dit-detect preview", description=__doc__)
    parser.add_argument("dataset", help="annotated images, in any form that `dit-detect train` reads")
    parser.add_argument("--output", default="preview.jpg", help="picture to write")
    parser.add_argument("--num_images", type=int, default=16, help="evenly spaced through the split, one per row")
    parser.add_argument("--num_views", type=int, default=3, help="augmented views of each, those of the first epochs")
    parser.add_argument("--split", default="train", help="train, validation or test")
    group = add_data_options(parser)
    group.add_argument("--image_size", type=int, nargs="+", default=[512], help="canvas: a side, or height and width")
    group.add_argument("--augmentation", default="{}", help="JSON, a JSON file, or 'none'")
    args = parser.parse_args(argv)
    refuse_output(parser, "output", args.output, is_picture=True)
    if not 1 <= args.num_images <= MAX_IMAGES or args.num_views < 0:
        parser.error(
            f"--num_images {args.num_images} --num_views {args.num_views}: need 1 to {MAX_IMAGES} images and 0 views "
            "or more."
        )
    if len(args.image_size) > 2 or min(args.image_size) < 1:
        parser.error(f"--image_size {args.image_size}: give a side in pixels, or height and width.")
    try:
        augmentation = read_augmentation(args.augmentation)
        dataset = load_detection_dataset(args.dataset, on_invalid=args.on_invalid, **data_arguments(args))
    except ValueError as error:
        parser.error(str(error))
    if args.split not in dataset:
        parser.error(f"--split {args.split}: {args.dataset} has {', '.join(dataset)}.")
    rows = dataset[args.split]
    image_processor = DiTDetectionImageProcessor(
        size={"max_height": args.image_size[0], "max_width": args.image_size[-1]}
    )
    plain = DetectionDataset(rows, image_processor)
    augmented = DetectionDataset(rows, image_processor, augmentation, seed=args.seed)
    class_names = class_names_of(rows)
    num_views = 0 if augmentation is None else args.num_views
    pictures, captions = [], []
    for index in torch.linspace(0, len(rows) - 1, min(args.num_images, len(rows))).long().tolist():
        entries = [plain[index], *(augmented.get_view(index, view) for view in range(num_views))]
        pictures += [draw_entry(entry, image_processor, class_names) for entry in entries]
        captions += [f"image_id {entries[0]['labels']['image_id'].item()}"]
        captions += [f"epoch {view}" for view in range(num_views)]
    grid = draw_grid(pictures, columns=1 + num_views, captions=captions)
    grid.save(args.output)
    print(f"{len(pictures) // (1 + num_views)} images in {1 + num_views} views: {args.output}")
    return grid


def draw_entry(
    entry: Mapping[str, Any], image_processor: DiTDetectionImageProcessor, class_names: Sequence[str]
) -> Image.Image:
    """
    One entry of a [`DetectionDataset`] as a picture: the whole canvas with its padding striped, and all boxes.

    Args:
        entry (`dict`): `pixel_values` `(3, H, W)`, `pixel_mask` `(H, W)` and `labels`.
        image_processor (`DiTDetectionImageProcessor`): Whose normalisation is undone.
        class_names (`Sequence[str]`): In the order of the labels.
    """
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
    )
    pixels = ((entry["pixel_values"] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)  # (3, H, W)
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in pixels.shape[1:]), indexing="ij")
    stripes = torch.where((rows + columns) // STRIPE % 2 == 0, 205, 235).to(torch.uint8)
    pixels = torch.where(entry["pixel_mask"].bool(), pixels, stripes)
    labels = entry["labels"]
    all_names = [*class_names, *(f"{name} (crowd)" for name in class_names)]
    names = [all_names[label] for label in (labels["class_labels"] + labels["iscrowd"] * len(class_names)).tolist()]
    picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    return draw_detections(picture, _boxes_on_canvas(labels), names, class_names=all_names, ground_truth=True)


def _boxes_on_canvas(labels: Mapping[str, Tensor]) -> Tensor:
    """Boxes of labels → `(M, 4)`, xyxy, input pixels."""
    height, width = labels["size"].tolist()
    centers, sides = labels["boxes"][:, :2], labels["boxes"][:, 2:]
    boxes = torch.cat([centers - sides / 2, centers + sides / 2], dim=1)
    return boxes * boxes.new_tensor([width, height, width, height])
