"""The console command `dit-detect`; `scripts/` runs the same code."""

import sys

from .commands import check, convert, evaluate, export, predict, preview, train
from .data import InvalidDatasetError

COMMANDS = {
    "check": check,
    "preview": preview,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "convert": convert,
}

USAGE = """usage: dit-detect COMMAND [OPTIONS]

Object detection on Diffusion Transformers (DiT).

  check      annotated images → what is in them, what is wrong with them, and whether training would start
  preview    annotated images → a picture of what the model is fed in training
  train      annotated images → a trained detector, its mAP and pictures of what it sees
  evaluate   a detector on annotated images → COCO metrics
  predict    a detector on images → boxes as JSON, and pictures
  export     a detector → an ONNX file or a torch.export program, compared with the detector
  convert    a DiT checkpoint of diffusers → a detector whose head is yet to be trained

`dit-detect COMMAND --help` lists the options of a command.
"""


def main() -> None:
    """Run the command that the first argument names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    if arguments[0] not in COMMANDS:
        sys.stderr.write(f"dit-detect: there is no command {arguments[0]!r}.\n\n{USAGE}")
        sys.exit(2)
    try:
        COMMANDS[arguments[0]].main(arguments[1:])
    except InvalidDatasetError as error:
        # The report is for the one who has the data; where in our code it was raised says nothing to them.
        sys.exit(f"dit-detect {arguments[0]}: {error}")
