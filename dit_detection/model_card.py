"""The model card of a trained detector, written from what happened in its training."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

_TEMPLATE = Path(__file__).with_name("model_card_template.md")

# In the order of the card. Sizes are COCO's, by area in original pixels.
_METRIC_NAMES = {
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

# Below these, the card warns of thin evidence.
_FEW_OBJECTS, _FEW_IMAGES = 50, 200


@dataclass(kw_only=True)
class DetectionModelCardData:
    """
    What is known of a trained detector. Whatever is left out is left out of the card, too.

    Args:
        model_name (`str`): What the card calls the model.
        config (`PreTrainedConfig` or `Mapping`): Of the model; `id2label` is needed, `timestep` is used.
        repo_id (`str`, *optional*): Of the model on the Hub, for the examples; `model_name` by default.
        base_model (`str`, *optional*): The DiT checkpoint that was fine-tuned: Hub id, or local path, of which only
            the last part is shown.
        license (`str`, *optional*): Hub identifier of the weights' licence. The published DiT-XL/2 weights are
            CC-BY-NC 4.0, and so is what comes from them, whatever is said here.
        dataset_name (`str`, *optional*): For people.
        dataset_id (`str`, *optional*): Of the dataset on the Hub.
        dataset_fingerprint (`str`, *optional*): Identifies the exact data.
        split_sizes (`Mapping[str, int]`): Images per split.
        class_counts (`Mapping[str, Mapping[str, int]]`): Objects per split and class name.
        train_split (`str`, defaults to `"train"`): Key of the training split in the two above.
        metrics (`Mapping[str, float]`): Results of `CocoMetric` on the held-out split, without prefix.
        metrics_split (`str`, defaults to `"test"`): The split `metrics` were measured on.
        command (`str`, *optional*): The command that trained the model, shown as it is.
        seed (`int`, *optional*): Of the training.
        minutes (`float`, *optional*): Duration of the training.
        hardware (`str`, *optional*): What the training ran on.
        versions (`Mapping[str, str]`): Versions by library.
        hyperparameters (`Mapping[str, Any]`): Shown as a table.
        sample_picture, history_picture (`str`, *optional*): File names relative to the card.
        limits (`Sequence[str]`): Known weaknesses, one sentence each, beside those that follow from the numbers.
    """

    model_name: str
    config: Any
    repo_id: str | None = None
    base_model: str | None = None
    license: str | None = None
    dataset_name: str | None = None
    dataset_id: str | None = None
    dataset_fingerprint: str | None = None
    split_sizes: Mapping[str, int] = field(default_factory=dict)
    class_counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    train_split: str = "train"
    metrics: Mapping[str, float] = field(default_factory=dict)
    metrics_split: str = "test"
    command: str | None = None
    seed: int | None = None
    minutes: float | None = None
    hardware: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    sample_picture: str | None = None
    history_picture: str | None = None
    limits: Sequence[str] = ()

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by label, in the order of the labels."""
        return dict(sorted((int(label), name) for label, name in _get(self.config, "id2label").items()))

    @property
    def is_non_commercial(self) -> bool:
        """Whether the weights come from the published DiT-XL/2, in diffusers' layout or the original one."""
        return self.base_model is not None and bool(re.search(r"DiT-XL-2-(256|512)", self.base_model))

    def hub_metadata(self) -> ModelCardData:
        """Give the front matter of the card, with the results as the Hub's model index."""
        dataset = self.dataset_name or self.dataset_id
        results = [
            EvalResult(
                task_type="object-detection",
                task_name="Object Detection",
                dataset_type=self.dataset_id or re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-"),
                dataset_name=dataset,
                dataset_split=self.metrics_split,
                metric_type="mean_average_precision",
                metric_name=_METRIC_NAMES[key],
                metric_value=round(float(self.metrics[key]), 4),
            )
            for key in _HUB_METRICS
            if dataset is not None and self.metrics.get(key, -1) >= 0
        ]
        return ModelCardData(
            library_name="transformers",
            pipeline_tag="object-detection",
            tags=["dit_detection", "diffusion-transformer", "object-detection"],
            license="cc-by-nc-4.0" if self.is_non_commercial else self.license,
            base_model=self.base_model if _is_hub_id(self.base_model) else None,
            datasets=None if self.dataset_id is None else [self.dataset_id],
            metrics=["mean_average_precision"] if self.metrics else None,
            model_name=self.model_name if results else None,
            eval_results=results or None,
        )


