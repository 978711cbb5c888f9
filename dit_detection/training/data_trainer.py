"""A Trainer that feeds a detector: rare classes more often, frozen parts once, the data set that is asked for."""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers.trainer_utils import TrainOutput

from ..adapters import detector_of
from ..card.training_card import VALIDATION
from ..data import DetectionDataset, RepeatFactorSampler, repeat_factors_of
from .card_trainer import CardTrainer
from .frozen_cache import cache_frozen
from .frozen_dataset import FrozenDataset


class DataTrainer(CardTrainer):
    """
    A `Trainer` with the images as detection wants them.

    Invariant: while training goes on from what a frozen part made of the data sets, and only then, that stands in
    their place.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.train_dataset is not None:
            self._repeat_factors()  # refuses now what cannot be repeated

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`; with `args.cache_frozen` the frozen part first runs over the data sets, once."""
        self._replaced_datasets = self._given_datasets()
        try:
            if self.args.cache_frozen and self.model_init is None:
                self._use_frozen_cache(self.model)
            return super().train(*args, **kwargs)
        finally:
            self.train_dataset, self.eval_dataset = self._replaced_datasets.values()
            self._replaced_datasets = None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As `Trainer.call_model_init`; with `args.cache_frozen` the frozen part is that of the model of the trial."""
        model = super().call_model_init(trial)
        if self.args.cache_frozen and getattr(self, "is_in_train", False):  # not for the model of `__init__`
            self._use_frozen_cache(model)
        return model

    def _use_frozen_cache(self, model: nn.Module) -> None:
        """Put what the frozen part of `model` makes of the given data sets in their place."""
        given = self._given_datasets()
        self.train_dataset = self._without_frozen_part(model, given["train"])
        if self.args.eval_strategy != "no":
            self.eval_dataset = self._without_frozen_part(model, given[VALIDATION])

    def _without_frozen_part(self, model: nn.Module, dataset: Any) -> Any:
        """The data set after the frozen part; dicts of evaluation sets one by one."""
        if isinstance(dataset, dict):
            return {name: self._without_frozen_part(model, one) for name, one in dataset.items()}
        if isinstance(dataset, FrozenDataset):
            return dataset
        return cache_frozen(
            detector_of(model),
            dataset,
            dtype=torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32,
            cache_dir=self.args.frozen_cache_dir,
            batch_size=self.args.per_device_train_batch_size,
            num_workers=self.args.dataloader_num_workers,
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        factors = self._repeat_factors()
        if factors is None:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return RepeatFactorSampler(factors, seed)

    def _repeat_factors(self) -> np.ndarray | None:
        """How often each training image comes per epoch; `None` if all come once."""
        threshold, dataset = self.args.repeat_factor_threshold, self._given_datasets()["train"]
        if threshold is None:
            return None
        if not isinstance(dataset, DetectionDataset):
            raise ValueError(
                f"repeat_factor_threshold={threshold} needs a DetectionDataset to train on, got "
                f"{type(dataset).__name__}: images are drawn by the classes in its rows."
            )
        return repeat_factors_of(dataset.rows, threshold)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As `Trainer`, which with persistent workers gives any data set the loader of the one before (5.23)."""
        name = eval_dataset if isinstance(eval_dataset, str) else None
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = dataset if name is None else self.eval_dataset[name]
        loaders = getattr(self, "_eval_dataloaders", {})
        loader = loaders.get(name or "eval")
        if loader is not None and loader.dataset is not dataset:
            # Its workers end now: those that the garbage collector finds are waited for, five seconds each.
            loaders.pop(name or "eval").base_dataloader._iterator = None
        return super().get_eval_dataloader(eval_dataset)
