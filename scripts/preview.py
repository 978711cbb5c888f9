"""
Annotated images → a picture grid of exactly what the model is fed in training.

    python scripts/preview.py path/to/dataset
    python scripts/preview.py path/to/dataset --augmentation '{"mosaic": 0.5, "copy_paste": 0.5}' --output mosaic.jpg
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name
    from dit_detection.cli import run

    run("preview", sys.argv[1:])
