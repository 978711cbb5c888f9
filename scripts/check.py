"""
Annotated images → what is in them, what is wrong with them, and whether training would start.

    python scripts/check.py path/to/data
    python scripts/check.py path/to/data --json report.json --pictures worst.jpg --fit_anchors anchors.json
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name
    from dit_detection.cli import run

    run("check", sys.argv[1:])
