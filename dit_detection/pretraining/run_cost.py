"""What a pretraining run would take: operations and memory counted, the times of a step and of encoding measured."""

import gc
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..training.cost import ADAM_BYTES, PeakMemory
from .diffusion_model import DiffusionModel
from .latent_cache import BATCH_SIZE, encode_pixels

EMA_BYTES = 4  # per weight, in float32


def step_cost(
    model: DiffusionModel,
    batch_size: int,
    dtype: torch.dtype,
    gradient_checkpointing: bool = False,
    has_averages: bool = True,
) -> tuple[int, int]:
    """
    FLOPs of one image, forward and backward, and the most bytes that a step of a batch holds, AdamW's states included.

    Counted on the CPU, on tensors without data.

    Args:
        model (`DiffusionModel`): Its weights are not touched.
        batch_size (`int`): Images per step on one device.
        dtype (`torch.dtype`): Below float32, what autocast computes in.
        gradient_checkpointing (`bool`): Whether blocks are computed once more in the backward pass.
        has_averages (`bool`): Whether moving averages of the weights are kept.
    """
    gc.freeze()  # what is there already: there is then little to look through before each module
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        copy = DiffusionModel(type(model.transformer).from_config(model.transformer.config), model.scheduler)
        if gradient_checkpointing:
            copy.gradient_checkpointing_enable()
            for module in copy.transformer.modules():
                module.register_forward_pre_hook(_collect_garbage)
        inputs = {name: mode.from_tensor(value) for name, value in _inputs(model, batch_size, "cpu").items()}
        with PeakMemory() as memory, FlopCounterMode(display=False) as counter:
            with nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype):
                loss = copy.loss_of(inputs["clean"], inputs["noise"], inputs["time"])
            loss.backward()
    gc.unfreeze()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    kept = num_parameters * (4 + ADAM_BYTES + EMA_BYTES * has_averages)
    return counter.get_total_flops() // batch_size, memory.peak + kept


def _collect_garbage(*_: Any) -> None:
    """
    Called before each module, also when it is computed once more.

    What a block had computed once more is let go at once if tensors have data, and without data (torch 2.15) only when
    Python collects: without this, twice as much would be counted.
    """
    gc.collect()


def measure_step(model: DiffusionModel, batch_size: int, dtype: torch.dtype, num_steps: int = 3) -> float:
    """
    Seconds of a step, forward, backward and AdamW, on random images on the model's device; weights are restored.

    With gradient checkpointing if the model has it switched on.
    """
    device = next(model.parameters()).device
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    inputs = _inputs(model, batch_size, device)
    seconds = []
    for _ in range(num_steps + 1):  # the first warms up
        start = time.perf_counter()
        with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype):
            loss = model.loss_of(inputs["clean"], inputs["noise"], inputs["time"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # a wait for the device
        seconds.append(time.perf_counter() - start)
    model.load_state_dict(before)
    return sorted(seconds[1:])[num_steps // 2]


@torch.no_grad()
def measure_encoding(vae: Any, image_size: int, device: str | torch.device, batch_size: int = BATCH_SIZE) -> float:
    """Seconds in which an autoencoder makes latents of one image, as many at a time as the cache of latents takes."""
    vae = vae.to(device).eval()
    pixels = torch.randint(256, (batch_size, 3, image_size, image_size), dtype=torch.uint8, device=device)
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        encode_pixels(vae, pixels).cpu()
    return (time.perf_counter() - start) / batch_size


def _inputs(model: DiffusionModel, batch_size: int, device: str | torch.device) -> dict[str, torch.Tensor]:
    config = model.transformer.config
    shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
    clean, noise = torch.randn(2, *shape, device=device)
    return {"clean": clean, "noise": noise, "time": torch.linspace(0, 0.99, batch_size, device=device)}
