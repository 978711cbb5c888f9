"""
A detector, or an adapter, → a repository of the Hugging Face Hub.

    python scripts/push.py my-detector someone/my-detector --dry_run
    python scripts/push.py my-detector someone/my-detector --private --git_tag v1.0
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name
    from dit_detection.cli import run

    run("push", sys.argv[1:])
