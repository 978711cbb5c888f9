from collections.abc import Sequence
from typing import Any

import torch


def collate_detection(features: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Make a batch of the entries that `DetectionDataset` or `FrozenDataset` yields.

    Args:
        features (`Sequence[dict]`): "labels", and tensors of the same names in all: "pixel_values" `(3, H, W)` and
            perhaps "pixel_mask" `(H, W)`; or "latents"; or "frozen_states" with the number "num_frozen_layers".

    Returns:
        `dict`: Each tensor with an axis of B in front, "labels" a list of B, numbers as they are.

    Raises:
        ValueError: The images have different sizes; or the entries are no inputs of the model.
    """
    if not features[0].keys() & {"pixel_values", "latents", "frozen_states"}:
        raise ValueError(
            f"An entry of the data set has {', '.join(features[0])}, but no pixel_values. Rows of "
            "load_detection_dataset become the model's inputs as DetectionDataset(rows, image_processor)."
        )
    batch: dict[str, Any] = {}
    for name, first in features[0].items():
        values = [feature[name] for feature in features]
        if name == "labels":
            batch[name] = values
        elif not isinstance(first, torch.Tensor):
            batch[name] = first
        elif len(shapes := {tuple(value.shape) for value in values}) > 1:
            raise ValueError(
                f"The images of a batch have different shapes: {sorted(shapes)}. Let the image processor pad all to "
                "one canvas (`do_pad=True` with a fixed `pad_size`), or use a batch size of 1."
            )
        else:
            batch[name] = torch.stack(values)
    return batch
