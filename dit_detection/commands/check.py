"""Annotated images → what is in them, what is wrong with them, and whether training would start."""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from ..anchor_fit import AnchorSetting, best_anchor_ious, boxes_of, coverage, fit_to_splits
from ..data.findings import Finding, FindingLog
from ..data.image_scan import scan_images
from ..data.inspection import inspect_boxes, inspect_classes, inspect_duplicates, inspect_images
from ..data.problems import ProblemLog
from ..data.reader import read_detection_dataset
from ..data.row_format import class_names_of
from ..data.statistics import SplitTable, describe_split, read_table
from ..model.configuration_dit_detection import DiTDetectionConfig
from ..model.image_processing_dit_detection import DiTDetectionImageProcessor
from ..model.load_dit import refuse_revision
from ..small_dit import DETECTORS, detector_on, size_of
from ..training.frozen_cache import canvas_of
from .check_report import draw_findings, print_report
from .shared_options import DATA_OPTIONS, add_data_options, data_arguments, refuse_output
from .train_options import read_json_option


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the job; returns what `--json` writes. Exits with 1 if training would not start."""
    parser = _make_parser()
    args = parser.parse_args(argv)
    for option in ("json", "pictures", "fit_anchors"):
        if getattr(args, option) is not None:
            refuse_output(parser, option, getattr(args, option), is_picture=option == "pictures")
    try:
        settings, canvas = _read_settings(args)
        problems = ProblemLog(args.on_invalid)
        dataset = read_detection_dataset(args.dataset, problems, **data_arguments(args))
    except ValueError as error:
        parser.error(str(error))

    report: dict[str, Any] = {"dataset": args.dataset, "canvas": list(canvas)}
    log = FindingLog()
    log.add_problems(problems)
    tables = {}
    if dataset is not None:
        tables = {split: read_table(split, rows, canvas) for split, rows in dataset.items()}
        report |= _inspect(tables, class_names_of(dataset), log, decode=not args.fast)
        report |= _measure_anchors(tables, settings, args)
    findings = log.sorted()
    report["findings"] = [_to_json(finding) for finding in findings]
    report["training_would_start"] = not any(finding.severity == "error" for finding in findings)
    print_report(report)
    if args.json:
        text = json.dumps(report, indent=1, ensure_ascii=False)
        Path(args.json).write_text(text, encoding="utf-8", errors="backslashreplace")  # an escape of JSON, too
        print(f"Everything as JSON: {args.json}")
    if args.fit_anchors and "fitted_anchors" not in report:
        print(f"No training objects to fit anchors to: {args.fit_anchors} is not written.")
    if args.pictures:
        picture = draw_findings(findings, tables)
        if picture is None:
            print(f"Nothing to draw: {args.pictures} is not written.")
        else:
            picture.save(args.pictures, quality=90)
            print(f"The worst cases: {args.pictures}")
    if not report["training_would_start"]:
        sys.exit(1)
    return report


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dit-detect check", description=__doc__, epilog="Exit code: 0 if training would start, 1 if not."
    )
    parser.add_argument("dataset", help="annotated images, in any form that `dit-detect train` reads")
    parser.add_argument(
        "--fast", action="store_true", help="do not decode the images: files that break off stay hidden"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything there, as JSON")
    parser.add_argument("--pictures", metavar="FILE", help="draw the worst cases there, .jpg or .png")
    parser.add_argument(
        "--fit_anchors",
        metavar="FILE",
        help="look for anchors that cover the training objects better, and write them there for "
        "`dit-detect train --config_overrides FILE`",
    )
    group = add_data_options(parser)
    group.add_argument("--image_size", nargs="+", type=int, help="canvas in pixels: a side, or height and width")
    group.add_argument("--model", help="a DiT, or a detector of this library, whose anchors and canvas are then used")
    group.add_argument("--model_revision", help="of a --model on the Hub: branch, tag or commit")
    group.add_argument("--random_dit", choices=sorted(DETECTORS), help="a DiT with random weights")
    group.add_argument("--config_overrides", default="{}", help="of DiTDetectionConfig: JSON, or a JSON file")
    return parser


def _read_settings(args: argparse.Namespace) -> tuple[dict[str, AnchorSetting], tuple[int, int]]:
    """
    The canvas of a training with these options, and the anchors that it begins with; those of a new detector it fits.

    Without an option that chooses anchors, every default of the library: that of training without a model comes first.
    """
    overrides = read_json_option("config_overrides", args.config_overrides)
    sizes = args.image_size or [512]
    if len(sizes) > 2 or min(sizes) < 1:
        raise ValueError(f"--image_size {sizes}: give a side, or height and width, in pixels.")
    canvas = sizes[0], sizes[-1]
    if args.model is not None:
        refuse_revision(args.model, args.model_revision)
    elif args.model_revision is not None:
        raise ValueError(f"--model_revision {args.model_revision} is of --model, which is not given.")
    if args.model is not None and Path(args.model).is_file():  # of weights, in the original code's format
        return {f"{args.model}, a DiT": _setting(overrides)}, canvas
    if args.model is not None:
        try:
            config = AutoConfig.from_pretrained(args.model, revision=args.model_revision)
        except (OSError, ValueError, KeyError):  # a diffusers checkpoint: its config is not one of transformers
            _refuse_other_than_dit(args.model, args.model_revision)
            size = size_of(args.model, revision=args.model_revision)
            return {f"{args.model}, a DiT": _setting(detector_on(size, overrides))}, canvas
        if config.model_type == DiTDetectionConfig.model_type:
            own = canvas_of(DiTDetectionImageProcessor.from_pretrained(args.model, revision=args.model_revision))
            if args.image_size is not None and canvas != own:
                raise ValueError(
                    f"--image_size {sizes}: {args.model} is a detector, whose canvas is {own[0]} x {own[1]}. "
                    "Leave the option out."
                )
            canvas = own
            return {args.model: _setting(config.to_dict() | overrides)}, canvas
        raise ValueError(f"--model {args.model} is a {config.model_type}, neither a DiT of diffusers nor a detector.")
    if args.random_dit is not None:
        return {f"random DiT, {args.random_dit}": _setting(detector_on(args.random_dit, overrides))}, canvas
    settings = {"the small DiT": _setting(detector_on("small", overrides))}
    if not overrides:
        settings["another DiT (--model)"] = _setting({})
    return settings, canvas


def _refuse_other_than_dit(source: str, revision: str | None) -> None:
    """Read the configuration of a pipeline's transformer, or of a bare one; its weights are left where they are."""
    for name in ("transformer/config.json", "config.json"):
        try:
            is_local = Path(source).is_dir()
            file = Path(source) / name if is_local else Path(hf_hub_download(source, name, revision=revision))
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if config.get("_class_name") in ("DiTTransformer2DModel", "Transformer2DModel"):
            return
    raise ValueError(f"--model {source}: no DiT of diffusers and no detector is there, nor on the Hub. Correct it.")


