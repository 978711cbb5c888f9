"""Against class imbalance: images of rare classes more often, or rare classes with more weight in the loss."""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from .row_format import class_names_of


class RepeatFactorSampler(Sampler[int]):
    """
    Indices in random order, each as often as its factor says: 2.3 is twice and, in 3 of 10 epochs, three times.

    Invariants: the order follows from (seed, epoch) alone, so it is the same in every process and after a restart; all
    epochs are equally long; no index is ever left out. For an equal length the fractions are rounded together, by
    systematic sampling in random order; their sum is rounded up, so all of them grow by up to 1 in total.

    Args:
        repeat_factors (`Sequence[float]`): One per image, 1 or more; of `repeat_factors_of`.
        seed (`int`): 0 or more.
    """

    def __init__(self, repeat_factors: Sequence[float] | np.ndarray, seed: int = 0) -> None:
        factors = np.asarray(repeat_factors, dtype=np.float64)
        self.whole = np.floor(factors).astype(np.int64)
        fractions = factors - self.whole
        # Five times 0.6 is 3 and a rounding error, which is no image more.
        self.num_extra = int(np.ceil(fractions.sum() - 1e-9))
        self.fractions = fractions * (self.num_extra / max(fractions.sum(), 1e-12))
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return int(self.whole.sum()) + self.num_extra

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.whole))
        # Marks at distance 1 on the fractions laid end to end: each gets one with a probability of its length.
        ends = np.cumsum(self.fractions[order])
        marks = np.arange(self.num_extra) + generator.random()
        marked = np.searchsorted(ends, marks, side="right").clip(max=len(order) - 1)
        indices = np.concatenate([np.repeat(np.arange(len(order)), self.whole), order[marked]])
        yield from generator.permutation(indices).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch from now on. `DetectionTrainer` calls it."""
        self.epoch = epoch


class EpochCallback(TrainerCallback):
    """
    Tells data set and sampler the epoch.

    accelerate (1.15) tells only one of the two, and after a restart in mid-epoch or in several processes not the one
    that it tells otherwise.
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Called by the Trainer, also for the epoch in which training goes on after a restart."""
        batch_sampler = train_dataloader.batch_sampler  # in several processes accelerate's, around the one of torch
        sampler = getattr(getattr(batch_sampler, "batch_sampler", batch_sampler), "sampler", None)
        for part in (train_dataloader.dataset, sampler):
            if part is not None and hasattr(part, "set_epoch"):
                part.set_epoch(int(state.epoch or 0))

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Called by the Trainer after a pass; those through a stream, whose length is not known, it counts as one."""
        if not control.should_training_stop and not has_length(train_dataloader):
            state.epoch = int(state.epoch or 0) + 1


def repeat_factors_of(rows: datasets.Dataset, threshold: float) -> np.ndarray:
    """
    How often each image should come in an epoch, so that rare classes are seen: the largest of its classes' factors.

    The factor of a class is max(1, sqrt(threshold / f)), f the share of the images that have it. Crowd regions do not
    count.

    Args:
        rows (`datasets.Dataset`): In the row format.
        threshold (`float`): Classes in a smaller share of the images than this are repeated; LVIS takes 0.001.

    Returns:
        `np.ndarray` of shape `(len(rows),)`: 1 or more.

    Raises:
        ValueError: The threshold is not above 0.

    Source: LVIS (arXiv 1908.03195), appendix B.
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}; it must be above 0.")
    images, classes = _classes_of_objects(rows)
    present = np.unique(np.stack([images, classes]), axis=1)  # each class once per image
    num_images = np.bincount(present[1])
    with np.errstate(divide="ignore"):
        class_factors = np.sqrt(threshold * len(rows) / num_images)
    factors = np.ones(len(rows))
    np.maximum.at(factors, present[0], class_factors[present[1]])
    return factors


def class_weights_of(rows: datasets.Dataset, beta: float = 0.999) -> list[float]:
    """
    One weight per class on the class loss, larger for rarer classes: `DiTDetectionConfig(class_weights=...)`.

    The weight of a class with n objects is proportional to (1 - beta) / (1 - beta ** n), and the mean weight of the
    classes that occur is 1. Those that do not occur get 1. Crowd regions do not count.

    Args:
        rows (`datasets.Dataset`): In the row format.
        beta (`float`): From 0, where all classes weigh the same, towards 1, where weights are inverse to n. With 0.999
            they level off at about 1000 objects, where one more of a kind shows little that is new.

    Raises:
        ValueError: `beta` is out of its range.

    Source: Class-Balanced Loss Based on Effective Number of Samples (arXiv 1901.05555).
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta is {beta}; it must be at least 0 and below 1.")
    counts = np.bincount(_classes_of_objects(rows)[1], minlength=len(class_names_of(rows)))
    weights = np.ones(len(counts))
    occurs = counts > 0
    if occurs.any():
        inverse = (1 - beta) / (1 - beta ** counts[occurs])
        weights[occurs] = inverse / inverse.mean()
    return [float(weight) for weight in weights]


def _classes_of_objects(rows: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Row number and label of every object but crowd regions, each `(M,)`; without making Python objects of them."""
    table = rows.select_columns("objects").with_format("arrow")[:]
    objects = table["objects"].combine_chunks()
    categories = pc.struct_field(objects, "category")
    images = pc.list_parent_indices(categories).to_numpy()
    is_object = pc.list_flatten(pc.struct_field(objects, "iscrowd")).to_numpy() == 0
    return images[is_object], pc.list_flatten(categories).to_numpy()[is_object]
