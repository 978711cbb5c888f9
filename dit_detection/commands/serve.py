"""A detector behind HTTP: `POST` an image, and its objects come back as `pipeline("object-detection")` gives them."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig

from ..adapters import is_adapter, load_detector, load_image_processor
from ..inference.serving import BatchedDetector
from ..model.load_dit import refuse_revision
from .shared_options import add_checkpoint

# Where the processes that answer find the command's options: uvicorn starts them by the name of a function.
ENVIRONMENT = "DIT_DETECT_SERVE"


def main(argv: Sequence[str] | None = None) -> None:
    """Answer requests until interrupted; those that were accepted are answered before the end."""
    parser = argparse.ArgumentParser(prog="dit-detect serve", description=__doc__)
    add_checkpoint(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: other machines may ask, whoever they are")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1, help="processes with the model; one that dies is replaced")
    parser.add_argument("--max_batch_size", type=int, default=8, help="images that go through the model at once")
    parser.add_argument("--max_waiting", type=int, default=64, help="images per process; more are refused (503)")
    args = parser.parse_args(argv)
    for library in ("starlette", "uvicorn"):
        if find_spec(library) is None:
            sys.exit(f"dit-detect serve needs {library}: pip install 'dit_detection[serve]'")
    import uvicorn

    try:  # here, where it is told once: of a process that cannot load it uvicorn only starts the next
        refuse_revision(args.checkpoint, args.revision)
        if args.workers > 1:
            load(args.checkpoint, args.revision)
        elif not is_adapter(args.checkpoint, args.revision):
            AutoConfig.from_pretrained(args.checkpoint, revision=args.revision, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        sys.exit(f"dit-detect serve: {args.checkpoint} cannot be loaded: {error}")
    os.environ[ENVIRONMENT] = json.dumps(vars(args))
    uvicorn.run(
        f"{__name__}:{load_app.__name__}",
        factory=True,
        host=args.host,
        port=args.port,
        workers=args.workers,
        limit_concurrency=2 * args.max_waiting,  # connections, idle ones included
        timeout_worker_healthcheck=120,  # while it imports and loads, a process may not answer
    )


def load_app() -> Any:
    """Load the detector that `main` was asked for, as a web application; runs in each process that answers."""
    from ..inference.serving_app import make_app

    args = argparse.Namespace(**json.loads(os.environ[ENVIRONMENT]))
    torch.set_num_threads(max(1, torch.get_num_threads() // args.workers))
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    model, image_processor = load(args.checkpoint, args.revision)
    return make_app(BatchedDetector(model.to(device), image_processor, args.max_batch_size, args.max_waiting))


def load(checkpoint: str, revision: str | None = None) -> tuple[Any, Any]:
    """The detector and its image processor."""
    # Without this word transformers would ask on the terminal whether to run a repository's code.
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    image_processor = load_image_processor(checkpoint, **options)
    return load_detector(checkpoint, **options), image_processor
