"""The options of training, with the defaults of detection."""

from dataclasses import dataclass, field
from typing import Any

from transformers import SchedulerType, TrainingArguments


@dataclass
class DetectionTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with defaults that are right for detection: mAP after every epoch, the best checkpoint kept.

    Args:
        backbone_learning_rate (`float`, *optional*): For the deepest block; by default `learning_rate`, which neck and
            head always get.
        layer_decay (`float`): Each block learns at this multiple of the next deeper one's rate, the patch embedding at
            the lowest. 1 for weights that were not pretrained.
        cache_frozen (`bool`): Run the frozen part of the model over the data once, before training, instead of in
            every step; see [`cache_frozen`]. An augmented data set then needs `num_views`.
        frozen_cache_dir (`str`, *optional*): Where to keep what it makes of them; by default in the cache of
            `datasets`.
        repeat_factor_threshold (`float`, *optional*): Images with a class that is in a smaller share of the training
            images than this come several times per epoch, in the same view; see [`repeat_factors_of`]. Off by default.
        ema_decay (`float`, *optional*): Evaluate, save and end with moving averages of the weights, such as 0.999; see
            [`EmaCallback`]. Off by default.
        early_stopping_patience (`int`, *optional*): Stop when this many evaluations in a row have not been better than
            the best in `metric_for_best_model`. Off by default.
    """

    backbone_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the deepest DiT block. Default: learning_rate."}
    )
    layer_decay: float = field(
        default=0.85, metadata={"help": "Learning rate of each block relative to the next deeper one."}
    )
    cache_frozen: bool = field(
        default=False,
        metadata={
            "help": "Run the frozen part (VAE, frozen blocks) over each view of each image once, and keep that."
        },
    )
    frozen_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for --cache_frozen. Default: in the cache of `datasets`."}
    )
    repeat_factor_threshold: float | None = field(
        default=None, metadata={"help": "Repeat images of classes that less than this share of the images have."}
    )

    ema_decay: float | None = field(
        default=None, metadata={"help": "Evaluate and save moving averages of the weights: 0.999. Default: off."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations that were not the best. Default: never."}
    )

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of neck and head."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW's; never on biases, norms and layer scales."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps (1 or more) or share of all steps (below 1)."})
    num_train_epochs: float = field(default=50.0, metadata={"help": "Passes over the training images."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to measure mAP."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log the loss."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept: the best and the last."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint's weights."})
    metric_for_best_model: str | None = field(default="map", metadata={"help": "What the best checkpoint is best in."})
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Whether more of that is better. Default: yes, unless its name ends in loss."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "After an interruption, early stopping goes on counting where it was."}
    )
    # A step that is not finite ends the training; to look at every loss once more would cost time.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Not needed: such steps are not taken."})
    # Trainer drops the columns that the model's forward does not name; before the transform has made those.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: the transform needs all."})
    # Every weight that trains has a gradient, if only of zeros: to look for those without would cost time per step.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Not needed: all are used."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_what_detection_has_not()
        if self.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU:
            # It would take every rise of the mAP for a plateau: torch's default is that less is better.
            options: Any = self.lr_scheduler_kwargs or {}  # type: ignore[has-type]
            self.lr_scheduler_kwargs = {"mode": "max" if self.greater_is_better else "min", **options}
        # Of streamed rows accelerate would have one process read for all, and cut every tensor in a batch to the
        # batch's length: each image's labels, too.
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False

    def _refuse_what_detection_has_not(self) -> None:
        """Options that would end training in its first step, or after its first evaluation."""
        for name, only, reason in (
            ("label_smoothing_factor", 0.0, "its losses have no such option"),
            ("eval_do_concat_batches", True, "mAP is computed of all batches together"),
            ("prediction_loss_only", False, "without predictions there is no mAP"),
        ):
            if getattr(self, name) != only:
                raise ValueError(f"{name}={getattr(self, name)} does not go with detection: {reason}. Leave it out.")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} must be 1 or more: the evaluations in a row "
                "that may be no better than the best. Without it training does not stop early."
            )
