"""A Trainer that remembers what its model card will tell."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from transformers.trainer_utils import TrainOutput

from ..card.detection_report import ImageDetections
from ..card.model_card import DetectionModelCardData
from ..card.training_card import (
    EVAL,
    VALIDATION,
    Evaluation,
    Evaluations,
    held_out_of,
    report_facts,
    training_facts,
    write_card,
    write_pictures,
)
from .sharing_trainer import SharingTrainer

# What `Trainer.create_model_card` calls some of the fields.
_NAMES_OF_TRAINER = {"finetuned_from": "base_model", "dataset": "dataset_name", "dataset_tags": "dataset_id"}


class CardTrainer(SharingTrainer):
    """
    A `Trainer` that writes a full model card: it remembers its data sets, its evaluations and its minutes.

    Attributes:
        card_facts (`dict[str, Any]`): Fields of [`DetectionModelCardData`] that the card should have beyond what the
            trainer knows, or in its place.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.card_facts: dict[str, Any] = {}
        # While training goes on from what a frozen part made of them: the data sets with their images.
        self._replaced_datasets: dict[str, Any] | None = None
        self._evaluations = Evaluations()
        # What the evaluation that is going on has found; `None` if others than ours compute its metrics.
        self._images: list[ImageDetections] | None = None
        # Minutes and step of the training that is gone on with.
        self._before: tuple[float, int | None] | None = None
        self._started: float | None = None

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`."""
        self._before, self._started = None, time.monotonic()
        self._evaluations = Evaluations()  # those so far were of other weights
        try:
            output = super().train(*args, **kwargs)
        finally:
            self._started = None
        best_is_loaded = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        if best_is_loaded and not isinstance(self.eval_dataset, dict) and EVAL not in self._evaluated():
            # The best step was before an interruption. The threshold is chosen by what it finds.
            self._images = None
            evaluated = self.predict(self.eval_dataset, metric_key_prefix=EVAL)
            self._remember(EVAL, evaluated.metrics or {}, self.eval_dataset)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; while training, with the minutes so far, those before an interruption included."""
        if self._started is not None:
            if self._before is None:
                # The history of a run that goes on is that of its checkpoint.
                last = self.state.log_history[-1] if self.state.log_history else {}
                self._before = last.get("minutes", 0.0), last.get("step")
            minutes, step = self._before
            # A finished run that is gone on with, for its card, trains no longer.
            if self.state.global_step != step:
                minutes += (time.monotonic() - self._started) / 60
            logs["minutes"] = round(minutes, 2)
        super().log(logs, start_time)

    def log_metrics(self, split: str, metrics: dict[str, float]) -> None:
        """
        Print metrics as they are. (`Trainer.log_metrics` takes what has "_mem_" in its name for bytes, and "_runtime"
        for seconds: classes may be called so.)
        """
        if not self.is_world_process_zero():
            return
        shown = {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in metrics.items()}
        widths = [max(map(len, texts), default=0) for texts in (shown.keys(), shown.values())]
        lines = (f"\n  {name:<{widths[0]}} = {shown[name]:>{widths[1]}}" for name in sorted(shown))
        print(f"***** {split} metrics *****{''.join(lines)}")  # noqa: T201 (as it does)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = EVAL,
    ) -> dict[str, float]:
        """As `Trainer.evaluate`; the model card tells of what was evaluated last under each prefix."""
        self._images = None
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):  # the name of one of several
            dataset = self.eval_dataset[dataset]
        if not isinstance(dataset, dict):  # those of several data sets are remembered one by one
            self._remember(metric_key_prefix, metrics, dataset)
        return metrics

    def remember_images(self, images: Sequence[ImageDetections]) -> None:
        """What an evaluation found; called when its metrics are computed. An image that came twice counts once."""
        by_id: dict[int, ImageDetections] = {}
        for image in images:
            by_id.setdefault(image.image_id, image)
        self._images = [by_id[image_id] for image_id in sorted(by_id)]

    def create_model_card(self, model_name: str | None = None, **facts: Any) -> None:
        """
        Write the model card and its pictures into the output folder, from what happened; while training goes on,
        without the pictures. `push_to_hub` calls this.

        The results are of the split that was evaluated under a prefix of its own (`metric_key_prefix="test"`), or else
        of the validation split.

        Args:
            model_name (`str`, *optional*): By default the name of the output folder.
            facts: Fields of [`DetectionModelCardData`], or what `Trainer` calls some of them (`finetuned_from`,
                `dataset`, `dataset_tags`); they go before `card_facts`, and those before what the trainer
                knows.
        """
        facts = self._named_facts(facts)
        if not self.is_world_process_zero():
            return
        evaluations = self._evaluated()
        given = {
            split: dataset
            for split, dataset in self._given_datasets().items()
            if dataset is not None and not isinstance(dataset, dict)
        }
        # What --auto_find_batch_size has found may be less than the arguments say.
        per_step = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        is_trained = self.state.global_step > 0
        known = training_facts(self.model, self.args, self.state.log_history, given, evaluations, per_step, is_trained)
        known |= report_facts(evaluations, self.model.config.id2label)
        if model_name is not None:
            known["model_name"] = model_name
        data = DetectionModelCardData(**{**known, **self.card_facts, **facts})
        if not self.is_in_train:
            for name, value in write_pictures(self.args.output_dir, data, held_out_of(evaluations)).items():
                setattr(data, name, value)
        write_card(self.args.output_dir, data)

    def _named_facts(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Fields of the card, by its own names."""
        facts = {_NAMES_OF_TRAINER.get(name, name): value for name, value in facts.items()}
        known = [field.name for field in dataclasses.fields(DetectionModelCardData)]
        unknown = [name for name in (*facts, *self.card_facts) if name not in known]
        if unknown:
            raise TypeError(f"The model card has no {', '.join(unknown)}. It has: {', '.join(known)}.")
        return facts

    def _remember(self, prefix: str, metrics: dict[str, float], dataset: Any) -> None:
        """Keep what was found for the model card."""
        if dataset is self.eval_dataset:
            dataset = self._given_datasets()[VALIDATION]
        evaluation = Evaluation(prefix, self._step_of_weights(), metrics, self._images, dataset)
        self._evaluations.add(evaluation, self.state.best_global_step)

    def _given_datasets(self) -> dict[str, Any]:
        """By split, what the user has given, with its images."""
        return self._replaced_datasets or {"train": self.train_dataset, VALIDATION: self.eval_dataset}

    def _step_of_weights(self) -> int:
        """The step that the model's weights are of: after training, the best one's if `load_best_model_at_end`."""
        if self.args.load_best_model_at_end and not self.is_in_train and self.state.best_model_checkpoint is not None:
            return self.state.best_global_step or 0
        return self.state.global_step

    def _evaluated(self) -> dict[str, Evaluation]:
        """The evaluations of the model's weights, by prefix."""
        return self._evaluations.of(self._step_of_weights())
