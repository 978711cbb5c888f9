"""Images without annotations → a pretrained Diffusion Transformer, for `dit-detect train --model`."""

import logging
import math
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from transformers import set_seed
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from ..card.training_card import hardware_of
from ..data import InvalidDatasetError
from ..model.load_dit import load_autoencoder, source_name
from ..pretraining.diffusion_model import DiffusionModel, is_flow
from ..pretraining.diffusion_trainer import DiffusionTrainer, PretrainingArguments
from ..pretraining.image_sources import draw_training_images, list_training_images
from ..pretraining.image_views import CentreCrops, DecodedImages, FixedNoise, NoisedViews, RandomCrops
from ..pretraining.latent_cache import cache_latents
from ..pretraining.new_dit import new_dit, new_scheduler
from ..pretraining.pipeline_folder import load_pipeline, save_pipeline
from ..pretraining.pretraining_card import PretrainingFacts, write_pretraining_card
from ..pretraining.run_cost import measure_encoding, measure_step, step_cost
from ..training.checkpoint_files import checkpoints_of
from .dry_run import duration_text, size_text
from .pretrain_options import PretrainingOptions, parse_options
from .train_options import shown_command

logger = logging.getLogger(__name__)

MAX_HELD_OUT = 256
COMPILED = "_orig_mod."  # what `torch.compile` puts before the names of a module's weights


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the job; returns the metrics on the held-out images (none after a dry run)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options, args = parse_options(argv)
    logging.basicConfig(level=logging.INFO if args.process_index == 0 else logging.ERROR, format="%(message)s")
    if args.process_index != 0:
        datasets.disable_progress_bars()
        transformers.logging.set_verbosity_error()
    set_seed(args.seed)
    if not options.dry_run:
        _refuse_detector(Path(str(args.output_dir)))
    model, vae = _load_model(options)
    image_size = _image_size(model, vae)
    with args.main_process_first(desc="listing the images"):
        rows = _list_images(options, image_size, args.seed, Path(str(args.output_dir)))
    if options.dry_run:
        if args.process_index == 0:
            print(_describe_cost(model, vae, options, args, len(rows)))
        return {}
    images = _read_images(rows, options, args, image_size)
    train, held_out = _datasets(images, options, args, model, vae)
    began_with = {
        "images": images.fingerprint,
        "seed": args.seed,
        "number of held-out images": len(images) - len(train),
        "objective": _objective_of(model),
        "image_size": image_size,
    }
    trainer = DiffusionTrainer(model, args, vae=vae, began_with=began_with, train_dataset=train, eval_dataset=held_out)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    minutes = trainer.state.log_history[-1].get("minutes", 0.0)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    weights = {name.replace(COMPILED, ""): weight for name, weight in weights.items()}
    folder = Path(str(args.output_dir))
    if trainer.is_world_process_zero():
        trained = DiffusionModel(type(model.transformer).from_config(model.transformer.config), model.scheduler)
        trained.load_state_dict(weights)
        if options.save_dtype != "float32":
            trained.transformer.to(getattr(torch, options.save_dtype))
        save_pipeline(folder, trained.transformer, model.scheduler, vae)

    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        facts = _facts(options, args, trainer, images, shown_command(argv, "pretrain"), minutes)
        samples = trainer.samples_dir / f"step-{trainer.state.global_step:07d}.png"
        write_pretraining_card(folder, facts, trainer.state.log_history, samples if samples.is_file() else None)
    logger.info(
        "Held-out loss %.4f after %.1f minutes of training. Train a detector on it with: dit-detect train --model %s",
        metrics["eval_loss"],
        minutes,
        args.output_dir,
    )
    trainer.accelerator.end_training()
    return metrics


def _refuse_detector(folder: Path) -> None:
    """`dit-detect train` writes to the same folder by default, and what reads it would take the detector."""
    names = (CONFIG_NAME, ADAPTER_CONFIG_NAME)
    found = [place / name for place in (folder, *checkpoints_of(folder)) for name in names if (place / name).is_file()]
    if found:
        raise ValueError(f"{folder} holds a detector ({found[0].relative_to(folder)}): name another --output_dir.")