def _setting(fields: dict[str, Any]) -> AnchorSetting:
    # Only what the anchors follow from: the rest may need a DiT that is not there. The patch is as large as the finest
    # stride, or a configuration of coarse feature maps alone would be refused.
    fields = {name: fields[name] for name in ("strides", "anchor_sizes", "aspect_ratios") if name in fields}
    try:
        config = DiTDetectionConfig(**fields, patch_size=max(16, *fields.get("strides", [16])))
    except (TypeError, StrictDataclassError) as error:
        raise ValueError(f"--config_overrides: {' '.join(str(error).split())}") from error
    return AnchorSetting.from_config(config)


def _inspect(tables: dict[str, SplitTable], class_names: list[str], log: FindingLog, decode: bool) -> dict[str, Any]:
    splits = {}
    for split, table in tables.items():
        facts = scan_images(table.dataset, decode)
        splits[split] = describe_split(table, class_names, facts)
        inspect_images(table, class_names, facts, log)
        inspect_boxes(table, class_names, log)
    inspect_classes(tables, class_names, log)
    inspect_duplicates(tables, log)
    return {"class_names": class_names, "splits": splits}


def _measure_anchors(
    tables: dict[str, SplitTable], settings: dict[str, AnchorSetting], args: argparse.Namespace
) -> dict[str, Any]:
    """Coverage by each setting, split and COCO size; and, if asked for, that by fitted anchors, which are written."""
    report: dict[str, Any] = {"anchors": {name: _coverages(tables, setting) for name, setting in settings.items()}}
    if args.fit_anchors is None or "train" not in tables or not len(tables["train"].rows):
        return report
    name, setting = next(iter(settings.items()))
    fitted, suggested = fit_to_splits(tables, setting)
    overrides = read_json_option("config_overrides", args.config_overrides)
    overrides |= (fitted if suggested else setting).to_overrides()
    Path(args.fit_anchors).write_text(json.dumps(overrides, indent=1), encoding="utf-8")
    command = ["dit-detect", "train", "--dataset", args.dataset]
    # They fit the canvas they were fitted on, and the images.
    defaults = _make_parser()
    for option in (*DATA_OPTIONS, "on_invalid", "model", "model_revision", "random_dit", "image_size"):
        value = getattr(args, option)
        if value != defaults.get_default(option):
            command += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    report["fitted_anchors"] = {
        "instead_of": name,
        "suggested": suggested,
        "config_overrides": overrides,
        "coverage": _coverages(tables, fitted),
        "file": args.fit_anchors,
        "command": shlex.join([*command, "--config_overrides", args.fit_anchors]),
    }
    return report


def _coverages(tables: dict[str, SplitTable], setting: AnchorSetting) -> dict[str, dict[str, dict[str, float]]]:
    result = {}
    for split, table in tables.items():
        ious, _ = best_anchor_ious(*boxes_of(table), setting)
        masks = {name: mask[table.iscrowd == 0] for name, mask in table.size_classes.items()}
        result[split] = {"all": coverage(ious)} | {name: coverage(ious[mask]) for name, mask in masks.items()}
    return result


def _to_json(finding: Finding) -> dict[str, Any]:
    """The finding as plain values; a coordinate that is not finite, which JSON does not know, becomes null."""
    fields = asdict(finding)
    for example in fields["examples"]:
        example["boxes"] = [[v if math.isfinite(v) else None for v in box] for box in example["boxes"]]
    return fields
