"""A detector, or an adapter, → a repository of the Hugging Face Hub."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo

from ..sharing.push import push_folder, upload_plan
from ..sharing.shared_files import files_left_behind, is_adapter


def main(argv: Sequence[str] | None = None) -> CommitInfo | None:
    """Run the job; returns what the Hub says of the commit (nothing after a dry run)."""
    parser = argparse.ArgumentParser(
        prog="dit-detect push",
        description=__doc__,
        epilog="The token is that of `hf auth login`, or in HF_TOKEN.",
    )
    parser.add_argument("checkpoint", help="folder that `dit-detect train` or `save_pretrained` left")
    parser.add_argument("repo", help="NAMESPACE/NAME, or NAME for one of your own; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="only you, or the organization, can see it")
    parser.add_argument("--revision", help="branch; made if it does not exist (default: main)")
    parser.add_argument("--tags", nargs="+", default=[], help="words for the model card, to be found by")
    parser.add_argument("--git_tag", help="name for this version, such as v1.0: what others can pin as revision")
    parser.add_argument("--commit_message", default="Upload detector", help="default: %(default)s")
    parser.add_argument("--no_code", action="store_true", help="without the model's code: others need dit_detection")
    parser.add_argument("--base_model", help="of an adapter: Hub id of its base, if it names a folder of yours")
    parser.add_argument("--dry_run", action="store_true", help="only list what would be sent, without the network")
    args = parser.parse_args(argv)
    try:
        if args.dry_run:
            print(describe_plan(args.checkpoint, args.repo, not args.no_code, args.tags, args.base_model))
            return None
        commit = push_folder(
            args.checkpoint,
            args.repo,
            private=args.private or None,
            revision=args.revision,
            tags=args.tags,
            git_tag=args.git_tag,
            commit_message=args.commit_message,
            code=not args.no_code,
            base_model=args.base_model,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"dit-detect push: {error}")
    print(f"{commit.repo_url}\ncommit {commit.oid}\n")
    revision = args.git_tag or commit.oid
    if is_adapter(Path(args.checkpoint)):
        print(f'from dit_detection.adapters import load_detector\nmodel = load_detector("{commit.repo_url.repo_id}")')
    else:
        print(_loading_lines(commit.repo_url.repo_id, revision, remote_code=not args.no_code))
    return commit


def describe_plan(
    folder: str, repo_id: str, code: bool = True, tags: Sequence[str] = (), base_model: str | None = None
) -> str:
    """Files that a push would send with their sizes, and those that stay with the reason."""
    plan = upload_plan(folder, code=code, repo_id=repo_id, tags=tags, base_model=base_model)
    sizes = {
        name: len(source) if isinstance(source, bytes) else source.stat().st_size for name, source in plan.items()
    }
    lines = [f"Would be sent to {repo_id}, {len(plan)} files in one commit:"]
    lines += [f"{size:>16,}  {name}{_remark(Path(folder), name, plan[name])}" for name, size in sizes.items()]
    lines.append(f"{sum(sizes.values()):>16,}  bytes in all")
    behind = {name: why for name, why in files_left_behind(folder, code=code).items() if name not in plan}
    if behind:
        lines += ["", "Would stay here:", *(f"  {name}: {why}" for name, why in behind.items())]
    return "\n".join(lines)


def _remark(folder: Path, name: str, source: Path | bytes) -> str:
    if isinstance(source, bytes):
        return "  (changed for the Hub)" if (folder / name).is_file() else "  (written for the Hub)"
    return "" if folder in source.parents else "  (from the installed package)"


def _loading_lines(repo_id: str, revision: str, remote_code: bool) -> str:
    """How others load it, in three lines."""
    options = f'"{repo_id}", revision="{revision}"'
    if remote_code:
        options += ", trust_remote_code=True"  # of whoever runs these lines; nothing here sets it
        first = "from transformers import pipeline"
    else:
        first = "import dit_detection; from transformers import pipeline"
    return f'{first}\ndetector = pipeline("object-detection", {options})\nprint(detector("image.jpg"))'
