"""
Images without annotations → a pretrained Diffusion Transformer, for `scripts/train.py --model`.

    python scripts/pretrain.py
    accelerate launch scripts/pretrain.py --model facebook/DiT-XL-2-256 --images path/to/xrays --output_dir my-dit

The first trains a tiny new DiT on shapes that the library draws. `--help` lists all options.
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name
    from dit_detection.cli import run

    run("pretrain", sys.argv[1:])
