"""
Images that went through the frozen part of a detector already, read from disk.

Shape letters: S states, D width, h w token grid.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Features, List, Value
from torch.utils import data

from ..data.transforms import SharedEpoch

FEATURES = Features(
    {
        "states": Value("large_binary"),
        "labels": {
            "image_id": List(Value("int64")),
            "class_labels": List(Value("int64")),
            "boxes": List(List(Value("float32"), length=4)),
            "area": List(Value("float32")),
            "iscrowd": List(Value("int64")),
            "orig_size": List(Value("int64")),
            "size": List(Value("int64")),
        },
    }
)


class FrozenDataset(data.Dataset[dict[str, Any]]):
    """
    A [`DetectionDataset`] whose images went through the frozen part already. Made by `cache_frozen`.

    Entries have `frozen_states` `(S, h, w, D)` and `num_frozen_layers`, or `latents` `(in_channels, H', W')`, and
    `labels`; epoch e shows view e modulo `num_views`, as the data set it was made of.

    Args:
        shards (`Sequence[Path]`): Arrow files; together `num_views` times all images, view by view.
        shape (`Sequence[int]`), dtype (`torch.dtype`): Of one entry's states.
        num_frozen_layers (`int`): Blocks that the states stand for; 0 for latents.
        num_views (`int`): Views of each image.
    """

    def __init__(
        self, shards: Sequence[Path], shape: Sequence[int], dtype: torch.dtype, num_frozen_layers: int, num_views: int
    ) -> None:
        tables = [datasets.Dataset.from_file(str(shard)) for shard in shards]  # memory-mapped
        self.cached = datasets.concatenate_datasets(tables).with_format("arrow")
        self.shape = tuple(shape)
        self.dtype = dtype
        self.num_frozen_layers = num_frozen_layers
        self.num_views = num_views
        self._epoch = SharedEpoch()

    def __len__(self) -> int:
        return len(self.cached) // self.num_views

    def __getitem__(self, index: int) -> dict[str, Any]:
        view = self._epoch.get() % self.num_views
        row = self.cached[view * len(self) + range(len(self))[index]]
        buffer = np.frombuffer(row["states"][0].as_buffer(), dtype=np.uint8)
        states = torch.from_numpy(buffer.copy()).view(self.dtype).view(self.shape)  # the file's pages are read-only
        stored = row["labels"][0].as_py()
        labels = {name: torch.tensor(values, dtype=_torch_dtype(name)) for name, values in stored.items()}
        labels["boxes"] = labels["boxes"].reshape(-1, 4)
        if self.num_frozen_layers == 0:
            return {"latents": states, "labels": labels}
        return {"frozen_states": states, "num_frozen_layers": self.num_frozen_layers, "labels": labels}

    def set_epoch(self, epoch: int) -> None:
        """Show the view of this epoch from now on, in running workers too."""
        self._epoch.set(epoch)


def _torch_dtype(label: str) -> torch.dtype:
    return torch.float32 if label in ("boxes", "area") else torch.int64