def _load_model(options: PretrainingOptions) -> tuple[DiffusionModel, Any]:
    """The DiT with its objective, and its autoencoder or `None`."""
    if options.model is not None:
        vae_source = None if options.vae == "none" else options.vae
        transformer, scheduler, vae = load_pipeline(options.model, vae_source, options.model_revision)
        return DiffusionModel(transformer, scheduler), vae
    vae = None if options.vae in ("auto", "none") else load_autoencoder(options.vae, "vae")
    downsampling = _downsampling(vae)
    image_size = options.image_size or 256
    if image_size % downsampling:
        raise ValueError(f"image_size={image_size} must be a multiple of {downsampling}, a latent cell of the vae.")
    channels = 3 if vae is None else vae.config.latent_channels
    transformer = new_dit(options.size, image_size // downsampling, channels, downsampling)
    objective = options.objective or ("sample" if vae is None else "flow")
    return DiffusionModel(transformer, new_scheduler(objective, on_pixels=vae is None)), vae


def _downsampling(vae: Any) -> int:
    if vae is None:
        return 1
    return 2 ** (len(vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels) - 1)


def _image_size(model: DiffusionModel, vae: Any) -> int:
    config: Any = model.transformer.config
    return config.sample_size * _downsampling(vae)


def _objective_of(model: Any) -> str:
    """What `--objective` calls it."""
    return "flow" if is_flow(model.scheduler) else model.objective.prediction_type


def _list_images(options: PretrainingOptions, image_size: int, seed: int, output_dir: Path) -> Dataset:
    """All images, encoded: those of the sources, then the drawn ones."""
    parts = [list_training_images(options.images, leave_out=output_dir)] if options.images else []
    if options.num_shapes:
        parts.append(draw_training_images(options.num_shapes, image_size, seed))
    rows = concatenate_datasets(parts)
    _check_number(len(rows))
    return rows


def _check_number(num_images: int) -> None:
    if num_images < 2:
        raise InvalidDatasetError("--images holds one image, and one must be held out. Name more.")


def _read_images(
    rows: Dataset, options: PretrainingOptions, args: PretrainingArguments, image_size: int
) -> DecodedImages:
    images = DecodedImages(
        rows,
        # The smallest crop then still has as many pixels as the model is fed.
        round(image_size / options.crop_area**0.5),
        psutil.virtual_memory().available // (2 * args.world_size),
        show_progress=args.process_index == 0 and not args.disable_tqdm,
    )
    _check_number(len(images))  # without those that came twice
    logger.info("%d images, %d of them decoded in memory.", len(images), images.num_kept)
    if images.num_small:
        logger.info("%d of them are small: some crops of these are enlarged.", images.num_small)
    return images


def _datasets(
    images: DecodedImages, options: PretrainingOptions, args: PretrainingArguments, model: DiffusionModel, vae: Any
) -> tuple[NoisedViews, FixedNoise]:
    """What is trained on, and what the loss is measured on."""
    image_size = _image_size(model, vae)
    order = np.random.default_rng(args.seed).permutation(len(images))
    num_held_out = _num_held_out(len(images), options)
    train: Any = RandomCrops(images, order[num_held_out:], image_size, options.crop_area, args.seed)
    held_out: Any = CentreCrops(images, order[:num_held_out], image_size)
    if vae is not None:
        settings = {
            "images": images.fingerprint,
            "image_size": image_size,
            "stored_side": images.side,
            "seed": args.seed,
            "num_held_out": num_held_out,
            "versions": {name: version(name) for name in ("dit_detection", "diffusers", "pillow")},
        }
        crops = {**settings, "crop_area": options.crop_area}
        train = cache_latents(train, vae, num_views=options.num_views, key=crops, device=args.device)
        held_out = cache_latents(held_out, vae, num_views=1, key=settings, device=args.device)
    return NoisedViews(train, args.seed), FixedNoise(held_out, args.seed)


def _num_held_out(num_images: int, options: PretrainingOptions) -> int:
    return min(MAX_HELD_OUT, num_images - 1, max(1, round(num_images * options.validation_fraction)))


def _facts(
    options: PretrainingOptions,
    args: PretrainingArguments,
    trainer: DiffusionTrainer,
    images: DecodedImages,
    command: str,
    minutes: float,
) -> PretrainingFacts:
    model: Any = trainer.model
    model = trainer.accelerator.unwrap_model(model)
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    shown = sorted({min(losses), max(losses)})
    num_train = len(trainer.train_dataset)
    shapes = [f"{options.num_shapes} drawn shapes"] * bool(options.num_shapes)
    return PretrainingFacts(
        name=Path(str(args.output_dir)).name,
        base_model=None if options.model is None else source_name(options.model),
        objective=_objective_of(model),
        num_timesteps=model.scheduler.config.num_train_timesteps,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        image_size=_image_size(model, trainer.vae),
        sources=[*(Path(os.path.abspath(source)).name for source in options.images or []), *shapes],
        num_images=num_train,
        num_held_out=len(images) - num_train,
        fingerprint=images.fingerprint,
        command=command,
        seed=args.seed,
        steps=trainer.state.global_step,
        batch_size=args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
        minutes=minutes,
        hardware=hardware_of(args),
        losses={step: losses[step] for step in shown},
    )


def length_of(args: PretrainingArguments, num_train: int) -> tuple[int, float]:
    """How many optimizer steps and how many epochs a run on so many images has, as `Trainer` counts them."""
    num_batches = math.ceil(num_train / (args.train_batch_size * args.world_size))
    if args.max_steps > 0:
        per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        return args.max_steps, args.max_steps * per_step / num_train
    num_steps = math.ceil(args.num_train_epochs * math.ceil(num_batches / args.gradient_accumulation_steps))
    return num_steps, args.num_train_epochs


def _describe_cost(
    model: DiffusionModel, vae: Any, options: PretrainingOptions, args: PretrainingArguments, num_images: int
) -> str:
    """A table of parameters, operations, memory and time of the run that the options describe."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    flops, num_bytes = step_cost(
        model, args.per_device_train_batch_size, dtype, args.gradient_checkpointing, has_averages=args.ema_decay > 0
    )
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    seconds = measure_step(model.to(args.device), args.per_device_train_batch_size, dtype)
    seconds *= args.gradient_accumulation_steps
    images = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    num_held_out = _num_held_out(num_images, options)
    num_steps, num_epochs = length_of(args, num_images - num_held_out)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    config: Any = model.transformer.config
    lines = [
        ("images", f"{num_images}, {num_held_out} of them held out, the others seen {num_epochs:.1f} times each"),
        ("parameters", f"{num_parameters / 1e6:.1f} M"),
        ("input", f"{config.in_channels} x {config.sample_size} x {config.sample_size}, as the DiT sees it"),
        ("per image", f"{flops / 1e9:.1f} GFLOP, forward and backward"),
        ("memory", f"about {size_text(num_bytes)} for a step of {args.train_batch_size} images per device"),
        ("step", f"{seconds:.2f} seconds for {images} images, measured just now; reading images comes on top"),
        ("time", f"about {duration_text(seconds * num_steps)} for {num_steps} steps"),
    ]
    if vae is not None:
        num_views = options.num_views * num_images
        encoding = measure_encoding(vae, _image_size(model, vae), args.device) * num_views / args.world_size
        lines.append(("latents", f"about {duration_text(encoding)} more, once, for {num_views} views"))
    table = "\n".join(f"  {name:<12}{text}" for name, text in lines)
    return f"What this run would take (nothing was trained):\n{table}"
