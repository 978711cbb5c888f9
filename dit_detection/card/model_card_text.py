"""The sentences and tables of a model card, as Markdown."""

import re
from collections.abc import Mapping
from typing import Any

from .model_card_data import METRIC_NAMES, DetectionModelCardData, is_hub_id

# Below these, the card warns of thin evidence.
_FEW_OBJECTS, _FEW_IMAGES = 50, 200


def overall_rows(metrics: Mapping[str, float]) -> list[list[str]]:
    """Rows of the table of overall metrics; -1 is undefined: a split without small objects has no map_small."""
    best = [key for key in metrics if re.fullmatch(r"mar_\d+", key)]
    recalls = {key: f"mAR, the best {key.removeprefix('mar_')} per image and class" for key in best}
    return [
        [name, f"{metrics[key]:.3f}"] for key, name in (METRIC_NAMES | recalls).items() if metrics.get(key, -1) >= 0
    ]


def class_table(data: DetectionModelCardData) -> tuple[list[str], list[list[str]], list[str]]:
    """Header and rows of the results per class, and the names of the classes that have none."""
    counts = data.class_counts.get(data.metrics_split)
    header = ["class", *([] if counts is None else ["objects"]), "mAP"]
    if data.report is not None:
        header += ["AP, IoU 0.50", "precision", "recall"]
    rows, undefined = [], []
    for index, (label, name) in enumerate(data.id2label.items()):
        value = data.metrics.get(_class_key(label, name))
        if value is None:  # of metrics that are not ours
            continue
        if value < 0:
            undefined.append(escaped(name))
            continue
        row = [escaped(name), *([] if counts is None else [str(counts.get(name, 0))]), f"{value:.3f}"]
        if data.report is not None:
            one = data.report.classes[index]
            row += [_number(one.ap_50), _number(one.precision), _number(one.recall)]
        rows.append(row)
    return header, rows, undefined


def threshold_text(data: DetectionModelCardData) -> str | None:
    """Which confidence threshold, why, and what it gives."""
    report = data.report
    if report is None:
        return None
    if data.threshold_split is None:
        why = "not chosen on data: there was no validation split for it, or nothing in it was detected right"
    else:
        why = (
            f"chosen on the `{data.threshold_split}` split for the highest F1 at IoU 0.50, counted over the "
            "detections of all classes together"
        )
        if data.threshold_split == data.metrics_split:
            why += "; these are the images of the results below, which are the better for it"
    precision, recall = (
        "undefined" if value is None else f"**{value:.3f}**" for value in (report.precision, report.recall)
    )
    return (
        f"The confidence threshold is **{report.threshold:.2f}** ({why}). Detections above it have, at IoU 0.50, "
        f"precision {precision} and recall {recall} on the `{data.metrics_split}` split."
    )


def training_facts(data: DetectionModelCardData) -> list[str]:
    """Items of the list that says how the detector was trained."""
    sizes = ", ".join(f"{split} {size}" for split, size in data.split_sizes.items())
    prints = ", ".join(f"{split} `{digits}`" for split, digits in data.fingerprints.items())
    versions = ", ".join(f"{library} {version}" for library, version in data.versions.items())
    facts = {
        "Images": sizes,
        "Fingerprint of the data": prints
        and f"{prints} (of all annotations, and of each image's file the length and the 4096 bytes in its middle)",
        "Seed": None if data.seed is None else str(data.seed),
        "Duration": None if data.minutes is None else f"{data.minutes:.1f} minutes",
        "Hardware": data.hardware,
        "Versions": versions,
    }
    return [f"{name}: {value}" for name, value in facts.items() if value]


def training_is_known(data: DetectionModelCardData) -> bool:
    """Whether anything tells how the detector was trained, beside the images."""
    told = (data.command, data.hardware, data.history_picture, data.hyperparameters, data.versions)
    return any(told) or data.seed is not None or data.minutes is not None


def limits(data: DetectionModelCardData) -> list[str]:
    """What the detector cannot be relied on for: what follows from the numbers, and what is given."""
    found = ["It knows the classes above and no others; what resembles one of them may be taken for it."]
    if data.train_split in data.class_counts:
        counts = [(name, data.class_counts[data.train_split].get(name, 0)) for name in data.id2label.values()]
        few = [f"{escaped(name)} ({count})" for name, count in counts if count < _FEW_OBJECTS]
        if few:
            found.append(f"Classes with few training objects: {', '.join(few)}.")
    if data.metrics and data.metrics_split == data.train_split:
        found.append("The results were measured on the training images and say little about others.")
    elif data.metrics:
        found.append("The results hold for images like the dataset's; measure on your own before relying on it.")
    images = data.split_sizes.get(data.metrics_split)
    if data.metrics and images is not None and images < _FEW_IMAGES:
        found.append(f"The results rest on {images} images: small differences between models mean little.")
    return [*found, *data.limits]


def license_text(data: DetectionModelCardData) -> str | None:
    """Under what the weights and the code are."""
    code = "The Python code beside them is" if data.has_code else "The code of `dit_detection` is"
    if data.is_non_commercial:
        return (
            f"The weights derive from {linked(data.base_model)}, published under "
            "[CC-BY-NC 4.0](https://creativecommons.org/licenses/by-nc/4.0/): no commercial use. "
            f"{code} under Apache-2.0."
        )
    return data.license and f"The weights are under `{data.license}`. {code} under Apache-2.0."


def linked(base_model: str | None) -> str | None:
    """A model as a link to the Hub, or the name of a folder as it is."""
    if base_model is None:
        return None
    return f"[{base_model}](https://huggingface.co/{base_model})" if is_hub_id(base_model) else f"`{base_model}`"


def code_block(text: str) -> str:
    """A command in a block that it cannot end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}bash\n{text}\n{fence}"


def escaped(text: Any) -> str:
    """One line of text that Markdown, tables included, shows as it is."""
    line = re.sub(r"([\\`*\[\]<>|~$&])", r"\\\1", " ".join(str(text).split()))
    # Between letters an underscore is harmless.
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"


def _class_key(label: int, name: str) -> str:
    """The key `CocoMetric` reports a class under."""
    key = f"map_{name}"
    return f"{key}_{label}" if key in METRIC_NAMES else key
