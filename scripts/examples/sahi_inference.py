"""
A detector in `sahi`, which cuts large images into slices and writes what it found as COCO and pictures.

    pip install sahi
    python scripts/examples/sahi_inference.py my-detector aerial.jpg --slice 512 --output found.json
"""

import argparse
import json

from sahi.models.huggingface import HuggingfaceDetectionModel
from sahi.predict import get_sliced_prediction
from transformers import AutoImageProcessor, AutoModelForObjectDetection

import dit_detection  # noqa: F401 - registers the model with transformers


class DiTDetectionModel(HuggingfaceDetectionModel):
    """As of sahi 0.12: by default it takes a softmax over the classes, which for this detector is no score."""

    _SIGMOID_CLS_PREFIXES = ("DiT",)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="detector: folder or Hub id")
    parser.add_argument("image")
    parser.add_argument("--slice", type=int, default=512, help="side of a slice, pixels: about the model's canvas")
    parser.add_argument("--threshold", type=float, default=0.3)
    parser.add_argument("--output", default="found.json", help="COCO annotations")
    args = parser.parse_args()

    detector = DiTDetectionModel(
        model=AutoModelForObjectDetection.from_pretrained(args.checkpoint),
        processor=AutoImageProcessor.from_pretrained(args.checkpoint),
        confidence_threshold=args.threshold,
        device="cpu",
    )
    found = get_sliced_prediction(
        args.image,
        detector,
        slice_height=args.slice,
        slice_width=args.slice,
        overlap_height_ratio=0.25,
        overlap_width_ratio=0.25,
        postprocess_type="NMS",
        postprocess_match_metric="IOS",
        verbose=0,
    )
    with open(args.output, "w") as stream:
        json.dump(found.to_coco_annotations(), stream)
    print(f"{len(found.object_prediction_list)} objects: {args.output}")
