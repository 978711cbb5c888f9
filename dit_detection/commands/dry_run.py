"""What a training run would take, before it starts."""

from typing import Any

import torch
from datasets import DatasetDict

from ..data import repeat_factors_of
from ..model.modeling_dit_detection import DiTForObjectDetection
from ..training.cost import measure_flops_per_second, training_cost
from ..training.frozen_cache import canvas_of
from ..training.training_args import DetectionTrainingArguments

# Of what matrix products reach, a detector's step reaches about this share: the rest goes into norms, activations and
# small feature maps. In `scripts/benchmark.py --quick` on 2 cores it was 0.5 (small detector, cached steps) to 0.75.
EFFICIENCY = 0.5
EMA_BYTES = 4  # per trained weight: the averages, or what they stand in for, in float32


def describe_cost(
    model: DiTForObjectDetection,
    image_processor: Any,
    dataset: DatasetDict,
    args: DetectionTrainingArguments,
    num_views: int,
) -> str:
    """
    A table of parameters, operations, memory, steps, disk and time of the run that `args` describe.

    Times assume half the speed of matrix products on this device, measured on the spot; they tell minutes from days.
    """
    num_frozen = model.model.backbone.num_frozen_layers()
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    batch_size = args.per_device_train_batch_size
    cost = training_cost(
        model.config,
        canvas_of(image_processor),
        freeze_layers=num_frozen or None,
        batch_size=batch_size,
        dtype=dtype,
    )
    num_train, num_validation = dataset["train"].num_rows, dataset["validation"].num_rows
    num_drawn = num_train
    if args.repeat_factor_threshold is not None:
        num_drawn = round(sum(repeat_factors_of(dataset["train"], args.repeat_factor_threshold)))
    if args.cache_frozen and not cost.cache_bytes:
        raise ValueError("--cache_frozen: nothing of this model is frozen that could be cached. Add --freeze_layers.")
    # Of several GPUs in one process training takes one.
    per_batch = batch_size * args.world_size
    batches = num_drawn // per_batch if args.dataloader_drop_last else -(-num_drawn // per_batch)
    steps_per_epoch = max(1, -(-batches // args.gradient_accumulation_steps))
    averages = 0 if args.ema_decay is None else EMA_BYTES * cost.num_trained
    epochs = args.num_train_epochs if args.max_steps < 0 else args.max_steps / steps_per_epoch
    frozen = ["the latent encoder"] * (model.model.latent_encoder is not None)
    frozen += [f"the patch embedding and {num_frozen} of {model.config.num_hidden_layers} blocks"] * (num_frozen > 0)

    speed = EFFICIENCY * measure_flops_per_second(args.device, dtype) * args.world_size
    # Validation runs forward only, which is a third of forward and backward.
    trained_flops = epochs * cost.trained_flops * (num_drawn + num_validation / 3)
    uncached = trained_flops + epochs * cost.frozen_flops * (num_drawn + num_validation)
    num_cached = num_train * num_views + num_validation
    lines = [
        ("images", f"{num_train} to train on, {num_validation} for validation"),
        ("parameters", f"{cost.num_parameters / 1e6:.1f} M, {cost.num_trained / 1e6:.1f} M of them trained"),
        ("frozen", " and ".join(frozen) or "nothing"),
        (
            "per image",
            f"{cost.frozen_flops / 1e9:.1f} GFLOP in the frozen part, {cost.trained_flops / 1e9:.1f} GFLOP in the "
            "rest, forward and backward",
        ),
        (
            "memory",
            f"about {size_text(cost.memory_bytes + averages)} for a step of {batch_size} images per device"
            + ", less with --gradient_checkpointing" * args.gradient_checkpointing,
        ),
        ("steps", f"{steps_per_epoch} per epoch, {round(steps_per_epoch * epochs)} in all"),
        ("speed", f"{speed / 1e9:.0f} GFLOP/s: {EFFICIENCY:.0%} of what matrix products reach here just now"),
        ("time", f"about {duration_text(uncached / speed)}"),
    ]
    if cost.cache_bytes:
        cached = trained_flops + cost.frozen_flops * num_cached
        lines.append(
            (
                "--cache_frozen",
                f"{size_text(cost.cache_bytes * num_cached)} of disk ({num_views} views per training image), "
                f"{size_text(cost.cached_memory_bytes + averages)} of memory for a step, "
                f"about {duration_text(cached / speed)} in all",
            )
        )
    table = "\n".join(f"  {name:<15}{text}" for name, text in lines)
    return f"What this run would take (nothing was trained):\n{table}"


def size_text(num_bytes: float) -> str:
    """Bytes as MB or GB."""
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"


def duration_text(seconds: float) -> str:
    """Seconds in the largest unit of which there are more than one."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
