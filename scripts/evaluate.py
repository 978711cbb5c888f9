"""
A detector on annotated images → COCO metrics.

    python scripts/evaluate.py my-detector --dataset path/to/coco
    accelerate launch scripts/evaluate.py my-detector --dataset path/to/coco --split validation --output metrics.json
"""

from dit_detection.commands.evaluate import main

if __name__ == "__main__":
    main()
