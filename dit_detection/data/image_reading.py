"""From an encoded image to 8-bit RGB pixels, the way its annotations see it."""

import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

# What Pillow raises on files that are damaged (`RuntimeError`: AVIF), no image, or as large as an attack.
DECODING_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)

# What cameras, scanners and the web write. Pillow goes by a file's content, not by its name, and knows forty more
# formats; EPS it would hand to Ghostscript, another program.
Image.init()
FORMATS: list[str] = [
    name for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP") if name in Image.OPEN
]

MAX_PIXELS = 50_000_000  # of an image from a stranger: 150 MB as RGB; the largest of common cameras

DEPTHS = (8, 10, 12, 14, 16, 24, 32)  # bits of a grey value, as sensors give them
MAX_COUNTED = 1_000_000  # pixels of an image that tell its depth

ORIENTATION_TAG = 0x0112
# What undoes each EXIF orientation but 1, and those that exchange width and height.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) after the EXIF orientation is applied; of a PNG, whose EXIF may be at its end, all is read."""
    width, height = image.size
    if isinstance(image, TiffImageFile):  # its size is the upright one already, depending on the version of Pillow
        width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
    return (height, width) if image.getexif().get(ORIENTATION_TAG) in SIDEWAYS else (width, height)


def upright(image: Image.Image) -> Image.Image:
    """
    The image with its EXIF orientation applied, loaded; itself where there is none.

    `ImageOps.exif_transpose` writes all of the EXIF anew as well, and so fails on tags that a camera wrote oddly.
    """
    image.load()  # a TIFF is upright afterwards, and its orientation is gone
    turn = TURNS.get(image.getexif().get(ORIENTATION_TAG, 1))
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
        turned.info.pop(key, None)  # who reads it next would turn it again
    return turned


def open_encoded(encoded: dict[str, Any]) -> Image.Image:
    """Open an image of a `datasets.Image(decode=False)` column: "bytes" or, where that is `None`, "path"."""
    data = encoded["bytes"]
    return Image.open(io.BytesIO(data) if data is not None else Path(encoded["path"]), formats=FORMATS)


class UnreadableImageError(ValueError):
    """What cannot be read as an image; the message continues a sentence that begins with the file's name."""


def read_image(source: bytes | str | os.PathLike, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """
    Read an image that may come from a stranger: 8-bit RGB, upright by its EXIF orientation, the first of an animation.

    Args:
        source (`bytes` or path): An encoded image, or its file.
        max_pixels (`int`, *optional*): Width times height; more is refused by the header, before pixels are decoded.
            `None`: Pillow's own bound, twice `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        UnreadableImageError: It is empty, no image, of a format that is not read here, damaged or too large, or there
            is no such file.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            if max_pixels is not None and width * height > max_pixels:
                raise UnreadableImageError(
                    f"has {width} x {height} pixels, more than the {max_pixels:,} that are allowed. Make it smaller."
                )
            return to_rgb(upright(image))
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        is_empty = len(source) == 0 if isinstance(source, bytes) else os.path.getsize(source) == 0
        fault = "is empty" if is_empty else f"is no image of the formats {', '.join(FORMATS)}"
        raise UnreadableImageError(f"{fault}. Give one that opens in a browser.") from error
    except Exception as error:  # a damaged image raises whatever its decoder raises
        raise UnreadableImageError(
            f"cannot be read as an image: {error}. Give one that opens in a browser."
        ) from error


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
            return upright(image)
        if image.size != (width, height):
            raise ValueError(f"it is {image.size[0]} x {image.size[1]} pixels, but annotated as {width} x {height}")
        image.load()
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Convert an image of any mode to 8-bit RGB.

    More than 8 bits in a grey image, which Pillow would cut off at 255, are scaled by the depth that they use, the
    smallest of `DEPTHS` that holds all but a thousandth of the pixels: where those are below 4096, it is an X-ray of
    12 bits in a file of 16, whatever a broken pixel says. Negative and floating-point values are stretched from the
    lowest to the highest. Transparency is dropped, as `transformers.pipeline` does.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image))
        low, high = float(values.min()), float(values.max())
        if image.mode.startswith("I") and low >= 0:
            step = max(1, values.size // MAX_COUNTED)
            usual = np.quantile(values.reshape(-1)[::step], 0.999)
            low, high = 0.0, 2.0 ** next(bits for bits in DEPTHS if usual < 2**bits) - 1
        # In place: an image from a stranger may be large. Only differences of floats may be too much for 32 bits.
        scaled = values.astype(np.float32 if image.mode.startswith("I") else np.float64)
        scaled -= low
        scaled *= 255 / max(high - low, 1e-12)
        np.rint(scaled, out=scaled)
        image = Image.fromarray(scaled.clip(0, 255, out=scaled).astype(np.uint8))
    return image.convert("RGB")
