"""The detector that `dit-detect train` begins with: a new one on a DiT, or one to go on from."""

import json
import logging
import os
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from datasets import DatasetDict, IterableDatasetDict
from torch import nn
from transformers import AutoConfig
from transformers.utils import ADAPTER_CONFIG_NAME

from ..adapters import BASE, add_lora, is_adapter
from ..anchor_fit import AnchorSetting, fit_to_splits
from ..data import id2label_of
from ..data.statistics import read_table
from ..model.convert_dit import check_overrides
from ..model.image_processing_dit_detection import DiTDetectionImageProcessor
from ..model.load_dit import refuse_revision
from ..model.modeling_dit_detection import DiTForObjectDetection
from ..small_dit import SMALL_DIT, detector_on, size_of, write_small_dit
from ..training.checkpoint_files import checkpoints_of
from ..training.frozen_cache import canvas_of
from ..training.resumed_model import refuse_another
from ..training.training_args import DetectionTrainingArguments
from .train_options import ModelArguments

logger = logging.getLogger(__name__)


def load_starting_model(
    model_args: ModelArguments,
    dataset: DatasetDict | IterableDatasetDict,
    args: DetectionTrainingArguments,
    overrides: dict[str, Any],
) -> tuple[nn.Module, DiTDetectionImageProcessor]:
    """The detector that training begins with, frozen and with LoRA as the options say, and its image processor."""
    source, revision = model_args.model, model_args.model_revision
    base_to_resume = detector = None if model_args.lora_r is None else _base_to_resume(args)
    if source is not None:
        refuse_revision(source, revision)
    if detector is not None:
        revision = None  # the base lies in a folder
    elif source is not None and _is_detector(source, revision):
        canvas = canvas_of(DiTDetectionImageProcessor.from_pretrained(source, revision=revision))
        config = AutoConfig.from_pretrained(source, revision=revision)
        _refuse_what_is_settled(model_args, config, canvas, overrides)
        detector = source
    if detector is not None:
        model, image_processor = _load_detector(detector, revision, model_args, dataset, overrides)
        saved = AutoConfig.from_pretrained(detector, revision=revision)
        if base_to_resume is not None:
            refuse_another(base_to_resume, saved, model.config)  # before it is written over
        # An adapter names its base without a revision, and would be loaded on another version of it.
        is_saved = revision is None and model.config.to_dict() == saved.to_dict()
    else:
        model, image_processor = _make_detector(model_args, dataset, args, overrides)
        is_saved = False
    if model_args.freeze_layers is not None:
        depth = model.config.num_hidden_layers
        if "freeze_layers" not in model_args.given:  # half of a small DiT, of which fewer blocks may have been left
            model_args.freeze_layers = min(model_args.freeze_layers, depth)
        if not -1 <= model_args.freeze_layers <= depth:
            raise ValueError(
                f"--freeze_layers {model_args.freeze_layers} must lie between 0 and {depth}, the blocks up to the "
                "deepest tap, or be -1 for all."
            )
        model.freeze_backbone(None if model_args.freeze_layers < 0 else model_args.freeze_layers)
    if model_args.lora_r is None:
        return model, image_processor
    run_dir, named = Path(args.output_dir).resolve(), Path(model.name_or_path).resolve()
    if named.is_dir() and named != run_dir / BASE and run_dir in (named, *named.parents):
        is_saved = False  # not for long: this run writes over what is in its folder
    if not is_saved:
        # An adapter is worth nothing without what it was trained on.
        model.name_or_path = str(Path(args.output_dir) / BASE)
        with args.main_process_first(desc="writing the base of the adapter"):
            if args.process_index == 0:
                model.save_pretrained(model.name_or_path)
                image_processor.save_pretrained(model.name_or_path)
    elif Path(model.name_or_path).is_dir():  # the adapter is to find it from other folders, too
        model.name_or_path = os.path.abspath(model.name_or_path)
    return add_lora(model, model_args.lora_r), image_processor


def _base_to_resume(args: DetectionTrainingArguments) -> str | None:
    """
    The base of the adapter that training goes on with, if it does. Made anew it could be another one: there may be
    more images now, to which its anchors would be fitted.
    """
    wanted = args.resume_from_checkpoint
    if not wanted:
        return None
    is_last = wanted is True or wanted == "last"
    for checkpoint in checkpoints_of(Path(args.output_dir)) if is_last else [Path(wanted)]:
        file, base = checkpoint / ADAPTER_CONFIG_NAME, checkpoint.parent / BASE
        if file.is_file() and base.is_dir():
            named = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
            return str(base) if PureWindowsPath(named or "").name == BASE else None
    return None


