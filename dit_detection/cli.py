"""The console command `dit-detect`; `scripts/` runs the same code."""

import os
import sys
from collections.abc import Sequence

from huggingface_hub.errors import StrictDataclassError

from .commands import check, convert, demo, evaluate, export, predict, pretrain, preview, push, serve, train
from .training.fault_tolerant_trainer import TrainingStoppedError

COMMANDS = {
    "check": check,
    "preview": preview,
    "pretrain": pretrain,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "demo": demo,
    "serve": serve,
    "export": export,
    "push": push,
    "convert": convert,
}

USAGE = """usage: dit-detect COMMAND [OPTIONS]

Object detection on Diffusion Transformers (DiT).

  check      annotated images → what is in them, what is wrong with them, and whether training would start
  preview    annotated images → a picture of what the model is fed in training
  pretrain   images without annotations → a pretrained DiT, for `train --model`
  train      annotated images → a trained detector, its mAP and pictures of what it sees
  evaluate   a detector on annotated images → COCO metrics
  predict    a detector on any number of images → boxes as JSON, COCO, YOLO or Parquet, and pictures
  demo       a detector on a page in the browser, or as the folder of a Hugging Face Space
  serve      a detector behind HTTP: images in, boxes out
  export     a detector → an ONNX file or a torch.export program, compared with the detector
  push       a detector → a repository of the Hugging Face Hub
  convert    a DiT checkpoint → a detector whose head is yet to be trained; an adapter → a detector

`dit-detect COMMAND --help` lists the options of a command.
"""


def main() -> None:
    """Run the command that the first argument names."""
    _print_what_the_console_knows()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    if arguments[0] not in COMMANDS:
        sys.stderr.write(f"dit-detect: there is no command {arguments[0]!r}.\n\n{USAGE}")
        sys.exit(2)
    run(arguments[0], arguments[1:])


def run(command: str, arguments: Sequence[str]) -> None:
    """
    Run a command. What is wrong with its arguments, files and data ends it with the message alone.

    Where in our code it was raised says nothing to the one who has the data; `HF_DEBUG=1`, as for the tools of
    huggingface_hub, shows it all the same.
    """
    _print_what_the_console_knows()
    try:
        COMMANDS[command].main(arguments)
    except (OSError, ValueError, TrainingStoppedError, StrictDataclassError) as error:
        if os.environ.get("HF_DEBUG"):
            raise
        sys.exit(f"dit-detect {command}: {error}")


def _print_what_the_console_knows() -> None:
    """Have a character that the console's encoding lacks printed as "?", rather than end the command there."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # what stands in its place may have none
    if reconfigure is not None:
        reconfigure(errors="replace")
