"""
A DiT checkpoint of diffusers → a detector whose neck and head are yet to be trained.

    python scripts/convert_dit.py facebook/DiT-XL-2-256 dit-detector --labels scratch dent
    python scripts/convert_dit.py path/to/transformer dit-detector --vae stabilityai/sd-vae-ft-mse --dtype bfloat16
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name
    from dit_detection.cli import run

    run("convert", sys.argv[1:])
