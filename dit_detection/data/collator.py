from collections.abc import Sequence
from typing import Any

import torch


def collate_detection(features: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Make a batch of the rows that `DetectionTransform` yields.

    Args:
        features (`Sequence[dict]`): "pixel_values" `(3, H, W)`, "labels" and, in all or none, "pixel_mask" `(H, W)`.

    Returns:
        `dict`: "pixel_values" `(B, 3, H, W)`, "pixel_mask" `(B, H, W)` if there is one, "labels" a list of B.

    Raises:
        ValueError: The images have different sizes.
    """
    shapes = {tuple(feature["pixel_values"].shape) for feature in features}
    if len(shapes) > 1:
        raise ValueError(
            f"The images of a batch have different shapes: {sorted(shapes)}. Let the image processor pad all to one "
            "canvas (`do_pad=True` with a fixed `pad_size`), or use a batch size of 1."
        )
    batch: dict[str, Any] = {"pixel_values": torch.stack([feature["pixel_values"] for feature in features])}
    if "pixel_mask" in features[0]:
        batch["pixel_mask"] = torch.stack([feature["pixel_mask"] for feature in features])
    batch["labels"] = [feature["labels"] for feature in features]
    return batch
