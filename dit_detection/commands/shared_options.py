"""Options that `dit-detect check`, `preview` and `evaluate` share, so that all look at what training would read."""

import argparse
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.formats import FORMATS

# Of `add_data_options`, those that `load_detection_dataset` takes; all but two under the same name.
DATA_OPTIONS = (
    "format",
    "dataset_config_name",
    "dataset_revision",
    "class_names",
    "validation_fraction",
    "test_fraction",
    "group_by",
    "seed",
)


def add_data_options(parser: argparse.ArgumentParser, has_classes: bool = False) -> argparse._ArgumentGroup:
    """
    Add the options of `dit-detect train` that say which images are read; returns their group.

    Args:
        parser (`argparse.ArgumentParser`): Of the command.
        has_classes (`bool`): Whether the command knows the classes, and does not speak of the option for them.
    """
    group = parser.add_argument_group("as they will be given to `dit-detect train`")
    group.add_argument("--format", choices=FORMATS, help="of the annotations; default: what the folder shows")
    group.add_argument("--dataset_config_name", help="of a data set on the Hub that has several configurations")
    group.add_argument("--dataset_revision", help="of a data set on the Hub: branch, tag or commit")
    group.add_argument(
        "--class_names",
        nargs="+",
        help=argparse.SUPPRESS if has_classes else "all, in the order of their labels; default: as the data have them",
    )
    group.add_argument("--on_invalid", default="error", choices=["error", "drop", "clip"], help="broken annotations")
    group.add_argument(
        "--validation_fraction", type=float, default=0.15, help="of train, where there is no validation"
    )
    group.add_argument("--test_fraction", type=float, help="of train, where there is no test; default: none")
    group.add_argument("--group_by", help="column whose groups (patients, scenes) no split may cut")
    group.add_argument("--seed", type=int, default=42, help="of the images that are set aside, and of augmented views")
    return group


def data_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What the options of `add_data_options` give to `load_detection_dataset`, `on_invalid` left out."""
    arguments = {option: getattr(args, option) for option in DATA_OPTIONS}
    arguments["name"] = arguments.pop("dataset_config_name")
    arguments["revision"] = arguments.pop("dataset_revision")
    return arguments


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the detector that a command reads, as `load_detector` takes it."""
    parser.add_argument("checkpoint", help="detector: folder or Hub id")
    parser.add_argument("--revision", help="of the Hub id: branch, tag or commit")


def refuse_output(parser: argparse.ArgumentParser, option: str, path: str, is_picture: bool) -> None:
    """End the command with a usage error if a file could not be written there after all the work."""
    if not Path(path).parent.is_dir():
        parser.error(f"--{option} {path}: there is no folder {Path(path).parent}.")
    if Path(path).is_dir():
        parser.error(f"--{option} {path} is a folder. Name a file in it.")
    if is_picture and Path(path).suffix.lower() not in _picture_suffixes():
        parser.error(f"--{option} {path}: no picture has this suffix. Take .jpg or .png.")


def _picture_suffixes() -> set[str]:
    """Those that Pillow can write, which are fewer than it can read."""
    return {suffix for suffix, format in Image.registered_extensions().items() if format in Image.SAVE}
