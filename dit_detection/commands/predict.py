"""A detector on images → boxes as JSON, and pictures."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image, ImageOps
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from ..data.image_reading import decode_image, to_rgb
from ..visualize import draw_detections, draw_grid

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the job; returns what is written to `predictions.json`."""
    parser = argparse.ArgumentParser(prog="dit-detect predict", description=__doc__)
    parser.add_argument("checkpoint", help="detector: folder or Hub id")
    parser.add_argument("images", nargs="+", help="image files, or folders of them (searched in depth)")
    parser.add_argument("--output_dir", default="predictions", help="for predictions.json and the pictures")
    parser.add_argument("--threshold", type=float, default=0.3, help="scores must be above it")
    parser.add_argument("--batch_size", type=int, default=8, help="images at a time")
    parser.add_argument("--no_pictures", action="store_true", help="write the JSON only")
    args = parser.parse_args(argv)

    paths = find_images(args.images)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    model = AutoModelForObjectDetection.from_pretrained(args.checkpoint).to(device).eval()
    image_processor = AutoImageProcessor.from_pretrained(args.checkpoint)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    predictions: list[dict[str, Any]] = []
    for start in tqdm(range(0, len(paths), args.batch_size), unit="batch"):
        batch = paths[start : start + args.batch_size]
        images = [_read(path) for path in batch]
        for path, image, found in zip(
            batch, images, detect(model, image_processor, images, args.threshold), strict=True
        ):
            names = [model.config.id2label[label] for label in found["labels"].tolist()]
            boxes, scores = found["boxes"].tolist(), found["scores"].tolist()
            detections = [
                {"label": name, "score": round(score, 4), "box_xyxy": [round(value, 2) for value in box]}
                for name, score, box in zip(names, scores, boxes, strict=True)
            ]
            width, height = image.size
            predictions.append({"file": str(path), "width": width, "height": height, "detections": detections})
            if not args.no_pictures:
                picture = draw_detections(image, found["boxes"], names, scores)
                # The place in the list keeps pictures of equal names in different folders apart.
                picture.save(output_dir / f"{len(predictions) - 1:05d}_{path.stem}.jpg", quality=90)
    target = output_dir / "predictions.json"
    target.write_text(json.dumps(predictions, indent=1))
    print(f"{sum(len(p['detections']) for p in predictions)} detections in {len(paths)} images: {target}")
    return predictions


def find_images(sources: Sequence[str]) -> list[Path]:
    """Files as they are named, and the images in and below folders, in the order of their names."""
    paths: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                sys.exit(
                    f"dit-detect predict: the folder {source} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})."
                )
            paths += inside
        elif source.is_file():
            paths.append(source)
        else:
            sys.exit(f"dit-detect predict: there is no file or folder {source}.")
    return paths


def detect(model: Any, image_processor: Any, images: Sequence[Image.Image], threshold: float) -> list[dict[str, Any]]:
    """Per image `scores` `(M,)`, `labels` `(M,)` and `boxes` `(M, 4)` (xyxy, pixels of that image), on the CPU."""
    inputs = image_processor(list(images), return_tensors="pt").to(model.device)
    with torch.inference_mode():
        outputs = model(**inputs)
    sizes = [(image.height, image.width) for image in images]
    results = image_processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)
    return [{name: values.cpu() for name, values in result.items()} for result in results]


def draw_samples(
    model: Any, image_processor: Any, dataset: Dataset, num_images: int = 12, threshold: float = 0.3
) -> Image.Image:
    """A grid of images, evenly spaced through the data set: dashed the ground truth, solid what the model sees."""
    model.eval()
    class_names = [model.config.id2label[label] for label in range(model.config.num_labels)]
    indices = torch.linspace(0, len(dataset) - 1, min(num_images, len(dataset))).long().tolist()
    pictures = []
    for row in _rows(dataset, indices):
        image = row["image"]
        found = detect(model, image_processor, [image], threshold)[0]
        expected = torch.tensor(row["objects"]["bbox"]).reshape(-1, 4)
        expected[:, 2:] += expected[:, :2]
        # Enlarged first, or the letters of small images would cover them.
        scale = max(1.0, 640 / max(image.size))
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        names = [class_names[label] for label in row["objects"]["category"]]
        image = draw_detections(image, expected * scale, names, class_names=class_names, ground_truth=True)
        names = [class_names[label] for label in found["labels"].tolist()]
        pictures.append(
            draw_detections(image, found["boxes"] * scale, names, found["scores"], class_names=class_names)
        )
    return draw_grid(pictures, columns=4)


def _rows(dataset: Dataset, indices: list[int]) -> Iterator[dict[str, Any]]:
    undecoded = dataset.with_format(None).cast_column("image", type(dataset.features["image"])(decode=False))
    for index in indices:
        row = undecoded[index]
        yield {**row, "image": to_rgb(decode_image(row["image"], row["width"], row["height"]))}


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        sys.exit(f"dit-detect predict: {path} cannot be read as an image: {error}. Remove it, or name the others.")
