"""What decides a run: the table's cells, each arm's recipe and the budget that all arms of a cell share."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

DATASETS = ("bccd", "cards", "microcontrollers")
FRACTIONS = (0.1, 0.3, 1.0)
SEEDS = (0, 1, 2)
BATCH_SIZE = 8

# Height and width in pixels, in the form that most images of the set have.
CANVAS = {"bccd": (192, 256), "cards": (256, 192), "microcontrollers": (192, 256)}
# All three are photographed from above.
AUGMENTATION = {"vertical_flip": 0.5}

# Images that pass through a model in training, whatever the share of the labels: that alone differs. Arm (a) takes
# 0.08 s of one core for each.
PASSES = 1600

# Sides of a canvas stay a whole number of tokens.
TOKEN = 16

# The DiT of our arms, a key of dit_detection.small_dit.SIZES: the random one and those that are given.
NETWORK = "small"

# The baselines' second budget is the minutes of this arm: the slowest of ours, as all its blocks are trained.
REFERENCE_ARM = "random"


@dataclass(frozen=True)
class Arm:
    """
    One line of the table.

    Args:
        title (`str`): Its name there.
        pretrained (`str`, *optional*): `"general"`, the DiT of `--pretrained`, or `"own"`, that of `--pretrained_on`.
        is_baseline (`bool`): Whether it is somebody else's detector, which runs once per budget.
        training, model (`dict`): As in [`Settings`].
    """

    title: str
    pretrained: str | None = None
    is_baseline: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


# Upper half tuned: blocks count from the pixels, and the first half stays as it is.
_TUNED: dict[str, Any] = {
    "training": {"learning_rate": 1e-3, "backbone_learning_rate": 1e-3, "layer_decay": 0.85},
    "model": {"frozen_share": 0.5},
}
ARMS = {
    "random": Arm("(a) random init, all blocks trained", training={"learning_rate": 1e-3, "layer_decay": 1.0}),
    "frozen": Arm(
        "(b) pretrained, frozen, cached",
        pretrained="general",
        training={"learning_rate": 1e-3},
        model={"frozen_share": 1.0, "num_views": 8},
    ),
    "tuned": Arm("(c) pretrained, upper half tuned", pretrained="general", **_TUNED),
    "own": Arm("(d) as (c), pretraining continued on the own images", pretrained="own", **_TUNED),
    "retinanet": Arm(
        "(e) RetinaNet, ResNet-50 FPN, random init",
        is_baseline=True,
        training={"optimizer": "adamw", "learning_rate": 5e-4, "weight_decay": 0.05, "max_grad_norm": 1.0},
        model={"anchor_scale": 1.0},
    ),
    "d_fine": Arm(
        "(e) D-FINE, size N, random init",
        is_baseline=True,
        training={"optimizer": "adamw", "learning_rate": 5e-4, "weight_decay": 1e-4, "max_grad_norm": 0.1},
    ),
}


@dataclass(frozen=True)
class Settings:
    """
    Everything that decides what a run gives; two runs of equal settings are the same run.

    Args:
        arm (`str`): A key of `ARMS`.
        dataset (`str`), fraction (`float`), seed (`int`): Which images; the seed also draws weights, order and views.
        split (`str`): What is evaluated, once, with the last weights: `"test"`, or `"validation"` for a choice.
        budget (`str`): `"passes"`, or `"minutes"`: those that `REFERENCE_ARM` took for the same cell, on a CPU the
            processor's.
        passes (`int`): Images that pass through the model in training (with `"minutes"`: through the reference's).
        canvas (`tuple[int, int]`): Height and width, pixels.
        augmentation (`dict`): Of `DetectionAugmentation`.
        ema_decay (`float`, *optional*): Of the averages that are evaluated in the place of the weights.
        training (`dict`): Of `DetectionTrainingArguments`; for a baseline `optimizer`, `learning_rate`,
            `weight_decay` and `max_grad_norm`.
        model (`dict`): Ours: `network` (a key of `SIZES`), `frozen_share` of the blocks, `num_views` (cached),
            `timestep` (by default the library's for this DiT), `tap_norm`, `fit_anchors`, `config` (of
            `DiTDetectionConfig`), `task_aligned` (of `TaskAlignedLoss`). RetinaNet's: `anchor_scale`.
        post (`dict`): Of our post-processing: `nms_threshold` or `soft_nms_sigma`.
        weights (`str`, *optional*): Fingerprint of the pretrained weights.
    """

    arm: str
    dataset: str
    fraction: float
    seed: int
    split: str = "test"
    budget: str = "passes"
    passes: int = PASSES
    batch_size: int = BATCH_SIZE
    canvas: tuple[int, int] = (192, 256)
    augmentation: dict[str, Any] = field(default_factory=dict)
    ema_decay: float | None = 0.999
    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    post: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in a record."""
        return {**asdict(self), "canvas": list(self.canvas)}

    def with_changes(self, changes: dict[str, Any]) -> "Settings":
        """These settings with some fields replaced; what is a `dict` is merged, one level deep."""
        merged = {
            name: getattr(self, name) | value if isinstance(value, dict) else value for name, value in changes.items()
        }
        return replace(self, **merged)

    def scaled(self, scale: float) -> "Settings":
        """These settings on a canvas whose sides are `scale` times as long, in whole tokens."""
        height, width = (TOKEN * round(scale * side / TOKEN) for side in self.canvas)
        return replace(self, canvas=(height, width))

    def enlarged(self) -> "Settings":
        """
        These settings with the larger budget: twice the image passes, on a canvas whose sides are a third longer.

        It takes about four times the minutes, after which all data sets have detectors that find something.
        """
        return replace(self.scaled(4 / 3), passes=2 * self.passes)

    def before_post(self) -> "Settings":
        """What decides the weights: the same for runs that differ in their post-processing alone."""
        return replace(self, post={}, split="")


def settings_of(
    arm: str, dataset: str, fraction: float, seed: int, *, budget: str = "passes", weights: str | None = None
) -> Settings:
    """The settings of one run of the table."""
    return Settings(
        arm=arm,
        dataset=dataset,
        fraction=fraction,
        seed=seed,
        budget=budget,
        passes=PASSES,
        canvas=CANVAS[dataset],
        augmentation=dict(AUGMENTATION),
        training=dict(ARMS[arm].training),
        model=dict(ARMS[arm].model) if ARMS[arm].is_baseline else {"network": NETWORK, **ARMS[arm].model},
        weights=weights,
    )


def table_plan(
    weights: dict[tuple[str, str], str],
    arms: Sequence[str] = tuple(ARMS),
    datasets: Sequence[str] = DATASETS,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = SEEDS,
    *,
    large: bool = False,
) -> Iterator[Settings]:
    """
    All runs of the table that can be made, most informative first: every cell with one seed, then with the next.

    The baselines with our image passes, for which they take up to five times our minutes, come after all others.

    Args:
        weights (`dict`): Fingerprints of the pretrained weights by kind (`"general"`, `"own"`) and data set; an arm
            whose weights are not there is left out.
        arms, datasets, fractions, seeds: Parts of the table.
        large (`bool`): With the larger budget ([`Settings.enlarged`]).
    """
    for parts in (("ours", "minutes"), ("passes",)):
        for seed, part in product(seeds, parts):
            for fraction in fractions:
                for dataset in datasets:
                    for name in arms:
                        arm = ARMS[name]
                        if arm.is_baseline != (part != "ours"):
                            continue
                        fingerprint = None if arm.pretrained is None else weights.get((arm.pretrained, dataset))
                        if arm.pretrained is None or fingerprint is not None:
                            budget = part if arm.is_baseline else "passes"
                            cell = settings_of(name, dataset, fraction, seed, budget=budget, weights=fingerprint)
                            yield cell.enlarged() if large else cell