def create_model_card(data: DetectionModelCardData) -> ModelCard:
    """
    Write the model card of a detector; sections without data are left out.

    Args:
        data ([`DetectionModelCardData`]): What is known of the model.

    Returns:
        `huggingface_hub.ModelCard`: To be saved as `README.md` beside the weights.

    Raises:
        ValueError: If the metrics lack `map`, as those with a prefix such as `eval_` do.
    """
    if data.metrics and "map" not in data.metrics:
        raise ValueError(f"metrics must have 'map', got {sorted(data.metrics)}. Remove a prefix such as 'eval_'.")
    names = list(data.id2label.values())
    splits = list(data.class_counts)
    results = {name: data.metrics.get(_class_key(label, name), -1) for label, name in data.id2label.items()}
    counts = data.class_counts.get(data.metrics_split)
    dataset = data.dataset_name or data.dataset_id
    return ModelCard.from_template(
        data.hub_metadata(),
        template_path=str(_TEMPLATE),
        title=_escaped(data.model_name),
        repo_id=data.repo_id or data.model_name,
        base_model_text=_linked(data.base_model),
        timestep=_get(data.config, "timestep"),
        dataset_text=f"[{_escaped(dataset)}](https://huggingface.co/datasets/{data.dataset_id})"
        if data.dataset_id
        else dataset and _escaped(dataset),
        class_names=[_escaped(name) for name in names],
        count_splits=splits,
        count_rows=[[_escaped(name), *(data.class_counts[split].get(name, 0) for split in splits)] for name in names]
        if splits
        else [],
        metrics_split=data.metrics_split,
        metrics_images=data.split_sizes.get(data.metrics_split),
        overall_rows=_overall_rows(data.metrics),
        class_header=["class", "mAP"] if counts is None else ["class", "objects", "mAP"],
        class_rows=[
            [_escaped(name), *([] if counts is None else [counts.get(name, 0)]), f"{value:.3f}"]
            for name, value in results.items()
            if value >= 0
        ],
        undefined_classes=[_escaped(name) for name, value in results.items() if value < 0] if data.metrics else [],
        sample_picture=data.sample_picture,
        training_facts=_training_facts(data),
        command=data.command,
        hyperparameter_rows=[[_escaped(name), _escaped(value)] for name, value in data.hyperparameters.items()],
        history_picture=data.history_picture,
        limits=_limits(data),
        license_text=_license_text(data),
    )


def _overall_rows(metrics: Mapping[str, float]) -> list[list[str]]:
    limits = [key for key in metrics if re.fullmatch(r"mar_\d+", key)]
    recalls = {key: f"mAR, the best {key.removeprefix('mar_')} per image and class" for key in limits}
    # -1 stands for undefined: a split without small objects has no map_small.
    return [
        [name, f"{metrics[key]:.3f}"] for key, name in (_METRIC_NAMES | recalls).items() if metrics.get(key, -1) >= 0
    ]


def _training_facts(data: DetectionModelCardData) -> list[str]:
    sizes = ", ".join(f"{split} {size}" for split, size in data.split_sizes.items())
    versions = ", ".join(f"{library} {version}" for library, version in data.versions.items())
    facts = {
        "Images": sizes,
        "Fingerprint of the data": data.dataset_fingerprint and f"`{data.dataset_fingerprint}`",
        "Seed": None if data.seed is None else str(data.seed),
        "Duration": None if data.minutes is None else f"{data.minutes:.1f} minutes",
        "Hardware": data.hardware,
        "Versions": versions,
    }
    return [f"{name}: {value}" for name, value in facts.items() if value]


def _limits(data: DetectionModelCardData) -> list[str]:
    limits = ["It knows the classes above and no others; what resembles one of them may be taken for it."]
    if data.train_split in data.class_counts:
        counts = [(name, data.class_counts[data.train_split].get(name, 0)) for name in data.id2label.values()]
        few = [f"{_escaped(name)} ({count})" for name, count in counts if count < _FEW_OBJECTS]
        if few:
            limits.append(f"Classes with few training objects: {', '.join(few)}.")
    if data.metrics and data.metrics_split == data.train_split:
        limits.append("The results were measured on the training images and say little about others.")
    elif data.metrics:
        limits.append("The results hold for images like the dataset's; measure on your own before relying on it.")
    images = data.split_sizes.get(data.metrics_split)
    if data.metrics and images is not None and images < _FEW_IMAGES:
        limits.append(f"The results rest on {images} images: small differences between models mean little.")
    return [*limits, *data.limits]


def _license_text(data: DetectionModelCardData) -> str | None:
    if data.is_non_commercial:
        return (
            f"The weights derive from {_linked(data.base_model)}, published under "
            "[CC-BY-NC 4.0](https://creativecommons.org/licenses/by-nc/4.0/): no commercial use. "
            "The Python code beside them is under Apache-2.0."
        )
    return data.license and f"The weights are under `{data.license}`, the Python code beside them is under Apache-2.0."


def _class_key(label: int, name: str) -> str:
    """The key `CocoMetric` reports a class under."""
    key = f"map_{name}"
    return f"{key}_{label}" if key in _METRIC_NAMES else key


def _linked(base_model: str | None) -> str | None:
    if base_model is None:
        return None
    if _is_hub_id(base_model):
        return f"[{base_model}](https://huggingface.co/{base_model})"
    # The rest of a local path is nobody's business.
    return f"`{Path(base_model).name}`"


def _is_hub_id(name: str | None) -> bool:
    return name is not None and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def _escaped(text: Any) -> str:
    """One line of text that Markdown, tables included, shows as it is."""
    return re.sub(r"([\\`*\[\]<|])", r"\\\1", " ".join(str(text).split()))


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
