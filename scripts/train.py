"""
Annotated images → a trained detector, its mAP, and pictures of what it sees.

    python scripts/train.py
    accelerate launch scripts/train.py --model facebook/DiT-XL-2-256 --dataset path/to/coco --freeze_layers -1 \
        --output_dir my-detector

The first trains the small pretrained DiT of the library on shapes that the library draws. `--help` lists all options.
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name
    from dit_detection.cli import run

    run("train", sys.argv[1:])
