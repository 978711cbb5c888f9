"""
What a DiT knows before any detector is trained on it: a linear classifier of tokens, per block and timestep.

Shape letters: B images, N tokens, D width, h w token grid.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.ops import box_convert

from dit_detection import DetectionDataset, DiTForObjectDetection, collate_detection, id2label_of
from dit_detection.small_dit import SIZES, size_of, write_small_dit

from .evaluation import BATCH_SIZE, Batch
from .images import load_splits, make_processor
from .settings import NETWORK, Settings, settings_of
from .table import markdown_table

TIMESTEPS = (0, 50, 100, 200, 300, 500)
# Relative to the features' variance of 1.
RIDGE = 1e-3


def print_probes(data: Path, pretrained: Path, names: Sequence[str]) -> None:
    """
    Print a table per data set: fitted to its training split, measured on its validation split.

    Args:
        data (`Path`): Folder of the data sets' folders.
        pretrained (`Path`): Folder of a DiT; random weights of the same size stand beside it.
        names (`Sequence[str]`): Keys of `CANVAS`.

    Raises:
        ValueError: The DiT is not of the size `NETWORK`.
    """
    if size_of(pretrained) != NETWORK:
        raise ValueError(
            f"{pretrained} is not of the size {NETWORK!r}, as NETWORK in scripts/evidence/settings.py is."
        )
    for name in names:
        splits = load_splits(data / name)
        settings = settings_of("frozen", name, 1.0, 0)
        with tempfile.TemporaryDirectory() as folder:
            write_small_dit(folder, NETWORK, max(settings.canvas))
            train, held_out = splits["train"], splits["validation"]
            found = {
                "random weights": dict(probe(Path(folder), train, held_out, settings, [0])),  # they know no timestep
                pretrained.name: dict(probe(pretrained, train, held_out, settings)),
            }
        print(f"{name}:\n\n{probe_table(found)}\n", flush=True)


def probe(
    pretrained: Path,
    train: datasets.Dataset,
    held_out: datasets.Dataset,
    settings: Settings,
    timesteps: Sequence[int] = TIMESTEPS,
) -> Iterator[tuple[int, list[float]]]:
    """
    How well a linear classifier of single tokens tells in which class of object a token lies.

    It is fitted by ridge regression to the classes of all tokens of `train`, without augmentation: nothing is random.
    The measure is the average precision with which tokens of `held_out` are found, averaged over the classes.

    Args:
        pretrained (`Path`): Folder of a DiT of the size `NETWORK`.
        train, held_out (`datasets.Dataset`): In the row format.
        settings ([`Settings`]): Its canvas.
        timesteps (`Sequence[int]`): Whose features.

    Yields:
        A timestep, and the mean average precision after each block, from the pixels.
    """
    batches, held_out_batches = (_batches(rows, settings) for rows in (train, held_out))
    for timestep in timesteps:
        model = DiTForObjectDetection.from_diffusers(
            str(pretrained),
            timestep=timestep,
            id2label=id2label_of(train),
            dtype=torch.float32,
            out_indices=list(range(SIZES[NETWORK]["num_layers"])),
        ).eval()
        features, classes = _tokens(model, batches)
        held_out_features, truth = _tokens(model, held_out_batches)
        yield (
            timestep,
            [
                _linear_precision(block, classes, held_out_block, truth, model.config.num_labels)
                for block, held_out_block in zip(features, held_out_features, strict=True)
            ],
        )


def probe_table(found: dict[str, dict[int, list[float]]]) -> str:
    """Markdown of what [`probe`] gave per DiT and timestep, in points, the best of each DiT in bold."""
    rows, depth = [], 0
    for name, by_timestep in found.items():
        best = max(max(values) for values in by_timestep.values())
        for timestep, values in by_timestep.items():
            points = [f"**{100 * value:.1f}**" if value == best else f"{100 * value:.1f}" for value in values]
            rows.append([name, str(timestep), *points])
            depth = len(values)
    return markdown_table(["token AP", "timestep", *(f"block {index}" for index in range(depth))], rows)


def token_classes(labels: dict[str, Tensor], grid: tuple[int, int], patch_size: int, num_labels: int) -> Tensor:
    """
    What each token shows.

    Args:
        labels (`dict`): Of an image, as `DetectionDataset` gives them.
        grid (`tuple[int, int]`), patch_size (`int`): Tokens of the canvas, and their side in pixels.
        num_labels (`int`): Classes.

    Returns:
        `torch.Tensor` of shape `(h, w)`: The class of the smallest object around the token's centre, `num_labels`
        where there is none, -1 outside the image.
    """
    height, width = labels["size"].tolist()
    y, x = ((torch.arange(length) + 0.5) * patch_size for length in grid)
    found = torch.full(grid, num_labels)
    boxes = box_convert(labels["boxes"], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    for index in areas.argsort(descending=True).tolist():  # the smallest comes last, over the others
        left, top, right, bottom = boxes[index]
        inside = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
        found[inside] = labels["class_labels"][index]
    found[(y >= height)[:, None] | (x >= width)] = -1
    return found


def average_precision(scores: Tensor, is_true: Tensor) -> float:
    """Area under precision over recall without interpolation, of scores and their truth, both `(N,)`."""
    hits = is_true[scores.argsort(descending=True, stable=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / hits.sum())


def _batches(rows: datasets.Dataset, settings: Settings) -> list[Batch]:
    dataset = DetectionDataset(rows, make_processor(settings))
    return list(DataLoader(dataset, BATCH_SIZE, collate_fn=collate_detection))


@torch.no_grad()
def _tokens(model: DiTForObjectDetection, batches: list[Batch]) -> tuple[list[Tensor], Tensor]:
    """Features after each block, `(N, D)`, and classes `(N,)` of all tokens that lie in an image."""
    features: list[list[Tensor]] = []
    classes = []
    for batch in batches:
        maps = model.model(batch["pixel_values"]).feature_maps  # (B, blocks, D, h, w)
        grid = (maps.shape[3], maps.shape[4])
        found = torch.stack(
            [
                token_classes(labels, grid, model.config.token_stride, model.config.num_labels)
                for labels in batch["labels"]
            ]
        )
        classes.append(found[found >= 0])
        features.append([block[found >= 0] for block in maps.permute(1, 0, 3, 4, 2)])
    return [torch.cat(block) for block in zip(*features, strict=True)], torch.cat(classes)


def _linear_precision(features: Tensor, classes: Tensor, held_out: Tensor, truth: Tensor, num_labels: int) -> float:
    """Fit on the first two, measure on the others."""
    mean, std = features.mean(dim=0), features.std(dim=0) + 1e-6
    x, held_out = ((values.double() - mean) / std for values in (features, held_out))
    targets = F.one_hot(classes, num_labels + 1).double()
    gram = x.T @ x / len(x) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    scores = held_out @ torch.linalg.solve(gram, x.T @ (targets - targets.mean(dim=0)) / len(x))
    present = [label for label in range(num_labels) if (truth == label).any()]
    return sum(average_precision(scores[:, label], truth == label) for label in present) / len(present)
