"""A name for what the frozen part of a detector makes of a data set: another for each setting, weight or image."""

import hashlib
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ..data import DetectionDataset
from ..model.modeling_dit_detection import DiTForObjectDetection
from ..weight_digest import digest_weights

# Of the configuration, what the frozen part's outputs depend on beside its weights.
CONFIG_FIELDS = (
    "patch_size",
    "pretrained_grid",
    "num_attention_heads",
    "hidden_act",
    "attention_norm_eps",
    "mlp_norm_eps",
    "out_indices",
    "latent_encoder",
)


def frozen_key(
    model: DiTForObjectDetection, num_frozen_layers: int, dataset: DetectionDataset, num_views: int, dtype: torch.dtype
) -> str:
    """A name for everything that the cached rows depend on."""
    digest = hashlib.blake2b(digest_size=16)
    config, augmentation = model.config.to_dict(), dataset.augmentation
    image_processor: Any = dataset.image_processor
    settings = {
        "config": {name: config[name] for name in CONFIG_FIELDS},
        "num_frozen_layers": num_frozen_layers,
        "image_processor": image_processor.to_dict(),
        "augmentation": None if augmentation is None else vars(augmentation),
        "seed": dataset.seed if augmentation is not None else None,
        "num_views": num_views,
        "dtype": str(dtype),
        "versions": {name: version(name) for name in ("dit_detection", "torchvision", "pillow")},
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest_weights(digest, _frozen_weights(model, num_frozen_layers))
    for row in dataset.rows:
        image = row.pop("image")
        if image["bytes"] is not None:
            digest.update(image["bytes"])
        else:
            status = os.stat(image["path"])
            digest.update(f"{image['path']} {status.st_size} {status.st_mtime_ns}".encode())
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def _frozen_weights(model: DiTForObjectDetection, num_frozen_layers: int) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the weights before the first one that is trained."""

    def is_frozen(name: str) -> bool:
        part, _, rest = name.removeprefix("backbone.").partition(".")
        if part == "layers":
            return int(rest.partition(".")[0]) < num_frozen_layers
        return part == "latent_encoder" or (part == "patch_embedding" and num_frozen_layers > 0)

    return ((name, weight) for name, weight in model.model.state_dict().items() if is_frozen(name))
