"""A detector → a page in the browser on which it can be tried; or the folder of a Hugging Face Space that shows it."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from ..model.load_dit import refuse_revision
from .shared_options import add_checkpoint


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job: serves until interrupted, or writes the Space."""
    parser = argparse.ArgumentParser(prog="dit-detect demo", description=__doc__)
    add_checkpoint(parser)
    parser.add_argument("--device", help='such as "cpu" or "cuda:1"; default: a GPU if there is one')
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--host", default="127.0.0.1", help='"0.0.0.0": other machines can open the page, too')
    parser.add_argument("--share", action="store_true", help="a public address for 72 hours, through gradio's servers")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code beside the weights, not this package's"
    )
    parser.add_argument("--space", metavar="DIR", help="write a folder that runs as a Hugging Face Space, and end")
    args = parser.parse_args(argv)
    if find_spec("gradio") is None:
        sys.exit('dit-detect demo: the page needs gradio. Install it: pip install "dit_detection[demo]"')
    try:
        if args.space:
            _write_space(args)
        else:
            _serve(args)
    except (OSError, ValueError, RuntimeError) as error:
        # No such checkpoint, device or port; a folder that is in use.
        sys.exit(f"dit-detect demo: {error}")


def _write_space(args: argparse.Namespace) -> None:
    from ..demo.space import write_space

    refuse_revision(args.checkpoint, args.revision)
    files = write_space(args.space, args.checkpoint, args.revision)
    size = sum(path.stat().st_size for path in files)
    print(f"{len(files)} files, {size / 1e6:.1f} MB: {args.space}\nTry it:    cd {args.space} && python app.py")
    print(f"Share it:  hf upload YOUR_NAME/YOUR_SPACE {args.space} . --repo-type space")


def _serve(args: argparse.Namespace) -> None:
    from ..demo.page import launch, load_page  # gradio takes seconds to import

    page = load_page(
        args.checkpoint, revision=args.revision, device=args.device, trust_remote_code=args.trust_remote_code
    )
    launch(page, server_name=args.host, server_port=args.port, share=args.share)
