"""What training costs, counted on tensors without data: operations, memory, and the cache of the frozen part."""

import time
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..model.configuration_dit_detection import DiTDetectionConfig
from ..model.modeling_dit_detection import DiTForObjectDetection

ADAM_BYTES = 8  # per trained weight: AdamW keeps two numbers in float32


@dataclass
class TrainingCost:
    """
    What training takes, counted from the operations that would run. One multiplication and addition are 2 FLOPs.

    Args:
        num_parameters (`int`), num_trained (`int`): Weights in all, and those that train.
        frozen_flops (`int`): Of one image through the frozen part, forward.
        trained_flops (`int`): Of one image through the rest, forward and backward.
        memory_bytes (`int`): The most that a step of `batch_size` images holds: weights, AdamW's states, gradients and
            activations. The framework itself and the data loader come on top.
        cached_memory_bytes (`int`): The same with the frozen part from the cache.
        cache_bytes (`int`): One view of one image in the cache; 0 if nothing is frozen.
    """

    num_parameters: int
    num_trained: int
    frozen_flops: int
    trained_flops: int
    memory_bytes: int
    cached_memory_bytes: int
    cache_bytes: int


def training_cost(
    config: DiTDetectionConfig,
    canvas: tuple[int, int],
    *,
    freeze_layers: int | None = None,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
) -> TrainingCost:
    """
    Count what training a detector costs, within seconds: neither its weights nor any other tensor has data.

    Args:
        config (`DiTDetectionConfig`): The detector.
        canvas (`tuple[int, int]`): (height, width) of the images, pixels.
        freeze_layers (`int`, *optional*): Blocks frozen with the patch embedding; -1 for all, `None` for none at all.
        batch_size (`int`): Images per step on one device.
        dtype (`torch.dtype`): Below float32, what autocast computes in.
    """
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)
    with FakeTensorMode():
        model = DiTForObjectDetection(config).train()
        if freeze_layers is not None:
            model.freeze_backbone(None if freeze_layers < 0 else freeze_layers)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

        pixels = {"pixel_values": torch.zeros(batch_size, 3, *canvas)}
        encoded, frozen_flops, cache_bytes = pixels, 0, 0
        if config.latent_encoder is not None or model.model.backbone.num_frozen_layers():
            with FlopCounterMode(display=False) as counter, autocast:
                encoded = model.model.encode_frozen(**pixels)
            frozen_flops = counter.get_total_flops() // batch_size
            states = encoded["latents" if "latents" in encoded else "frozen_states"].to(dtype)
            cache_bytes = states.nbytes // batch_size
        trained_flops, cached_step_bytes = _count_step(model, encoded, autocast)
        _, step_bytes = _count_step(model, pixels, autocast)
    kept = 4 * num_parameters + ADAM_BYTES * num_trained
    return TrainingCost(
        num_parameters=num_parameters,
        num_trained=num_trained,
        frozen_flops=frozen_flops,
        trained_flops=trained_flops // batch_size,
        memory_bytes=kept + step_bytes,
        cached_memory_bytes=kept + cached_step_bytes,
        cache_bytes=cache_bytes,
    )


def measure_flops_per_second(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """What this device reaches in large matrix products: no training is faster."""
    size = 4096 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    float((a @ b)[0, 0])  # warm-up, and a wait for the device
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        float((a @ b)[0, 0])
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - start)


def _count_step(
    model: DiTForObjectDetection, inputs: dict[str, Any], autocast: AbstractContextManager[Any]
) -> tuple[int, int]:
    """FLOPs and peak bytes of a step, forward and backward, without matching and loss: they are small beside."""
    model.zero_grad()
    with PeakMemory() as memory, FlopCounterMode(display=False) as counter:
        with autocast:
            features = model.model(**inputs)
            logits, deltas = model.head(model.neck(features.feature_maps.unbind(1)))
        (logits.sum() + deltas.sum()).backward()
    return counter.get_total_flops(), memory.peak


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made under it hold at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, num_bytes: int) -> None:
        self.alive -= num_bytes
