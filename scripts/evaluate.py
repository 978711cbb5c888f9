"""
A detector on annotated images → COCO metrics.

    python scripts/evaluate.py my-detector --dataset path/to/coco
    accelerate launch scripts/evaluate.py my-detector --dataset path/to/coco --split validation --output metrics.json
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name
    from dit_detection.cli import run

    run("evaluate", sys.argv[1:])
