"""The options of `dit-detect pretrain`."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import HfArgumentParser

from ..pretraining.diffusion_trainer import PretrainingArguments
from ..small_dit import SIZES as SMALL_SIZES
from .train_options import computes_bf16, is_on

# What is trained where no images are named: done within two minutes on 2 cores.
EMBEDDED_JOB = {"size": "tiny", "image_size": 64, "num_shapes": 500, "max_steps": 400}
# New DiTs narrower than those of the paper, which take its 1e-4.
SMALL_LEARNING_RATE = 1e-3


@dataclass
class PretrainingOptions:
    """Which DiT, and which images."""

    images: list[str] | None = field(
        default=None,
        metadata={
            "help": "Folders of images, searched in depth; annotated data sets in any format of `dit-detect train`, "
            "of which the training split alone is read; Hub ids. Default: shapes that the library draws itself."
        },
    )
    num_shapes: int = field(default=0, metadata={"help": "Images of drawn shapes to train on beside these."})
    model: str | None = field(
        default=None,
        metadata={
            "help": "DiT to go on from: Hub id or folder of a pipeline (facebook/DiT-XL-2-256), whose objective, size "
            "and autoencoder are kept. Default: a new one with random weights."
        },
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a --model on the Hub."}
    )
    vae: str = field(
        default="auto",
        metadata={"help": "Hub id or folder of the autoencoder; 'auto': of --model's pipeline, for a new DiT none."},
    )
    size: Literal["tiny", "small", "S", "B", "L", "XL"] = field(
        default="small", metadata={"help": "Of a new DiT: two for a CPU, and those of the paper."}
    )
    objective: Literal["sample", "epsilon", "v_prediction", "flow"] | None = field(
        default=None,
        metadata={
            "help": "What a new DiT predicts on a DDPM schedule: the clean image ('sample'), the noise or v; or the "
            "velocity of flow matching. Default: 'sample' on pixels, 'flow' on latents."
        },
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the square crops of a new DiT, in pixels. Default: 256."}
    )
    crop_area: float = field(
        default=0.25, metadata={"help": "Smallest share of an image that a crop shows, above 0; 1: all but its edges."}
    )
    num_views: int = field(
        default=8,
        metadata={"help": "With an autoencoder: crops of each image, encoded once and kept on disk."},
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the images that the held-out loss is measured on; 256 at most."}
    )
    save_dtype: Literal["float32", "float16", "bfloat16"] = field(
        default="float32", metadata={"help": "Of the weights in the finished folder."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Tell parameters, FLOPs, memory and time, and train nothing."}
    )


def parse_options(argv: list[str]) -> tuple[PretrainingOptions, PretrainingArguments]:
    """What the command line says, with defaults for this machine and for the embedded job."""
    parser = HfArgumentParser(
        (PretrainingOptions, PretrainingArguments), prog="dit-detect pretrain", allow_abbrev=False
    )
    # With dashes or underscores, as argparse takes them.
    names = {name.partition("=")[0][2:].replace("-", "_") for name in argv if name.startswith("--")}
    on_cpu = not torch.cuda.is_available()  # Apple's GPUs have no float64, in which the noise schedule is kept
    parser.set_defaults(
        output_dir="my-dit",  # not that of `dit-detect train`: a detector in it would be read in its place
        use_cpu=on_cpu,
        bf16=computes_bf16(on_cpu) and not is_on(argv, "--fp16"),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        # On a CPU the workers would take the cores from the model.
        dataloader_num_workers=0 if on_cpu else 4,
    )
    if not {"model", "images", "num_shapes"} & names:
        parser.set_defaults(**EMBEDDED_JOB)
    if "num_train_epochs" in names:
        parser.set_defaults(max_steps=-1)  # of both, steps would count
    fixed = sorted(names & {"size", "objective", "image_size"})
    if "model" in names and fixed:
        parser.error(f"--{', --'.join(fixed)}: of a new DiT. With --model, that of the checkpoint is kept.")
    options, args = parser.parse_args_into_dataclasses(args=argv)
    if options.model is None and options.size in SMALL_SIZES and "learning_rate" not in names:
        args.learning_rate = SMALL_LEARNING_RATE
    if options.model is None and options.model_revision is not None:
        parser.error(f"--model_revision {options.model_revision} is of --model, which is not given.")
    if not options.images and not options.num_shapes:
        parser.error("--model needs --images to train on.")
    if not 0 < options.crop_area <= 1:
        parser.error(f"--crop_area {options.crop_area} must lie above 0 and up to 1.")
    if not 0 < options.validation_fraction < 1:
        parser.error(f"--validation_fraction {options.validation_fraction} must lie between 0 and 1.")
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            parser.error(f"--{name} casts the weights, which are still trained and saved. Leave it out.")
    if args.batch_eval_metrics:
        parser.error("--batch_eval_metrics is for metrics that take memory, and there are none. Leave it out.")
    if args.push_to_hub:
        parser.error(
            "--push_to_hub: what is left behind is a pipeline, which the Trainer cannot push. When it is done: "
            f"hf upload USER/NAME {args.output_dir} --exclude 'checkpoint-*/*'"
        )
    if options.num_views < 1 or options.num_shapes < 0:
        parser.error("--num_views must be 1 or more, and --num_shapes 0 or more.")
    if not 0 <= args.ema_decay < 1:
        parser.error(f"--ema_decay {args.ema_decay} must be below 1, such as 0.999, or 0 for none.")
    return options, args
