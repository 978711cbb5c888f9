"""The folded backbone against diffusers' own `DiTTransformer2DModel`, on latents of 256 px images (4 x 32 x 32)."""

import tempfile
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from dit_detection.model.convert_dit import dit_config, fold_dit
from dit_detection.model.modeling_dit_detection import DiTDetectionModel

from .measure import Pair, Row, Settings, count_parameters

# (heads, width of a head, blocks) of the published DiTs. The Hub has XL/2; S/2 and B/2 are the paper's.
DIT_SIZES = {"S/2": (6, 64, 12), "B/2": (12, 64, 12), "XL/2": (16, 72, 28)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TIMESTEP, NULL_CLASS = 50, 1000


def rows(settings: Settings) -> Iterator[Row]:
    """The same blocks; a whole forward; loading."""
    for size in DIT_SIZES:
        for dtype in DTYPES:
            for batch_size in (1, 8):
                if settings.quick and batch_size == 8 and (size == "XL/2" or (dtype == "fp32" and size == "B/2")):
                    continue
                what = f"{size}, batch {batch_size}, {dtype}"
                overhead_counts = batch_size == 1 and (settings.device == "cuda" or (size, dtype) == ("S/2", "bf16"))
                build = partial(same_blocks, size, batch_size, dtype, settings.device)
                yield Row(f"backbone: same blocks, {what}", build, aim=1.2 if overhead_counts else 1.0)
                build = partial(whole_forward, size, batch_size, dtype, settings.device)
                yield Row(f"backbone: to the deepest tap / whole DiT, {what}", build, aim=1.5)
    for size in ("B/2",) if settings.quick else DIT_SIZES:
        yield Row(f"backbone: load a diffusers folder, {size}", partial(loading, size))


@lru_cache(maxsize=1)
def random_dit(size: str) -> DiTTransformer2DModel:
    """A DiT of the published shape, float32 on the CPU, no weight of it 0."""
    heads, head_dim, depth = DIT_SIZES[size]
    with init_empty_weights(include_buffers=False):
        dit = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=4,
            out_channels=8,
            num_layers=depth,
            sample_size=32,
            num_embeds_ada_norm=1000,
        )
    return fill(dit, seed=0)


def fill(module: nn.Module, seed: int) -> Any:
    """Give a model without memory small random weights, on the CPU, in float32; several times faster than its own."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            values = torch.empty(parameter.shape).normal_(std=0.05, generator=generator)
            setattr(part, name, nn.Parameter(values))
    return module.eval()


def folded(dit: DiTTransformer2DModel, **overrides: Any) -> DiTDetectionModel:
    """The same DiT as ours: it reads latents in the place of pixels."""
    config = dit_config(dit, None, timestep=TIMESTEP, strides=[1, 2, 4], **overrides)
    with init_empty_weights(include_buffers=False):
        model = DiTDetectionModel(config)
    model.load_state_dict(fold_dit(dit, None, config), assign=True)
    return model.eval()


def same_blocks(size: str, batch_size: int, dtype: str, device: str) -> Pair:
    """Patch embedding and all blocks of both."""
    dit = random_dit(size)
    ours = folded(dit, out_indices=[-1])
    parameters = count_parameters(ours), count_parameters(dit)
    latents, timestep, condition = inputs(batch_size, device)

    def their_blocks() -> Tensor:
        hidden_states = theirs.pos_embed(latents)
        for block in theirs.transformer_blocks:
            hidden_states = block(hidden_states, timestep=timestep, class_labels=condition)
        return hidden_states

    theirs: Any = dit.to(device)
    ours.to(device)
    with torch.no_grad():
        check_equal(ours.backbone(latents[:1])[0], their_blocks()[:1])
    theirs, backbone, latents = cast(dit, dtype), ours.backbone.to(DTYPES[dtype]), latents.to(DTYPES[dtype])
    return Pair(torch.no_grad()(lambda: backbone(latents)), torch.no_grad()(their_blocks), parameters)


def whole_forward(size: str, batch_size: int, dtype: str, device: str) -> Pair:
    """Our forward to the deepest default tap against diffusers' whole one, with blocks no detector reads."""
    dit = random_dit(size)
    ours = folded(dit).to(device, DTYPES[dtype])
    parameters = count_parameters(ours), count_parameters(dit)
    theirs = cast(dit.to(device), dtype)
    latents, timestep, condition = inputs(batch_size, device)
    latents = latents.to(DTYPES[dtype])
    return Pair(
        torch.no_grad()(lambda: ours(latents=latents)),
        torch.no_grad()(lambda: theirs(latents, timestep=timestep, class_labels=condition)),
        parameters,
    )


def loading(size: str) -> Pair:
    """A folder of diffusers → ready weights: folded up to the deepest tap, or all as they are."""
    dit = random_dit(size)
    parameters = count_parameters(folded(dit)), count_parameters(dit)
    folder = tempfile.TemporaryDirectory()
    dit.save_pretrained(folder.name)

    def ours() -> DiTDetectionModel:
        return folded(DiTTransformer2DModel.from_pretrained(Path(folder.name)))

    def theirs() -> DiTTransformer2DModel:
        loaded = DiTTransformer2DModel.from_pretrained(Path(folder.name))
        for parameter in loaded.parameters():  # the file is mapped into memory, and read when first touched
            parameter.sum()
        return loaded

    return Pair(ours, theirs, parameters)


def inputs(batch_size: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of 256 px images, and diffusers' timestep and class of each."""
    latents = torch.randn(batch_size, 4, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    each = torch.ones(batch_size, dtype=torch.long, device=device)
    return latents, TIMESTEP * each, NULL_CLASS * each


def cast(dit: DiTTransformer2DModel, dtype: str) -> DiTTransformer2DModel:
    """A cast copy; the float32 original is used again by the next row."""
    if dtype == "fp32":
        return dit
    with init_empty_weights(include_buffers=False):
        copy = DiTTransformer2DModel.from_config(dit.config)
    weights = {key: value.to(DTYPES[dtype]) for key, value in dit.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    copy.pos_embed.pos_embed = dit.pos_embed.pos_embed
    return copy.eval()


def check_equal(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Refuse to compare the times of what gives different results: relative to the largest value."""
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not error <= tolerance:
        raise RuntimeError(f"The two sides differ by {error:.1e} of the largest value, more than {tolerance:g}.")
