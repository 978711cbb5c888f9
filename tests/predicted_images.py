"""A detector, a folder of images, and `dit-detect predict` run on them."""

import json
import shutil

import numpy as np
from PIL import Image

from dit_detection import DiTDetectionImageProcessor
from dit_detection.commands import predict

SIZES = [(90, 60), (50, 140), (64, 64), (31, 33), (128, 96)]


def picture(seed, size):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def write_finder_of_five(finding_detector, folder):
    """A detector that finds five things in every image."""
    folder = shutil.copytree(finding_detector, folder, dirs_exist_ok=True)
    DiTDetectionImageProcessor(size=64, max_detections=5).save_pretrained(folder)
    return folder


def write_eleven_images(folder):
    """Some of them deeper in the folder, and what is no image."""
    (folder / "b" / "deep").mkdir(parents=True)
    names = ["a.png", "b/0.PNG", "b/1.jpg", "b/deep/0.png", "c.webp", *(f"d{index}.png" for index in range(6))]
    for index, name in enumerate(names):
        picture(index, SIZES[index % len(SIZES)]).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def command_on(checkpoint, capsys):
    """What runs the command, and returns its exit code and what it printed to stderr."""

    def run(source, output_dir, *more, model=checkpoint):
        sources = [str(path) for path in (source if isinstance(source, list) else [source])]
        arguments = [str(model), *sources, "--output_dir", str(output_dir), "--num_workers", "0", "--batch_size", "2"]
        try:
            predict.main([*arguments, "--shard_size", "3", *more])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
            return code, f"{error.code}" + capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


def read(output_dir):
    return json.loads((output_dir / "predictions.json").read_text())
