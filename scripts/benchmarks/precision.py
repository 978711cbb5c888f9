"""bf16 against fp32 for the whole detector, and how much of it the machine's own matrix products would allow."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel
from torch import Tensor

from dit_detection import DiTForObjectDetection
from dit_detection.model.convert_dit import dit_config
from dit_detection.small_dit import DETECTORS, SIZES

from .backbone import DIT_SIZES, fill
from .encoder import sd_vae
from .measure import Pair, Row, Settings

# Detectors by name: (canvas in pixels, batch size in training, batch size in inference).
DETECTOR_RUNS = {"small, 320 px": (320, 8, 8), "B/2 with SD-VAE, 256 px": (256, 2, 2)}
Batch = dict[str, Any]


def rows(settings: Settings) -> Iterator[Row]:
    """Matrix products, then a training step and inference of whole detectors."""
    yield Row("bf16 / fp32: matrix products of an MLP, 1024 x 1152 x 4608", partial(matrix_products, settings.device))
    for name, (image_size, train_batch, batch_size) in DETECTOR_RUNS.items():
        if settings.quick and "SD-VAE" in name:
            train_batch = batch_size = 1
        make = partial(make_detector, name, image_size, settings.device)
        what = f"{name}, batch {train_batch}"
        yield Row(f"bf16 / fp32: training step, autocast, {what}", partial(training, make, train_batch))
        what = f"{name}, batch {batch_size}"
        yield Row(f"bf16 / fp32: inference, autocast, {what}", partial(inference, make, batch_size, autocast=True))
        if not (settings.quick and "SD-VAE" in name):
            build = partial(inference, make, batch_size, autocast=False)
            yield Row(f"bf16 / fp32: inference, bf16 weights, {what}", build)


def matrix_products(device: str) -> Pair:
    """The ceiling: what of a block is nothing but multiplication."""
    tokens, weight = torch.randn(1024, 1152, device=device), torch.randn(4608, 1152, device=device)
    half_tokens, half_weight = tokens.bfloat16(), weight.bfloat16()
    return Pair(
        lambda: torch.nn.functional.linear(half_tokens, half_weight),
        lambda: torch.nn.functional.linear(tokens, weight),
    )


def make_detector(
    name: str, image_size: int, device: str, batch_size: int, **overrides: Any
) -> tuple[DiTForObjectDetection, Batch]:
    """A detector with random weights, 20 classes, and a batch with 8 objects in each image."""
    labels = {index: str(index) for index in range(20)}
    with init_empty_weights(include_buffers=False):
        if name.startswith("small"):
            dit, vae = DiTTransformer2DModel(in_channels=3, sample_size=image_size, **SIZES["small"]), None
            config = dit_config(dit, vae, timestep=50, id2label=labels, **(DETECTORS["small"] | overrides))
        else:
            heads, head_dim, depth = DIT_SIZES[name.split()[0]]
            dit = DiTTransformer2DModel(
                num_attention_heads=heads, attention_head_dim=head_dim, num_layers=depth, in_channels=4, sample_size=32
            )
            config = dit_config(dit, sd_vae(), timestep=50, id2label=labels, **overrides)
        model = DiTForObjectDetection(config)
    fill(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    sides = torch.rand(batch_size, 8, 2, generator=generator) * 0.3 + 0.1
    boxes = torch.cat([sides / 2 + torch.rand(sides.shape, generator=generator) * (1 - sides), sides], dim=2)
    classes = torch.randint(20, (batch_size, 8), generator=generator)
    batch = {
        "pixel_values": torch.rand(batch_size, 3, image_size, image_size, generator=generator).to(device) * 2 - 1,
        "labels": [
            {"class_labels": labels.to(device), "boxes": image_boxes.to(device)}
            for labels, image_boxes in zip(classes, boxes, strict=True)
        ],
    }
    return model.to(device), batch


def training(make: Callable[..., tuple[DiTForObjectDetection, Batch]], batch_size: int) -> Pair:
    """Forward, backward and AdamW, as the Trainer does them: weights in float32, autocast around the forward."""

    def step(dtype: torch.dtype | None) -> Callable[[], Tensor]:
        model, batch = make(batch_size=batch_size)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

        def run() -> Tensor:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype is not None):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return run

    return Pair(step(torch.bfloat16), step(None))


def inference(make: Callable[..., tuple[DiTForObjectDetection, Batch]], batch_size: int, autocast: bool) -> Pair:
    """The whole detector, pixels to boxes."""
    model, batch = make(batch_size=batch_size)
    half = model if autocast else make(batch_size=batch_size)[0].to(torch.bfloat16)
    pixel_values = batch["pixel_values"]

    @torch.no_grad()
    def ours() -> Any:
        with torch.autocast(half.device.type, torch.bfloat16, enabled=autocast):
            return half(pixel_values)

    return Pair(ours, torch.no_grad()(lambda: model(pixel_values)))
