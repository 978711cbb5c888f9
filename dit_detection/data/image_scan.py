"""What the image files of a data set are like, and whether they can be decoded to their end."""

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.utils import tqdm
from PIL import Image

from .image_reading import DECODING_ERRORS, ORIENTATION_TAG, open_encoded, upright_size

BATCH = 64  # encoded images in memory at a time


@dataclass(frozen=True)
class ImageFacts:
    """
    One image file.

    Args:
        path (`str`, *optional*): Of the file, or the name it had when it was embedded.
        mode (`str`): Pillow's, such as "RGB" or "CMYK"; empty if the file cannot be opened.
        format (`str`): Pillow's name of the format that the content is in, such as "JPEG".
        damage (`str`, *optional*): Why its pixels cannot be decoded.
        oddities (`tuple[str, ...]`): Kinds of notes, keys of `FINDINGS` in `findings.py`.
    """

    path: str | None
    mode: str = ""
    format: str = ""
    damage: str | None = None
    oddities: tuple[str, ...] = ()


def scan_images(dataset: Dataset, decode: bool = True) -> list[ImageFacts]:
    """
    Look at every image of a split.

    Args:
        dataset (`Dataset`): In the row format, images not decoded.
        decode (`bool`): Decode the pixels: only that finds files that break off. Otherwise the headers are read.
    """
    return list(_scan(dataset, decode))


def _scan(dataset: Dataset, decode: bool) -> Iterator[ImageFacts]:
    # Pillow releases the interpreter while it decodes.
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(dataset), desc="Looking at the images", leave=False) as progress,
    ):
        for start in range(0, len(dataset), BATCH):
            rows = dataset[start : start + BATCH]
            columns = (rows["image"], rows["width"], rows["height"], [decode] * len(rows["image"]))
            for facts in pool.map(look_at, *columns):
                progress.update()
                yield facts


def look_at(encoded: dict[str, Any], width: int, height: int, decode: bool = True) -> ImageFacts:
    """
    Look at one image.

    Args:
        encoded (`dict`): "bytes" or "path", of a `datasets.Image(decode=False)` column.
        width, height (`int`): As annotated, pixels.
        decode (`bool`): As of `scan_images`.
    """
    path = encoded["path"]
    try:
        with warnings.catch_warnings(), open_encoded(encoded) as image:
            warnings.simplefilter("ignore")  # of a metadata block or a size that is unusual, not wrong
            mode, format = image.mode, image.format or ""
            oddities = tuple(_oddities(image, path, (width, height)))
            if decode:
                # JPEG needs an eighth of the arithmetic so, and reads the file to its end all the same.
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
    except DECODING_ERRORS as error:
        return ImageFacts(path, damage=str(error))
    return ImageFacts(path, mode, format, oddities=oddities)


def _oddities(image: Image.Image, path: str | None, annotated_size: tuple[int, int]) -> Iterator[str]:
    suffix = Path(path or "").suffix.lower()
    expected = Image.registered_extensions().get(suffix)
    # Telephones put several JPEGs into one file, which Pillow calls MPO.
    format = "JPEG" if image.format == "MPO" else image.format
    mode = image.mode
    if expected and expected != format:
        yield "wrong file name extension"
    if image.getexif().get(ORIENTATION_TAG, 1) != 1:
        # Where the orientation keeps width and height, nothing tells; then it is applied.
        as_stored = annotated_size == image.size and upright_size(image) != image.size
        yield "annotated against its EXIF orientation" if as_stored else "turned by its EXIF orientation"
    if mode == "CMYK":
        yield "CMYK image"
    if mode.startswith(("I", "F")):
        yield "more than 8 bits per channel"
    if mode in ("P", "PA"):
        yield "palette image"
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        yield "transparent image"
    if mode in ("L", "LA", "1"):
        yield "greyscale image"
