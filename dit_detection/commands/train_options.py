"""The options of `dit-detect train`."""

import inspect
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser

from ..data import DetectionAugmentation
from ..small_dit import SIZES, SMALL_DIT, size_of
from ..training.training_args import DetectionTrainingArguments

# What the embedded job trains with: it must be done in 4 minutes on 2 cores.
EMBEDDED_JOB = {
    "image_size": [160],
    "num_train_epochs": 3,
    "learning_rate": 2e-3,
    "augmentation": '{"scale_probability": 0.0}',
}
# What scripts/experiments.py trains: arm (c), the upper half of a small pretrained DiT, and arm (a), random weights,
# which have no depth to protect. A small network takes a higher rate than a large one.
SMALL_LEARNING_RATE = 1e-3
RANDOM_WEIGHTS = {"learning_rate": SMALL_LEARNING_RATE, "layer_decay": 1.0}

# What says how annotated images are read; the shapes that are drawn without any have all this.
OF_THE_DATASET = (
    *("format", "dataset_config_name", "class_names", "on_invalid", "validation_fraction", "test_fraction"),
    *("group_by", "streaming", "dataset_revision"),
)

# Views of each image that --cache_frozen keeps unless --num_views says: disk and time to fill it grow with them.
VIEWS_IN_CACHE = 4


