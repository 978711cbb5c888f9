"""`torch.compile` with inductor against the same detector as it is."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from dit_detection import DiTForObjectDetection

from .measure import Pair, Row, Settings
from .precision import make_detector


def rows(settings: Settings) -> Iterator[Row]:
    """Inference of one image, and a training step, of the small detector in float32."""
    make = partial(make_detector, "small, 320 px", 320, settings.device)
    yield Row("compile: inference / eager, small, 320 px, batch 1", partial(inference, partial(make, 1)))
    yield Row("compile: training step / eager, small, 320 px, batch 4", partial(training, partial(make, 4)))


def inference(make: Callable[[], tuple[DiTForObjectDetection, dict[str, Any]]]) -> Pair:
    """Pixels to boxes."""
    model, batch = make()
    compiled = torch.compile(model, fullgraph=True)
    pixel_values = batch["pixel_values"]
    return Pair(
        torch.no_grad()(lambda: compiled(pixel_values)),
        torch.no_grad()(lambda: model(pixel_values)),
        memory=False,
        flops=False,  # under the counter nothing is compiled
    )


def training(make: Callable[[], tuple[DiTForObjectDetection, dict[str, Any]]]) -> Pair:
    """Forward with matching and loss, and backward."""
    model, batch = make()
    model.train()
    compiled = torch.compile(model, fullgraph=True)

    def step(detector: Callable[..., Any]) -> None:
        detector(**batch).loss.backward()
        model.zero_grad()

    return Pair(partial(step, compiled), partial(step, model), memory=False, flops=False)
