"""A training step whose frozen part comes from the cache, against one that computes it again."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from dit_detection import DiTForObjectDetection

from .measure import Pair, Row, Settings
from .precision import make_detector

# The head that `train` puts on its small DiTs: three levels, one anchor per cell, half the convolutions.
SLIM_HEAD = {
    "neck_channels": 96,
    "head_channels": [96, 96],
    "strides": [8, 16, 32],
    "anchor_sizes": [[24.0], [56.0], [112.0]],
    "aspect_ratios": [1.0],
}


def rows(settings: Settings) -> Iterator[Row]:
    """All blocks frozen with the default and a slim head, and half of them; the GFLOP columns are the cost model."""
    for size in ("B/2", "XL/2"):
        batch_size = 1 if settings.quick else 4
        for what, share, overrides in (
            ("all blocks frozen", 1.0, {}),
            ("all blocks frozen, slim head", 1.0, SLIM_HEAD),
            ("half the blocks frozen", 0.5, {}),
        ):
            make = partial(make_detector, f"{size} with SD-VAE", 256, settings.device, batch_size, **overrides)
            yield Row(
                f"cache: training step, {size} with SD-VAE, 256 px, batch {batch_size}, {what}",
                partial(training, make, share),
                aim=20.0 if share == 1 else None,
            )


def training(make: Callable[[], tuple[DiTForObjectDetection, dict[str, Any]]], share: float) -> Pair:
    """Forward, backward and AdamW under bf16 autocast; ours from states in bf16, as the cache holds them."""
    model, batch = make()
    model.freeze_backbone(round(share * model.config.num_hidden_layers))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    device = batch["pixel_values"].device.type
    with torch.autocast(device, torch.bfloat16):
        encoded = model.model.encode_frozen(batch["pixel_values"])
    encoded["frozen_states"] = encoded["frozen_states"].bfloat16()

    def step(**inputs: Any) -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(**inputs, labels=batch["labels"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    parameters = (sum(parameter.numel() for parameter in trained),) * 2
    return Pair(partial(step, **encoded), partial(step, pixel_values=batch["pixel_values"]), parameters)
