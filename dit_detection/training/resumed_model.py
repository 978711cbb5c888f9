"""The detector that a checkpoint is of, against the one that is to go on from it."""

import json
from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from ..adapters import base_of, detector_of

# What a detector is made of. Not the anchors: those of the checkpoint are taken over; nor what its loss is, which may
# change from one step to the next.
_FIELDS = (
    *("base_model", "timestep", "condition", "in_channels", "patch_size", "pretrained_grid", "latent_encoder"),
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "qkv_bias"),
    *("attention_norm_eps", "mlp_norm_eps", "out_indices", "neck_channels", "strides", "head_channels"),
    *("shared_head_tower", "predictor_kernel_size"),
)


def resumed_config(checkpoint: Path, model: nn.Module) -> PreTrainedConfig | None:
    """
    The configuration of the detector that a checkpoint is of; of an adapter's that of its base.

    Args:
        checkpoint (`Path`): Folder `checkpoint-N`.
        model (`nn.Module`): The detector, or `peft.PeftModel`, that is to go on from it.

    Returns:
        `PreTrainedConfig`, or `None` if there is none: the checkpoint is of another trainer, or the base on the Hub.

    Raises:
        ValueError: One of them is an adapter, and the other is not; or their detectors are not the same.
    """
    folder, is_adapter = checkpoint, (checkpoint / ADAPTER_CONFIG_NAME).is_file()
    if is_adapter:
        named = json.loads((checkpoint / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))["base_model_name_or_path"]
        folder = Path(base_of(checkpoint.parent, named or str(checkpoint)))
    if is_adapter != hasattr(model, "peft_config") and (is_adapter or (folder / CONFIG_NAME).is_file()):
        kinds = ("an adapter", "a detector")
        raise ValueError(
            f"{checkpoint} is of {kinds[not is_adapter]}, and what is to be trained is {kinds[is_adapter]}. Go on "
            "with or without --lora_r as that run did, or begin anew in another output_dir."
        )
    if not (folder / CONFIG_NAME).is_file():
        return None
    config = detector_of(model).config
    saved = type(config).from_dict(json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")))
    refuse_another(checkpoint, saved, config)
    return saved


def refuse_another(checkpoint: Path | str, saved: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """
    Refuse to go on with another detector than the one that a checkpoint is of.

    Raises:
        ValueError: Their classes, or what they are made of, are not the same.
    """
    differences = [
        f"{name} {getattr(saved, name)!r} there, {getattr(config, name)!r} here"
        for name in _FIELDS
        if getattr(saved, name) != getattr(config, name)
    ]
    if saved.id2label != config.id2label:
        there, here = ([names[label] for label in sorted(names)] for names in (saved.id2label, config.id2label))
        differences.append(f"classes {', '.join(there)} there, {', '.join(here)} here")
    if differences:
        raise ValueError(
            f"{checkpoint} is of another detector: {'; '.join(differences)}. Go on with the options and the classes "
            "of that run (--class_names gives their order), or begin anew in another output_dir; --model takes the "
            "weights along."
        )
