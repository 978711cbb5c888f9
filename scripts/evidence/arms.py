"""Our detector: what each arm is, trained as any user of the library would."""

import hashlib
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from transformers import set_seed

from dit_detection import DetectionTrainer, DetectionTrainingArguments, DiTForObjectDetection, id2label_of
from dit_detection.anchor_fit import AnchorSetting
from dit_detection.small_dit import DETECTORS, write_small_dit

from .images import fitted_anchors, make_processor, training_images
from .machine import Machine, Spent, Stopwatch
from .settings import Settings
from .task_aligned import TaskAlignedLoss


def fingerprint_of(pretrained: Path) -> str:
    """
    A name for the weights of a pretrained DiT and its autoencoder, wherever its folder is.

    Raises:
        ValueError: There are none.
    """
    files = sorted(_transformer_of(pretrained).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{pretrained} has no weights of a DiT: no *.safetensors in it or in its transformer/.")
    digest = hashlib.sha256()
    for file in [*files, *sorted((pretrained / "vae").glob("*.safetensors"))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _transformer_of(pretrained: Path) -> Path:
    """The folder of the DiT itself, in a pipeline or alone."""
    folder = pretrained / "transformer"
    return folder if folder.is_dir() else pretrained


def build_detector(
    rows: datasets.Dataset, settings: Settings, pretrained: Path | None, folder: Path
) -> DiTForObjectDetection:
    """
    The untrained detector of an arm, with what it freezes frozen.

    Args:
        rows (`datasets.Dataset`): What it will train on: names its classes, and its anchors are fitted to it.
        pretrained (`Path`, *optional*): Folder of its DiT; random weights otherwise.
        folder (`Path`): Where to write the random DiT.
    """
    if pretrained is None:
        pretrained = folder / "random-dit"
        write_small_dit(pretrained, settings.model["network"], max(settings.canvas), settings.seed)
    set_seed(settings.seed)
    options = settings.model
    config = DETECTORS[options["network"]] | options.get("config", {})
    if options.get("fit_anchors", True):
        start = AnchorSetting(
            tuple(config["strides"]), tuple(map(tuple, config["anchor_sizes"])), tuple(config["aspect_ratios"])
        )
        config |= fitted_anchors(rows, settings, start).to_overrides()
    model = DiTForObjectDetection.from_diffusers(
        str(pretrained),
        timestep=options.get("timestep"),
        id2label=id2label_of(rows),
        dtype=torch.float32,
        **config,
    )
    _set_tap_norms(model, options.get("tap_norm", "adaln"))
    if "task_aligned" in options:
        loss = TaskAlignedLoss(model.config, model.detection_loss.matcher, **options["task_aligned"])
        model.detection_loss = loss
    if share := options.get("frozen_share", 0.0):
        model.freeze_backbone(round(share * model.config.num_hidden_layers))
    return model


def _set_tap_norms(model: DiTForObjectDetection, kind: str) -> None:
    """What a tap goes through: the next block's folded adaLN, LayerNorm without its numbers, or nothing ("raw")."""
    norms: nn.ModuleList = model.model.backbone.tap_norms
    if kind not in ("adaln", "layer_norm", "raw"):
        raise ValueError(f"tap_norm is {kind!r}; it must be adaln, layer_norm or raw.")
    for index, norm in enumerate(norms):
        if kind == "raw":
            norms[index] = nn.Identity()
        elif isinstance(norm, nn.LayerNorm) and kind == "layer_norm":
            norm.reset_parameters()


def train_detector(
    model: DiTForObjectDetection, rows: datasets.Dataset, settings: Settings, machine: Machine, folder: Path
) -> Spent:
    """
    Train for as many image passes as the settings say; the model ends with its last weights, averaged.

    The time is that of all of it, with the caching of what is frozen.
    """
    num_views = settings.model.get("num_views")
    batch_size = min(settings.batch_size, len(rows))
    options: dict[str, Any] = {
        "output_dir": str(folder / "trainer"),
        "seed": settings.seed,
        "max_steps": max(1, settings.passes // batch_size),
        "per_device_train_batch_size": batch_size,
        "dataloader_drop_last": True,  # all steps are equally large: passes are steps times batch size
        "dataloader_num_workers": machine.num_workers,
        "use_cpu": machine.device == "cpu",
        "bf16": machine.bf16,
        "ema_decay": settings.ema_decay,
        "cache_frozen": num_views is not None,
        "frozen_cache_dir": str(folder / "cache"),
        # No choice of a checkpoint: nothing is evaluated until training is over.
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "logging_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }
    trainer = DetectionTrainer(
        model,
        DetectionTrainingArguments(**(options | settings.training)),
        processing_class=make_processor(settings),
        train_dataset=training_images(rows, settings, num_views),
    )
    watch = Stopwatch()
    trainer.train()
    return watch.spent(trainer.state.global_step * batch_size)
