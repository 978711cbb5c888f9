"""
What someone does who pulls a detector: the Auto classes and `pipeline`, written to files that can be compared.

    python pull_from_hub.py REPO REVISION IMAGE OUTPUT_DIR

runs it as one who does not have this package and trusts the code of that revision; only transformers is imported.
Tests call `pull` for one who has the package.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

THRESHOLD = 0.3


def pull(repo: str, image_path: Path, output_dir: Path, **options: str | bool) -> tuple[torch.nn.Module, object]:
    """Detect with the Auto classes (`tensors.safetensors`, `auto.json`) and with `pipeline` (`pipeline.json`)."""
    output_dir.mkdir(parents=True)
    image = Image.open(image_path)
    model = AutoModelForObjectDetection.from_pretrained(repo, **options).eval()
    processor = AutoImageProcessor.from_pretrained(repo, **options)
    annotation = {"image_id": 1, "annotations": [{"bbox": [10, 10, 30, 30], "category_id": 1}]}
    inputs = processor(image, annotations=[annotation], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    (found,) = processor.post_process_object_detection(outputs, THRESHOLD, [image.size[::-1]])
    tensors = {name: outputs[name] for name in ("loss", "logits", "pred_boxes")}
    tensors |= {"pixel_values": inputs["pixel_values"], **found}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output_dir / "tensors.safetensors")
    corners = ("xmin", "ymin", "xmax", "ymax")
    detections = [
        {"score": score, "label": model.config.id2label[label], "box": dict(zip(corners, map(int, box), strict=True))}
        for score, label, box in zip(*(found[key].tolist() for key in ("scores", "labels", "boxes")), strict=True)
    ]
    (output_dir / "auto.json").write_text(json.dumps(detections))
    detector = pipeline("object-detection", model=repo, **options)
    (output_dir / "pipeline.json").write_text(json.dumps(detector(image, threshold=THRESHOLD)))
    return model, processor


def main(repo: str, revision: str, image_path: str, output_dir: str) -> None:
    torch.set_num_threads(1)
    options = {"revision": revision, "trust_remote_code": True}
    model, processor = pull(repo, Path(image_path), Path(output_dir) / "pulled", **options)
    # Saved again, the code still travels.
    again = Path(output_dir) / "saved_again"
    model.save_pretrained(again)
    processor.save_pretrained(again)
    pull(str(again), Path(image_path), Path(output_dir) / "again", trust_remote_code=True)
    try:
        AutoImageProcessor.from_pretrained(repo, trust_remote_code=True)
    except RuntimeError as error:
        latest = str(error)
    else:
        latest = "loads"
    facts = {
        "transformers": transformers.__version__,
        "latest": latest,
        "module": type(model).__module__,
        "package": find_spec("dit_detection") is not None or "dit_detection" in sys.modules,
    }
    (Path(output_dir) / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
