"""The images of a run: which of the training split, and in which form every model is fed them."""

from pathlib import Path

import datasets
import numpy as np
from datasets import DatasetDict

from dit_detection import DetectionAugmentation, DetectionDataset, DiTDetectionImageProcessor, load_detection_dataset
from dit_detection.anchor_fit import AnchorSetting, fit_to_splits
from dit_detection.data import class_names_of
from dit_detection.data.statistics import read_table

from .settings import Settings


def load_splits(folder: Path) -> DatasetDict:
    """
    The splits `train`, `validation` and `test` of a data set.

    Raises:
        ValueError: One of them is missing.
    """
    splits = load_detection_dataset(str(folder))
    missing = {"train", "validation", "test"} - set(splits)
    if missing:
        raise ValueError(f"{folder} has no split {sorted(missing)}, only {sorted(splits)}.")
    return splits


def draw_subset(rows: datasets.Dataset, fraction: float, seed: int) -> datasets.Dataset:
    """
    A share of the rows, at least one, drawn by the seed.

    Invariants: of two subsets of one seed the smaller is part of the larger; every class is in it, if it has at least
    as many images as there are classes.

    Args:
        rows (`datasets.Dataset`): In the row format.
        fraction (`float`): Above 0, at most 1.
        seed (`int`): 0 or more.

    Raises:
        ValueError: The fraction is out of its range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must be above 0 and at most 1.")
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    objects = rows.select_columns("objects").with_format(None)["objects"]
    classes_of = [set(entry["category"]) for entry in objects]
    # The first image of each class goes to the front. Rare classes first: their images often have the others, too.
    num_images = {label: sum(label in found for found in classes_of) for label in range(len(class_names_of(rows)))}
    front: list[int] = []
    for label in sorted((label for label, count in num_images.items() if count), key=lambda label: num_images[label]):
        if not any(label in classes_of[index] for index in front):
            front.append(next(index for index in order if label in classes_of[index]))
    order = front + [index for index in order if index not in front]
    return rows.select(order[: max(1, round(fraction * len(rows)))])


def make_processor(settings: Settings) -> DiTDetectionImageProcessor:
    """The image processor that puts images on the canvas, for every arm."""
    height, width = settings.canvas
    return DiTDetectionImageProcessor(size={"max_height": height, "max_width": width})


def training_images(rows: datasets.Dataset, settings: Settings, num_views: int | None = None) -> DetectionDataset:
    """What every arm trains on: with equal settings entry i in view e is the same, to the bit."""
    augmentation = DetectionAugmentation(**settings.augmentation)
    return DetectionDataset(rows, make_processor(settings), augmentation, seed=settings.seed, num_views=num_views)


def fitted_anchors(rows: datasets.Dataset, settings: Settings, start: AnchorSetting) -> AnchorSetting:
    """
    Anchors for these rows alone, or `start` if those do not cover them better. As `dit-detect train` does it, which
    also wants them to cover no fewer of the validation images.
    """
    fitted, is_better = fit_to_splits({"train": read_table("train", rows, settings.canvas)}, start, settings.seed)
    return fitted if is_better else start
