"""
A DiT checkpoint of diffusers → a detector whose neck and head are yet to be trained.

    python scripts/convert_dit.py facebook/DiT-XL-2-256 dit-detector --labels scratch dent
    python scripts/convert_dit.py path/to/transformer dit-detector --vae stabilityai/sd-vae-ft-mse --dtype bfloat16
"""

from dit_detection.commands.convert import main

if __name__ == "__main__":
    main()
