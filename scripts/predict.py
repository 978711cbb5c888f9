"""
A detector on any number of images → boxes as JSON, COCO, YOLO or Parquet, and pictures.

    python scripts/predict.py my-detector photo.jpg folder/of/images --output_dir out --threshold 0.5
    accelerate launch scripts/predict.py my-detector folder/of/images --output_dir out --format parquet
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name
    from dit_detection.cli import run

    run("predict", sys.argv[1:])
