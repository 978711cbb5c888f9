"""What was measured to choose the defaults: named lists of changes to a recipe, compared on the validation split."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from .settings import ARMS, Settings, settings_of


@dataclass(frozen=True)
class Sweep:
    """
    One question to the validation split.

    Args:
        arm (`str`): Whose recipe is changed.
        options (`dict[str, dict]`): Changes by name, as `Settings.with_changes` takes them; `canvas_scale` multiplies
            the sides of the canvas. Where an option changes nothing, it is the recipe as it is.
        fraction (`float`), passes (`int`, *optional*), budget (`str`): As in [`Settings`].
    """

    arm: str
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    fraction: float = 1.0
    passes: int | None = None
    budget: str = "passes"


def _config(**fields: Any) -> dict[str, Any]:
    return {"model": {"config": fields}}


def _backbone(frozen_share: float, rate: float, decay: float) -> dict[str, dict[str, Any]]:
    return {
        "model": {"frozen_share": frozen_share},
        "training": {"backbone_learning_rate": rate, "layer_decay": decay},
    }


def _rates(optimizer: str, rates: Sequence[float], **more: Any) -> dict[str, dict[str, Any]]:
    decay = {"weight_decay": 1e-4} if optimizer == "sgd" else {}
    return {
        f"{optimizer} {rate:g}": {"training": {"optimizer": optimizer, "learning_rate": rate, **decay}, **more}
        for rate in rates
    }


_SMALLER_ANCHORS = {"anchor_scale": 0.5}


SWEEPS = {
    "features": Sweep(
        "frozen",
        {
            f"taps {taps}, t {timestep}, {norm}": {
                "model": {"config": {"out_indices": taps}, "timestep": timestep, "tap_norm": norm, "num_views": 4}
            }
            for taps, timestep, norm in (
                *product(([0, 2, 5], [0, 2, 4], [2, 4], [4]), (50, 100, 0, 200), ["adaln"]),
                *product([[0, 2, 4]], [50], ("layer_norm", "raw")),
            )
        },
        passes=800,
    ),
    "tuning": Sweep(
        "tuned",
        {
            "upper half, rate 1e-3, decay 0.85": {},
            "upper half, rate 5e-4, decay 0.85": _backbone(0.5, 5e-4, 0.85),
            "upper half, rate 5e-4, decay 1": _backbone(0.5, 5e-4, 1.0),
            "upper half, rate 5e-4, decay 0.65": _backbone(0.5, 5e-4, 0.65),
            "upper half, rate 2e-4, decay 0.85": _backbone(0.5, 2e-4, 0.85),
            "all, rate 5e-4, decay 0.85": _backbone(0.0, 5e-4, 0.85),
            "all, rate 1e-3, decay 1": _backbone(0.0, 1e-3, 1.0),
            "none": _backbone(1.0, 5e-4, 0.85),
        },
    ),
    "random": Sweep(
        "random", {f"rate {rate:g}": {"training": {"learning_rate": rate}} for rate in (1e-3, 5e-4, 2e-3)}
    ),
    "neck": Sweep(
        "tuned",
        {"pyramid": {}, "none": _config(neck_channels=None, strides=[16], anchor_sizes=[[24.0, 56.0, 112.0]])},
    ),
    "timestep": Sweep(
        "tuned", {"as it is": {}, **{f"{t}": {"model": {"timestep": t}} for t in (0, 10, 50, 100, 200)}}
    ),
    "matcher": Sweep(
        "tuned",
        {
            "atss": {},
            "max_iou": _config(matcher="max_iou"),
            "task-aligned": {"model": {"task_aligned": {}}},
            "task-aligned after 66 steps of atss": {"model": {"task_aligned": {"num_other_steps": 66}}},
        },
    ),
    "class_loss": Sweep("tuned", {"focal": {}, "cross_entropy": _config(class_loss="cross_entropy")}),
    "box_loss": Sweep(
        "tuned",
        {
            "giou": {},
            "l1": _config(box_loss="smooth_l1", smooth_l1_beta=0.0, box_loss_weight=1.0),
            "smooth_l1": _config(box_loss="smooth_l1", box_loss_weight=1.0),
            "smooth_l1, weight 2": _config(box_loss="smooth_l1", box_loss_weight=2.0),
        },
    ),
    "resolution": Sweep("tuned", {f"sides {scale:.2f}": {"canvas_scale": scale} for scale in (1, 0.75, 4 / 3)}),
    "augmentation": Sweep(
        "tuned",
        {
            "as it is": {},
            "no scale": {"augmentation": {"scale_probability": 0.0}},
            "scale 0.8 to 1.25": {"augmentation": {"scale": [0.8, 1.25]}},
            "scale of 40 % of the images": {"augmentation": {"scale_probability": 0.4}},
            "no colour": {"augmentation": {"photometric": 0.0}},
            "no vertical flip": {"augmentation": {"vertical_flip": 0.0}},
            "mosaic 0.5": {"augmentation": {"mosaic": 0.5}},
            "copy-paste 0.5": {"augmentation": {"copy_paste": 0.5}},
        },
    ),
    "ema": Sweep("tuned", {"0.999": {}, "none": {"ema_decay": None}, "0.99": {"ema_decay": 0.99}}),
    "nms": Sweep(
        "tuned",
        {
            "0.6": {},
            **{f"{threshold}": {"post": {"nms_threshold": threshold}} for threshold in (0.4, 0.5, 0.7)},
            **{f"soft, sigma {sigma}": {"post": {"soft_nms_sigma": sigma}} for sigma in (0.3, 0.5, 1.0)},
        },
    ),
    "anchors": Sweep("tuned", {"fitted": {}, "of the size": {"model": {"fit_anchors": False}}}),
    # For DiTs to be compared, each as --pretrained: on pixels the larger canvas takes the time of latents. Timestep 50
    # was every DiT's default then.
    "pretraining": Sweep(
        "tuned",
        {"as it is": {}, "timestep 50": {"model": {"timestep": 50}}, "sides 1.15": {"canvas_scale": 1.15}},
    ),
    # The baselines' own choices, each with a whole run under the budget that is the tighter one for them. RetinaNet's
    # rates were compared before its anchors were.
    "retinanet": Sweep(
        "retinanet",
        {
            "as it is": {},
            "anchors half as large": {"model": _SMALLER_ANCHORS},
            **_rates("adamw", (2e-4, 1e-3), model=_SMALLER_ANCHORS),
            **_rates("sgd", (0.005, 0.01, 0.02), model=_SMALLER_ANCHORS),
        },
        budget="minutes",
    ),
    "d_fine": Sweep("d_fine", {"as it is": {}, **_rates("adamw", (1e-4, 2e-4, 1e-3))}, budget="minutes"),
}


def sweep_plan(
    name: str,
    weights: dict[tuple[str, str], str],
    datasets: Sequence[str] = ("bccd",),
    fractions: Sequence[float] | None = None,
    seeds: Sequence[int] = (0,),
) -> Iterator[tuple[str, Settings]]:
    """
    The options of a sweep, each with its settings, on the validation split: all with one seed, then with the next.

    Args:
        name (`str`): A key of `SWEEPS`.
        weights (`dict`): Fingerprints of the pretrained weights by kind and data set.
        datasets, fractions, seeds: Where to look.

    Raises:
        ValueError: The arm's pretrained weights are not there.
    """
    sweep = SWEEPS[name]
    kind = ARMS[sweep.arm].pretrained
    for seed, fraction, dataset in product(seeds, fractions or (sweep.fraction,), datasets):
        if kind is not None and (kind, dataset) not in weights:
            raise ValueError(f"--sweep {name} changes the arm {sweep.arm!r}, whose DiT is to be given: --pretrained.")
        fingerprint = None if kind is None else weights[kind, dataset]
        base = settings_of(sweep.arm, dataset, fraction, seed, budget=sweep.budget, weights=fingerprint)
        base = base.with_changes({"split": "validation", "passes": sweep.passes or base.passes})
        for option, changes in sweep.options.items():
            changes = dict(changes)
            scale = changes.pop("canvas_scale", 1)
            yield option, base.scaled(scale).with_changes(changes)
