"""What a model card is written from, and how it is kept."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..model.load_dit import PUBLISHED_DIT
from .detection_report import DetectionReport

# In the order of the card. Sizes are COCO's, by area in original pixels.
METRIC_NAMES = {
    "map": "mAP, IoU 0.50 to 0.95",
    "map_50": "mAP, IoU 0.50",
    "map_75": "mAP, IoU 0.75",
    "map_small": "mAP, small objects (below 32² pixels)",
    "map_medium": "mAP, medium objects (32² to 96² pixels)",
    "map_large": "mAP, large objects (above 96² pixels)",
    "mar_small": "mAR, small objects",
    "mar_medium": "mAR, medium objects",
    "mar_large": "mAR, large objects",
}
_HUB_METRICS = ("map", "map_50", "map_75")


@dataclass(kw_only=True)
class DetectionModelCardData:
    """
    What is known of a trained detector. Whatever is left out is left out of the card, too.

    Saved beside the card as `model_card.json`, from which card and plots can be made again.

    Args:
        model_name (`str`): What the card calls the model.
        config (`PreTrainedConfig` or `Mapping`): Of the model; `id2label` is needed, `timestep` is used.
        repo_id (`str`, *optional*): Of the model on the Hub, for the examples; `model_name` by default.
        base_model (`str`, *optional*): The DiT checkpoint that was fine-tuned: Hub id, or local path, of which the
            part that names the published DiT is kept, or else the last.
        adapter_of (`str`, *optional*): The detector that these weights are a LoRA adapter of: Hub id or name.
        has_code (`bool`, defaults to `True`): Whether the model's own code lies beside the weights.
        tags (`Sequence[str]`): More tags for the Hub.
        license (`str`, *optional*): Hub identifier of the weights' licence. The published DiT-XL/2 weights are
            CC-BY-NC 4.0, and so is what comes from them, whatever is said here.
        dataset_name (`str`, *optional*): For people.
        dataset_id (`str`, *optional*): Of the dataset on the Hub.
        fingerprints (`Mapping[str, str]`): What identifies the exact data, per split; see [`fingerprint_of`].
        split_sizes (`Mapping[str, int]`): Images per split.
        class_counts (`Mapping[str, Mapping[str, int]]`): Objects per split and class name.
        train_split (`str`, defaults to `"train"`): Key of the training split in the two above.
        metrics (`Mapping[str, float]`): Results of `CocoMetric` on the held-out split, without prefix.
        metrics_split (`str`, defaults to `"test"`): The split `metrics` were measured on.
        threshold (`float`, *optional*): Confidence that a detection should have; scores are compared with it in the
            examples of the card.
        threshold_split (`str`, *optional*): The split that it was chosen on; `None` if it was not chosen on data.
        report ([`DetectionReport`], *optional*): Of the held-out split, at this threshold.
        command (`str`, *optional*): The command that trained the model, shown as it is.
        seed (`int`, *optional*): Of the training.
        minutes (`float`, *optional*): Duration of the training.
        hardware (`str`, *optional*): What the training ran on.
        versions (`Mapping[str, str]`): Versions by library.
        hyperparameters (`Mapping[str, Any]`): Shown as a table.
        history (`Sequence[Mapping[str, Any]]`): Of the Trainer's log, what `plot_history` draws.
        sample_picture, worst_picture, history_picture, curves_picture, confusion_picture (`str`, *optional*): File
            names relative to the card.
        limits (`Sequence[str]`): Known weaknesses, one sentence each, beside those that follow from the numbers.
    """

    model_name: str
    config: Any
    repo_id: str | None = None
    base_model: str | None = None
    adapter_of: str | None = None
    has_code: bool = True
    tags: Sequence[str] = ()
    license: str | None = None
    dataset_name: str | None = None
    dataset_id: str | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    split_sizes: Mapping[str, int] = field(default_factory=dict)
    class_counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    train_split: str = "train"
    metrics: Mapping[str, float] = field(default_factory=dict)
    metrics_split: str = "test"
    threshold: float | None = None
    threshold_split: str | None = None
    report: DetectionReport | None = None
    command: str | None = None
    seed: int | None = None
    minutes: float | None = None
    hardware: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    sample_picture: str | None = None
    worst_picture: str | None = None
    history_picture: str | None = None
    curves_picture: str | None = None
    confusion_picture: str | None = None
    limits: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.is_non_commercial:
            self.license = "cc-by-nc-4.0"
        self.base_model, self.adapter_of = _without_folders(self.base_model), _without_folders(self.adapter_of)

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by label, in the order of the labels."""
        return dict(sorted((int(label), name) for label, name in config_value(self.config, "id2label").items()))

    @property
    def is_non_commercial(self) -> bool:
        """Whether the weights come from the published DiT-XL/2."""
        return self.base_model is not None and bool(PUBLISHED_DIT.search(self.base_model))

    def save(self, path: str | Path) -> None:
        """Write everything the card says as JSON; of the configuration, what the card uses."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["config"] = {"id2label": self.id2label, "timestep": config_value(self.config, "timestep")}
        values["report"] = None if self.report is None else dataclasses.asdict(self.report)
        text = json.dumps(values, indent=1, ensure_ascii=False, default=_plain)
        # Lists of numbers on one line each. Line breaks in strings are written as \n, so none of them is touched.
        text = re.sub(r"\[\n[-+\d.eE,\s]*\]", lambda match: re.sub(r"\s+", " ", match[0]), text)
        Path(path).write_text(text + "\n", encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, path: str | Path) -> "DetectionModelCardData":
        """
        Read what `save` wrote.

        Raises:
            ValueError: If the file is not of this kind.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values["report"] is not None:
                values["report"] = DetectionReport.from_dict(values["report"])
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not the saved state of a model card: {error!r}. Train or push again."
            ) from error

    def hub_metadata(self) -> ModelCardData:
        """Give the front matter of the card, with the results as the Hub's model index."""
        dataset = self.dataset_name or self.dataset_id
        results = [
            EvalResult(
                task_type="object-detection",
                task_name="Object Detection",
                dataset_type=self.dataset_id or re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-") or "unnamed",
                dataset_name=dataset,
                dataset_split=self.metrics_split,
                metric_type="mean_average_precision",
                metric_name=METRIC_NAMES[key],
                metric_value=round(float(self.metrics[key]), 4),
            )
            for key in _HUB_METRICS
            if dataset is not None and self.metrics.get(key, -1) >= 0
        ]
        base_model = self.adapter_of or self.base_model
        return ModelCardData(
            library_name="transformers" if self.adapter_of is None else "peft",
            pipeline_tag="object-detection",
            tags=list(dict.fromkeys(["dit_detection", "diffusion-transformer", "object-detection", *self.tags])),
            license=self.license,
            base_model=base_model if is_hub_id(base_model) else None,
            base_model_relation=None if self.adapter_of is None else "adapter",
            datasets=None if self.dataset_id is None else [self.dataset_id],
            metrics=["mean_average_precision"] if self.metrics else None,
            model_name=self.model_name if results else None,
            eval_results=results or None,
        )


def config_value(config: Any, name: str) -> Any:
    """A field of a configuration, or of what was saved of one; `None` if it has none of that name."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def is_hub_id(name: str | None) -> bool:
    """Whether a name has the form of the Hub's ids."""
    return name is not None and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name))


def _without_folders(model: str | None) -> str | None:
    """A Hub id as it is; of a local path, of which the rest is nobody's business, the part that tells what it is."""
    if model is None or (is_hub_id(model) and not Path(model).exists()):
        return model
    parts = [part for part in Path(model).parts if part != ".."] or [Path(model).resolve().name]
    return next((part for part in reversed(parts) if PUBLISHED_DIT.search(part)), parts[-1])


def _plain(value: Any) -> Any:
    """What JSON has no form for: numbers of numpy and torch as numbers, all else as its text."""
    return value.item() if hasattr(value, "item") else str(value)
