"""
Small objects in a large image: a detector on overlapping tiles, its boxes merged and drawn by `supervision`.

    pip install supervision
    python scripts/examples/tiled_inference.py my-detector aerial.jpg --tile 512 --overlap 128 --output found.jpg
"""

import argparse

import numpy as np
import supervision as sv
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection
from transformers.image_utils import load_image

import dit_detection  # noqa: F401 - registers the model with transformers

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="detector: folder or Hub id")
    parser.add_argument("image")
    parser.add_argument("--tile", type=int, default=512, help="side of a tile, pixels: about the model's canvas")
    parser.add_argument("--overlap", type=int, default=128, help="pixels: more than an object is long")
    parser.add_argument("--threshold", type=float, default=0.3)
    parser.add_argument("--output", default="found.jpg")
    args = parser.parse_args()

    model = AutoModelForObjectDetection.from_pretrained(args.checkpoint)
    image_processor = AutoImageProcessor.from_pretrained(args.checkpoint)

    def detect(tile: np.ndarray) -> sv.Detections:
        """A tile, or an image that fits the canvas by being shrunk → what is found in it."""
        inputs = image_processor(tile, return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**inputs)
        results = image_processor.post_process_object_detection(
            outputs, threshold=args.threshold, target_sizes=[tile.shape[:2]]
        )
        return sv.Detections.from_transformers(results[0], id2label=model.config.id2label)

    image = np.array(load_image(args.image))
    # Of an object that a tile cuts, the smaller box lies in the larger one: its overlap counts by the smaller area.
    slicer = sv.InferenceSlicer(
        detect, slice_wh=args.tile, overlap_wh=args.overlap, overlap_metric=sv.OverlapMetric.IOS
    )
    whole, tiled = detect(image), slicer(image)
    print(f"{len(whole)} objects in the image as a whole, {len(tiled)} in tiles: {args.output}")
    picture = sv.BoxAnnotator().annotate(image.copy(), tiled)
    Image.fromarray(sv.LabelAnnotator().annotate(picture, tiled)).save(args.output)
