"""A detector whose forward passes are counted, and pictures for the demo to show."""

import numpy as np
from PIL import Image

from dit_detection import DiTDetectionImageProcessor

NAMES = ["<b>red</b>", "white", "platelet"]  # the first as a stranger's config may have it


def counted_detector(tiny_model):
    """The model, with the passes in its `num_runs`, and its image processor."""
    labels = dict(enumerate(NAMES))
    model = tiny_model(
        prior_probability=0.2, id2label=labels, label2id={name: label for label, name in labels.items()}
    )
    model.num_runs = 0

    def count(*_):
        model.num_runs += 1

    model.register_forward_hook(count)
    return model, DiTDetectionImageProcessor(size=64)


def save_with_card(detector, folder):
    """As a trained detector lies on the disk."""
    detector[0].save_pretrained(folder)
    detector[1].save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n\n# What it detects\n")
    (folder / "model_card.json").write_text('{"threshold": 0.42, "threshold_split": "validation"}')
    (folder / "training_args.bin").write_bytes(b"pickled")
    return folder


def write_picture(path, size=(80, 48), mode="RGB", **options):
    """Random pixels."""
    depth = {"RGB": 3, "CMYK": 4, "L": 1}[mode]
    pixels = np.random.default_rng(len(path.name)).integers(0, 255, (size[1], size[0], depth), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze(-1) if depth == 1 else pixels, mode).save(path, **options)
    return str(path)
