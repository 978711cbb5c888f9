"""The model card of a trained detector, written from what happened in its training."""

import json
from pathlib import Path

from huggingface_hub import ModelCard

from .model_card_data import DetectionModelCardData, config_value
from .model_card_text import (
    class_table,
    code_block,
    escaped,
    license_text,
    limits,
    linked,
    overall_rows,
    threshold_text,
    training_facts,
    training_is_known,
)

__all__ = ["DetectionModelCardData", "create_model_card"]

_TEMPLATE = Path(__file__).with_name("model_card_template.md")
# What `post_process_object_detection` of transformers' detectors takes where nothing is said.
_DEFAULT_THRESHOLD = 0.5


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
    class_header, class_rows, undefined_classes = class_table(data)
    dataset = data.dataset_name or data.dataset_id
    return ModelCard.from_template(
        data.hub_metadata(),
        template_path=str(_TEMPLATE),
        title=escaped(data.model_name),
        repo_id=json.dumps(data.repo_id or data.model_name, ensure_ascii=False),
        base_model_text=linked(data.base_model),
        adapter_of=linked(data.adapter_of),
        has_code=data.has_code,
        timestep=config_value(data.config, "timestep"),
        dataset_text=f"[{escaped(dataset)}](https://huggingface.co/datasets/{data.dataset_id})"
        if data.dataset_id
        else dataset and escaped(dataset),
        class_names=[escaped(name) for name in names],
        count_splits=list(map(escaped, splits)),
        count_rows=[[escaped(name), *(data.class_counts[split].get(name, 0) for split in splits)] for name in names]
        if splits
        else [],
        metrics_split=data.metrics_split,
        metrics_images=data.split_sizes.get(data.metrics_split),
        overall_rows=overall_rows(data.metrics),
        class_header=class_header,
        class_rows=class_rows,
        undefined_classes=undefined_classes,
        threshold_text=threshold_text(data),
        threshold=f"{_DEFAULT_THRESHOLD if data.threshold is None else data.threshold:.2f}",
        sample_picture=data.sample_picture,
        worst_picture=data.worst_picture,
        curves_picture=data.curves_picture,
        confusion_picture=data.confusion_picture,
        training_heading="How it was trained" if training_is_known(data) else "What it was measured on",
        training_facts=training_facts(data),
        command=data.command and code_block(data.command),
        hyperparameter_rows=[[escaped(name), escaped(value)] for name, value in data.hyperparameters.items()],
        history_picture=data.history_picture,
        limits=limits(data),
        license_text=license_text(data),
    )
