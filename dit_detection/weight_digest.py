"""What tells one set of weights from another, in the names of caches and in manifests."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def digest_weights(digest: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """
    Add weights to a digest: names, types, shapes and bytes.

    Args:
        digest: Of `hashlib`.
        weights (`Iterable[tuple[str, Tensor]]`): In an order that is always the same, as `state_dict().items()`.
    """
    for name, weight in weights:
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
