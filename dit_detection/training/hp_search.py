"""What `DetectionTrainer.hyperparameter_search` searches, with Optuna."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna


def hp_space(trial: "optuna.Trial") -> dict[str, Any]:
    """
    Suggest training arguments: how fast neck and head learn, and the blocks below, and how strongly weights decay.

    Neither number of epochs nor batch size are among them: more of the first is better, and the second follows from
    the memory.
    """
    return {
        "learning_rate": trial.suggest_float("learning_rate", 3e-5, 3e-3, log=True),
        "layer_decay": trial.suggest_float("layer_decay", 0.65, 1.0),
        "weight_decay": trial.suggest_float("weight_decay", 1e-3, 0.2, log=True),
    }


def eval_map(metrics: dict[str, float]) -> float:
    """Return the mAP of an evaluation, the number to maximise. (`Trainer` itself would add up all metrics.)"""
    return metrics["eval_map"]


def config_space(trial: "optuna.Trial | None") -> dict[str, Any]:
    """
    Suggest fields of [`DiTDetectionConfig`], for a `model_init(trial)`: how anchors are matched, and boxes rated.

    Returns:
        `dict`: Nothing without a trial: `Trainer` makes a first model before it searches.
    """
    if trial is None:
        return {}
    return {
        "matcher": trial.suggest_categorical("matcher", ["atss", "max_iou"]),
        "box_loss": trial.suggest_categorical("box_loss", ["giou", "smooth_l1"]),
    }
