"""From an encoded image to 8-bit RGB pixels, the way its annotations see it."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

# What Pillow raises on files that are damaged, no image, or so large that they are likely an attack.
DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)

ORIENTATION_TAG = 0x0112
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) after the EXIF orientation is applied; reads the header only."""
    width, height = image.size
    return (height, width) if image.getexif().get(ORIENTATION_TAG) in SIDEWAYS else (width, height)


def open_encoded(encoded: dict[str, Any]) -> Image.Image:
    """Open an image of a `datasets.Image(decode=False)` column: "bytes" or, where that is `None`, "path"."""
    data = encoded["bytes"]
    return Image.open(io.BytesIO(data) if data is not None else Path(encoded["path"]))


def decode_image(encoded: dict[str, Any], width: int, height: int) -> Image.Image:
    """
    Decode an image of a `datasets.Image(decode=False)` column.

    The EXIF orientation is applied unless only the stored pixels have the size that was annotated: then the annotation
    tool ignored the orientation, and the boxes belong to the pixels as they are stored.

    Args:
        encoded (`dict`): "bytes" or "path".
        width (`int`): As annotated, pixels.
        height (`int`): As annotated, pixels.

    Raises:
        OSError: The image cannot be read.
        ValueError: It has another size than was annotated.
    """
    with open_encoded(encoded) as image:
        if upright_size(image) == (width, height):
            return ImageOps.exif_transpose(image)
        if image.size != (width, height):
            raise ValueError(f"it is {image.size[0]} x {image.size[1]} pixels, but annotated as {width} x {height}")
        image.load()
        return image.copy()


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Convert an image of any mode to 8-bit RGB.

    16 bits per channel are scaled over their whole range, which Pillow would cut off at 255; floating point is
    stretched from its lowest to its highest value. Transparency is dropped, as `transformers.pipeline` does.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        low, high = values.min(), values.max()
        image = Image.fromarray(((values - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8))
    return image.convert("RGB")
