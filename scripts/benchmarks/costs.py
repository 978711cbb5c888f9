"""What fine-tuning a detector on DiT-XL/2 at 512 px costs, counted and not timed: for a choice before the start."""

import torch

from dit_detection import DiTDetectionConfig
from dit_detection.training.cost import training_cost

CANVAS = (512, 512)
NUM_IMAGES, NUM_EPOCHS, NUM_VIEWS, BATCH_SIZE = 1000, 50, 4, 8
# FLOP/s of a step: what the training rows of the benchmark reach on two CPU cores with bf16 instructions, and an
# assumption for a data-centre GPU in bf16, on which nothing was timed.
SPEEDS = {"2 cores, 0.2 TFLOP/s": 0.2e12, "GPU, 200 TFLOP/s": 200e12}

# facebook/DiT-XL-2-256 up to the deepest default tap, behind the Stable Diffusion VAE.
XL_2 = {
    "in_channels": 4,
    "patch_size": 2,
    "num_labels": 20,
    "latent_encoder": {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "layers_per_block": 2,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    },
}


def table() -> str:
    """As markdown; hours are for 1,000 images and 50 epochs, the cache filled included, validation not."""
    header = ["blocks that train", "M trained", "GFLOP per image: frozen + trained", "memory, batch 8", "disk"]
    header += [f"hours, {name}" for name in SPEEDS]
    lines = [header, ["---"] * len(header)]
    config = DiTDetectionConfig(**XL_2)
    depth = config.num_hidden_layers
    for what, num_frozen in (("none", depth), ("the upper half", depth // 2), ("all", None)):
        cost = training_cost(config, CANVAS, freeze_layers=num_frozen, batch_size=BATCH_SIZE, dtype=torch.bfloat16)
        for cached in (False, True):
            passes = NUM_VIEWS if cached else NUM_EPOCHS
            flops = NUM_IMAGES * (passes * cost.frozen_flops + NUM_EPOCHS * cost.trained_flops)
            memory = cost.cached_memory_bytes if cached else cost.memory_bytes
            disk = f"{NUM_VIEWS * NUM_IMAGES * cost.cache_bytes / 1e9:.1f} GB" if cached else "-"
            lines.append(
                [
                    what + (", cached" if cached else ""),
                    f"{cost.num_trained / 1e6:.0f}",
                    f"{cost.frozen_flops / 1e9:,.0f} + {cost.trained_flops / 1e9:,.0f}",
                    f"{memory / 1e9:.1f} GB",
                    disk,
                    *(_hours(flops / speed) for speed in SPEEDS.values()),
                ]
            )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}"