@dataclass
class ModelArguments:
    """Which DiT, and how it is turned into a detector."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "DiT of diffusers: Hub id or folder of a pipeline (facebook/DiT-XL-2-256) or bare transformer; a "
            ".pt file of DiT, SiT or REPA, with --family and --vae; or a detector of this library to go on from. "
            "Default: the small pretrained DiT that the library carries, on latents, with its autoencoder."
        },
    )
    family: Literal["dit", "sit", "repa"] | None = field(
        default=None, metadata={"help": "Of a .pt file: whose code saved it.", "choices": ["dit", "sit", "repa"]}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a --model on the Hub."}
    )
    random_dit: Literal["tiny", "small"] | None = field(
        default=None,
        metadata={
            "help": "Begin with random weights, to compare: a DiT on pixels of 1.2 M or 3.6 M parameters, with its "
            "detector.",
            "choices": ["tiny", "small"],
        },
    )
    vae: str | None = field(
        default="auto",
        metadata={"help": "Hub id or folder of the autoencoder; 'auto': the pipeline's own; 'none': a DiT on pixels."},
    )
    timestep: int | None = field(
        default=None,
        metadata={
            "help": "Diffusion timestep whose features are used, 0 to 999. Default: 50; 200 of flow matching, as "
            "its scheduler or --family says."
        },
    )
    condition: int | None = field(default=None, metadata={"help": "Class the DiT is conditioned on. Default: none."})
    image_size: list[int] = field(
        default_factory=lambda: [512],
        metadata={"help": "Canvas that every image is fitted into, in pixels: a side, or height and width."},
    )
    freeze_layers: int | None = field(
        default=None,
        metadata={
            "help": "Freeze the patch embedding and this many blocks, from the first; -1: all. "
            "Default: none; of a small DiT, as the library carries one, the lower half."
        },
    )
    lora_r: int | None = field(
        default=None,
        metadata={
            "help": "Train LoRA matrices of this rank (8, 16, …) beside the frozen weights of all blocks that "
            "--freeze_layers leaves; neck and head in full. What is saved is a small adapter; needs peft."
        },
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "sdpa, eager, flash_attention_2, … as in transformers."}
    )
    config_overrides: str = field(
        default="{}",
        metadata={
            "help": "More of DiTDetectionConfig, as JSON or the path of a JSON file: "
            '\'{"matcher": "max_iou", "box_loss": "smooth_l1"}\'; what `dit-detect check --fit_anchors` writes.'
        },
    )
    # The options that the command line names, for what is settled by a detector that training goes on with.
    given: frozenset[str] = field(init=False, default=frozenset())
    dry_run: bool = field(
        default=False,
        metadata={"help": "Load data and model, tell parameters, FLOPs, memory, disk and time, and train nothing."},
    )


@dataclass
class DataArguments:
    """Which images, and what to do about broken annotations."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Folder of images with COCO JSON, Pascal VOC, YOLO, LabelMe or imagefolder annotations, or a "
            "folder or Hub id of a data set with an `objects` column. Default: shapes that the library draws itself."
        },
    )
    on_invalid: Literal["error", "drop", "clip"] = field(
        default="error",
        metadata={
            "help": "Broken rows: stop, 'drop' them, or 'clip' boxes to the image.",
            "choices": ["error", "drop", "clip"],
        },
    )
    format: Literal["coco", "voc", "yolo", "labelme", "imagefolder", "datasets"] | None = field(
        default=None, metadata={"help": "Of the annotations, where the folder does not tell."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Of a data set on the Hub that has several configurations."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a data set on the Hub."}
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "All classes, in the order of their labels. Default: as the data have them."}
    )
    validation_fraction: float = field(
        default=0.15, metadata={"help": "Share of the training images to validate on, where there is no such split."}
    )
    test_fraction: float | None = field(
        default=None, metadata={"help": "Share of the training images to test on, where there is no such split."}
    )
    group_by: str | None = field(
        default=None,
        metadata={"help": "Column, or field of COCO's images, whose groups (patients, scenes) no split may cut."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read and check rows as they pass, for data that do not fit the disk; needs --max_steps."},
    )
    class_weights: Literal["balanced"] | None = field(
        default=None, metadata={"help": "'balanced': rare classes weigh more in the class loss."}
    )
    augmentation: str = field(
        default="{}",
        metadata={
            "help": "Of DetectionAugmentation, as JSON or the path of a JSON file: '{\"vertical_flip\": 0.5}'; or "
            "'none': images as they are."
        },
    )
    num_views: int | None = field(
        default=None,
        metadata={
            "help": "Augmented views of each image, shown in turn. Default: a new one in every epoch; "
            f"{VIEWS_IN_CACHE} with --cache_frozen."
        },
    )


def parse_options(argv: list[str]) -> tuple[ModelArguments, DataArguments, DetectionTrainingArguments]:
    """What the command line says, with defaults for this machine and for the embedded job."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, DetectionTrainingArguments), prog="dit-detect train", allow_abbrev=False
    )
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    parser.set_defaults(
        output_dir="outputs",
        use_cpu=on_cpu,
        bf16=computes_bf16(on_cpu) and not is_on(argv, "--fp16"),
        per_device_train_batch_size=8,
        # On a CPU the workers would take the cores from the model.
        dataloader_num_workers=0 if on_cpu else 4,
    )
    if _names(argv, "--random_dit"):
        parser.set_defaults(**RANDOM_WEIGHTS)
    if not _names(argv, "--dataset"):
        parser.set_defaults(**EMBEDDED_JOB)
    model_args, data_args, args = parser.parse_args_into_dataclasses(args=argv)
    model_args.given = frozenset(name for name in vars(model_args) if _names(argv, f"--{name}"))
    if data_args.dataset is None:
        for name in OF_THE_DATASET:
            if _names(argv, f"--{name}"):
                parser.error(f"--{name} is for --dataset, which is not given: shapes would be drawn.")
    if model_args.model is not None and model_args.random_dit is not None:
        parser.error(f"--random_dit {model_args.random_dit} stands in the place of --model {model_args.model}.")
    if model_args.model is None and model_args.model_revision is not None:
        parser.error(f"--model_revision {model_args.model_revision} is of --model, which is not given.")
    if len(model_args.image_size) > 2 or min(model_args.image_size) < 1:
        parser.error(f"--image_size {model_args.image_size}: give a side, or height and width, in pixels.")
    if model_args.dry_run and model_args.lora_r is not None:
        parser.error("--dry_run does not count --lora_r; without it, it tells what training whole blocks takes: more.")
    if data_args.streaming:
        if args.max_steps <= 0:
            parser.error("--streaming: nobody knows how long a stream is; set --max_steps.")
        needs_all = {
            "cache_frozen": args.cache_frozen,
            "class_weights": data_args.class_weights,
            "dry_run": model_args.dry_run,
            "num_views": data_args.num_views,
            "repeat_factor_threshold": args.repeat_factor_threshold,
            "test_fraction": data_args.test_fraction,
            "group_by": data_args.group_by,
        }
        for name in (name for name, value in needs_all.items() if value):
            parser.error(f"--{name} needs to see all images beforehand, and --streaming does not.")
    if data_args.num_views is not None and data_args.num_views < 1:
        parser.error(f"--num_views {data_args.num_views} must be 1 or more.")
    if data_args.augmentation == "none":
        if data_args.num_views not in (None, 1):
            parser.error(f"--num_views {data_args.num_views}: with --augmentation none all views are the same one.")
        data_args.num_views = 1
    elif data_args.num_views is None and args.cache_frozen:
        data_args.num_views = VIEWS_IN_CACHE
    if model_args.vae == "none":
        model_args.vae = None
    source, revision = model_args.model or SMALL_DIT, model_args.model_revision
    size = None if model_args.random_dit else size_of(source, model_args.vae, revision)
    if size is not None:
        if data_args.dataset is not None and not _names(argv, "--learning_rate"):
            args.learning_rate = SMALL_LEARNING_RATE
        if not _names(argv, "--freeze_layers"):
            model_args.freeze_layers = SIZES[size]["num_layers"] // 2
    return model_args, data_args, args


def shown_command(argv: list[str], command: str = "train") -> str:
    """The command for others to repeat: without what resumes it, and without tokens."""
    shown, is_value = ["dit-detect", command], False
    for argument in argv:
        name, has_value, _ = argument.partition("=")
        if name.replace("-", "_") in ("__resume_from_checkpoint", "__hub_token", "__push_to_hub_token"):
            is_value = not has_value
        elif is_value:
            is_value = False
        else:
            shown.append(argument)
    return shlex.join(shown)


def read_json_option(name: str, text: str) -> dict[str, Any]:
    """
    The object that an option gives, as JSON or as the path of a JSON file.

    Raises:
        ValueError: If it is neither.
    """
    path = Path(text)
    source = path.read_text(encoding="utf-8") if not text.lstrip().startswith("{") and path.is_file() else text
    try:
        value = json.loads(source)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name} {text!r} is neither a file here nor JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"--{name} {text!r} must be an object: {{...}}.")
    return value


def read_augmentation(text: str) -> DetectionAugmentation | None:
    """
    The augmentation that `--augmentation` gives; "none" is `None`.

    Raises:
        ValueError: It is no JSON object of the arguments of [`DetectionAugmentation`].
    """
    if text == "none":
        return None
    options = read_json_option("augmentation", text)
    known = list(inspect.signature(DetectionAugmentation).parameters)
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"--augmentation has {', '.join(unknown)}; it takes {', '.join(known)}.")
    try:
        return DetectionAugmentation(**options)
    except ValueError as error:
        raise ValueError(f"--augmentation: {error}") from error


def read_config_overrides(text: str) -> dict[str, Any]:
    """
    The fields of a detector's configuration that `--config_overrides` gives.

    Raises:
        ValueError: If it is no object, or has what says how a DiT is loaded.
    """
    overrides = read_json_option("config_overrides", text)
    if names := sorted(overrides.keys() & {"dtype", "vae", "family"}):
        raise ValueError(f"--config_overrides gives {', '.join(names)}, which is no field of DiTDetectionConfig.")
    return overrides


def _names(argv: list[str], option: str) -> bool:
    # With dashes or underscores, as argparse takes them.
    return any(argument.partition("=")[0].replace("-", "_") == option.replace("-", "_") for argument in argv)


def is_on(argv: list[str], option: str) -> bool:
    """Whether a command line sets an option to true: `--fp16`, `--fp16 True` or `--fp16=yes`, not `--fp16 False`."""
    for place, argument in enumerate(argv):
        if _names([argument], option):
            value = argument.partition("=")[2] or "".join(argv[place + 1 : place + 2])
            return value.lower() not in ("no", "false", "f", "n", "0")  # as HfArgumentParser takes them
    return False


def computes_bf16(on_cpu: bool) -> bool:
    """Whether bf16 is faster here: a CPU without matrix units for it computes it slower than float32."""
    if on_cpu:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