def _load_detector(
    source: str,
    revision: str | None,
    model_args: ModelArguments,
    dataset: DatasetDict | IterableDatasetDict,
    overrides: dict[str, Any],
) -> tuple[DiTForObjectDetection, DiTDetectionImageProcessor]:
    """A detector to go on from; for other classes, or another order of them, its class layer starts afresh."""
    image_processor = DiTDetectionImageProcessor.from_pretrained(source, revision=revision)
    id2label = id2label_of(dataset)
    fields: dict[str, Any] = {
        "attn_implementation": model_args.attn_implementation,
        "id2label": id2label,
        "label2id": {name: index for index, name in id2label.items()},
    }
    own = AutoConfig.from_pretrained(source, revision=revision).id2label
    if own != id2label:
        fields["class_weights"] = None  # those that it has are of its own classes
        logger.warning(
            "The class layer of %s starts afresh: its classes are %s, and those of the data %s. For the same ones in "
            "its order: --class_names.",
            source,
            [own[label] for label in sorted(own)],
            list(id2label.values()),
        )
    model = DiTForObjectDetection.from_pretrained(
        source, revision=revision, ignore_mismatched_sizes=True, dtype=torch.float32, **(fields | overrides)
    )
    if own != id2label:  # of as many, what was loaded fits, and would score others
        for parameter in model.head.class_predictor.parameters():
            parameter._is_hf_initialized = False
        model.head.class_predictor.init_own_weights()
    return model, image_processor


def _make_detector(
    model_args: ModelArguments,
    dataset: DatasetDict | IterableDatasetDict,
    args: DetectionTrainingArguments,
    overrides: dict[str, Any],
) -> tuple[DiTForObjectDetection, DiTDetectionImageProcessor]:
    """A new detector on a pretrained DiT, or on a random one."""
    fits_anchors = overrides.keys().isdisjoint(("anchor_sizes", "aspect_ratios"))
    source, revision = model_args.model or str(SMALL_DIT), model_args.model_revision
    if model_args.random_dit is not None:
        source = str(Path(args.output_dir) / "random-dit")
        with args.main_process_first(desc="writing the random DiT"):
            if args.process_index == 0:
                write_small_dit(source, model_args.random_dit, max(model_args.image_size), args.seed)
        overrides = {"base_model": None} | overrides
    overrides = detector_on(size_of(source, model_args.vae, revision), overrides)
    fields = {name: getattr(model_args, name) for name in ("timestep", "condition", "attn_implementation")}
    # Weights that are trained stay in float32, whatever the file holds; autocast computes in bf16.
    model = DiTForObjectDetection.from_diffusers(
        source,
        vae=model_args.vae,
        id2label=id2label_of(dataset),
        dtype=torch.float32,
        family=model_args.family,
        revision=revision,
        **(fields | overrides),
    )
    height, width = model_args.image_size[0], model_args.image_size[-1]
    if fits_anchors and isinstance(dataset, IterableDatasetDict):
        logger.info("Anchors are not fitted to a stream: --config_overrides takes others, of dit-detect check.")
    elif fits_anchors:
        _fit_anchors(model, dataset, (height, width))
    return model, DiTDetectionImageProcessor(size={"max_height": height, "max_width": width})


def _fit_anchors(model: DiTForObjectDetection, dataset: DatasetDict, canvas: tuple[int, int]) -> None:
    """Give a new detector anchors that cover more of the annotated boxes, where there are such; as many as it has."""
    tables = {split: read_table(split, dataset[split], canvas) for split in ("train", "validation")}
    fitted, is_better = fit_to_splits(tables, AnchorSetting.from_config(model.config))
    if is_better:
        model.config.update(fitted.to_overrides())
        logger.info(
            "Anchors fitted to the boxes of the training images: sizes %s, ratios %s. Those that --config_overrides "
            "gives stay as they are.",
            model.config.anchor_sizes,
            model.config.aspect_ratios,
        )
    else:
        logger.info("Anchors stay as they are: others would not cover more of the boxes.")


def _refuse_what_is_settled(
    model_args: ModelArguments, config: Any, canvas: tuple[int, int], overrides: dict[str, Any]
) -> None:
    """A detector that training goes on with has its DiT, folded into its weights, and its canvas."""
    check_overrides(overrides)
    size = model_args.image_size
    given = {f"--vae {model_args.vae or 'none'}"} if model_args.vae != "auto" else set()
    given |= {f"--family {model_args.family}"} if model_args.family is not None else set()
    if "image_size" in model_args.given and (size[0], size[-1]) != canvas:
        given.add(f"--image_size {size}")
    for name in ("timestep", "condition"):
        if name in model_args.given and getattr(model_args, name) != getattr(config, name):
            given.add(f"--{name} {getattr(model_args, name)}")
    for name in ("timestep", "condition", "out_indices", "base_model"):
        if name in overrides and overrides[name] != getattr(config, name):
            given.add(f"--config_overrides with {name}")
    if given:
        raise ValueError(
            f"{', '.join(sorted(given))}: {model_args.model} is a detector, whose DiT and canvas are settled. Leave "
            "that out, or begin with the DiT that the detector was made of."
        )


def _is_detector(source: str, revision: str | None) -> bool:
    if is_adapter(source, revision):
        raise ValueError(
            f"--model {source} is an adapter. To go on from the detector it makes, merge it first: "
            f"dit-detect convert {source} FOLDER"
        )
    if Path(source).is_file():  # of weights: as a configuration all of it would be read
        return False
    try:
        return AutoConfig.from_pretrained(source, revision=revision).model_type == "dit_detection"
    except (OSError, ValueError, KeyError):  # a diffusers checkpoint: its config is not one of transformers
        return False
