"""A DiT of diffusers → a detector whose neck and head are yet to be trained; an adapter → the detector it makes."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import ADAPTER_CONFIG_NAME

from ..adapters import BASE, base_of, is_adapter, load_detector, load_image_processor
from ..data.dataset_files import check_class_names
from ..model.image_processing_dit_detection import DiTDetectionImageProcessor
from ..model.modeling_dit_detection import DiTForObjectDetection
from ..sharing.shared_files import CARD_DATA_NAME
from ..small_dit import detector_on, size_of
from .train_options import read_config_overrides


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job: writes the detector and tells what became of the weights."""
    parser = argparse.ArgumentParser(prog="dit-detect convert", description=__doc__)
    parser.add_argument(
        "source",
        help="Hub id or folder: a DiT pipeline (facebook/DiT-XL-2-256) or a bare transformer; or a .pt file of DiT, "
        "SiT or REPA, with --family and --vae; or an adapter, which is merged into its base and takes no other option",
    )
    parser.add_argument("output_dir", help="folder of the detector")
    parser.add_argument("--revision", help="of the Hub id: branch, tag or commit")
    parser.add_argument("--vae", default="auto", help="'auto', Hub id or folder of the autoencoder, or 'none'")
    parser.add_argument("--family", choices=["dit", "sit", "repa"], help="of a .pt file: whose code saved it")
    parser.add_argument(
        "--timestep",
        type=int,
        help="diffusion timestep, 0 to 999; default: 50; 200 of flow matching, as its scheduler or --family says",
    )
    parser.add_argument("--condition", type=int, help="class to condition on; default: none")
    parser.add_argument("--labels", nargs="+", help="names of the classes to detect")
    parser.add_argument("--image_size", type=int, default=512, help="side of the square canvas, in pixels")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: that of the source")
    parser.add_argument("--config_overrides", default="{}", help="more of DiTDetectionConfig: JSON, or a JSON file")
    args = parser.parse_args(argv)
    source, target = Path(args.source).resolve(), Path(args.output_dir).resolve()
    is_merged = is_adapter(args.source, args.revision)
    base = base_of(source) if is_merged and source.is_dir() else source
    read_too = [Path(args.vae).resolve()] if Path(args.vae).is_dir() else []
    if target in (source, source / BASE, Path(base).resolve(), *read_too):
        parser.error(f"{args.output_dir} has what is converted, which would be written over. Name another folder.")
    if target.exists() and not target.is_dir():
        parser.error(f"{args.output_dir} is a file. Name a folder.")
    # Of another detector: the adapter would be loaded in the place of what is written, the card be shared with it.
    if left := [name for name in (ADAPTER_CONFIG_NAME, CARD_DATA_NAME) if (target / name).exists()]:
        parser.error(f"{args.output_dir} has {left[0]} of another detector. Name a new folder.")
    if args.image_size < 1:
        parser.error(f"--image_size {args.image_size} must be 1 pixel or more.")
    check_class_names(args.labels or [], "--labels")

    if is_merged:
        plain = parser.parse_args([args.source, args.output_dir])
        if vars(args) != vars(plain) | {"revision": args.revision}:
            parser.error(f"{args.source} is an adapter: all is settled by its base, and no option can change it.")
        model = load_detector(args.source, revision=args.revision)
        image_processor = load_image_processor(args.source, revision=args.revision)
        model.save_pretrained(args.output_dir)
        image_processor.save_pretrained(args.output_dir)
        print(f"The adapter is merged into its base: {args.output_dir}")
        return

    fields = {
        "timestep": args.timestep,
        "condition": args.condition,
        "id2label": dict(enumerate(args.labels)) if args.labels else None,
    }
    vae = None if args.vae == "none" else args.vae
    overrides = read_config_overrides(args.config_overrides)
    model = DiTForObjectDetection.from_diffusers(
        args.source,
        vae=vae,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        family=args.family,
        revision=args.revision,
        **(fields | detector_on(size_of(args.source, vae, args.revision), overrides)),
    )
    model.save_pretrained(args.output_dir)
    DiTDetectionImageProcessor(size=args.image_size).save_pretrained(args.output_dir)
    parts: dict[str, torch.nn.Module | None] = {
        "latent encoder": model.model.latent_encoder,
        "backbone": model.model.backbone,
    }
    parts |= {"neck": model.neck, "head": model.head}
    for name, part in parts.items():
        if part is not None:
            print(f"{name:>15}: {sum(parameter.numel() for parameter in part.parameters()) / 1e6:8.2f} M parameters")
    config = model.config
    print(
        f"Blocks {config.out_indices} are tapped, folded at timestep {config.timestep}; deeper ones are left out. "
        f"Neck and head are random: train them with `dit-detect train --model {Path(args.output_dir)} --dataset …`."
    )
