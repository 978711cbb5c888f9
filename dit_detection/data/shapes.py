"""
A data set that the project draws itself: five kinds of shapes, rotated, overlapping, cut by the border, among clutter.

Each kind has its typical hue, as cells and parts have, but hues scatter, some shapes are as good as grey, and clutter
has any colour: neither colour nor shape tells everything.

It needs no network and no files, and lets anyone see a detector train within minutes. The constants below set its
difficulty.
"""

import colorsys
import io
import math
from collections.abc import Callable

import numpy as np
from datasets import Dataset, DatasetDict
from PIL import Image, ImageDraw, ImageFilter

from .row_format import detection_features, empty_objects

MAX_OBJECTS = 5
EMPTY_SHARE = 0.05  # of the images have no object at all
SIZE_RANGE = (0.03, 0.6)  # longest side of an object / short side of the image
# Where in the (logarithmic) range: Beta(1, 1) is flat, which makes a fifth of all objects under 6 %.
SIZE_BETA = (3.6, 1.1)
HUE_SCATTER = 0.025  # standard deviation, on a colour circle of length 1; the kinds are a fifth apart
MAX_HIDDEN = 0.5  # share of an object that may lie under others or beyond the border
MAX_BOX_IOU = 0.6  # two boxes that overlap more would be one after non-maximum suppression
LOW_CONTRAST_SHARE = 0.03  # of the objects come close to the colour of the ground
LOW_CONTRAST = (35, 60)  # distance from the ground's colour, Euclidean in 8-bit RGB
MIN_CONTRAST = 100  # the same for all other objects
MAX_CLUTTER = 2  # lines, scribbles and blobs behind the objects
FRONT_LINE_SHARE = 0.3  # of the images have a thin line across their objects
JPEG_QUALITY = 92

SUPERSAMPLING = 4

Array = np.ndarray
Size = tuple[int, int]  # width, height in pixels, as Pillow has it


def draw_shapes_dataset(
    num_train: int = 800,
    num_validation: int = 100,
    num_test: int = 100,
    image_size: int | tuple[int, int] = 128,
    seed: int = 0,
) -> DatasetDict:
    """
    Draw a detection data set of shapes in the row format of `row_format.py`.

    Image i of a split depends on `seed`, the split and i alone: a larger set begins with the smaller one. A box is
    tight around the whole shape, hidden parts included, and clipped to the image.

    Args:
        num_train (`int`): Images in the split "train"; a split of 0 images is left out.
        num_validation (`int`): Images in the split "validation".
        num_test (`int`): Images in the split "test".
        image_size (`int` or `tuple[int, int]`): Side of all (square) images, or the smallest and largest value between
            which width and height are drawn for each image, in pixels.
        seed (`int`): Not negative.

    Raises:
        ValueError: All splits are empty, or the images would be smaller than 32 pixels.
    """
    smallest, largest = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not 32 <= smallest <= largest:
        raise ValueError(
            f"image_size is {image_size}; it must be at least 32, or (smallest, largest) from 32 upwards."
        )
    features = detection_features(list(SHAPES))
    splits = {"train": num_train, "validation": num_validation, "test": num_test}
    dataset = DatasetDict()
    for split_index, (split, num_images) in enumerate(splits.items()):
        if num_images > 0:
            rngs = (np.random.default_rng((seed, split_index, index)) for index in range(num_images))
            rows = [_draw_row(rng, index, smallest, largest) for index, rng in enumerate(rngs)]
            dataset[split] = Dataset.from_list(rows, features=features, split=split)
    if not dataset:
        raise ValueError("num_train, num_validation and num_test are all 0: ask for at least one image.")
    return dataset


def _draw_row(rng: np.random.Generator, image_id: int, smallest: int, largest: int) -> dict:
    width, height = (int(side) for side in rng.integers(smallest, largest, size=2, endpoint=True))
    image, ground = _draw_ground(rng, (width, height))
    _draw_clutter(rng, image, ground)

    objects = empty_objects()
    num_objects = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(1, MAX_OBJECTS, endpoint=True))
    for category, box in _draw_objects(rng, image, ground, num_objects):
        objects["id"].append(image_id * MAX_OBJECTS + len(objects["id"]))
        objects["bbox"].append([box[0], box[1], box[2] - box[0], box[3] - box[1]])
        objects["category"].append(category)
        objects["area"].append((box[2] - box[0]) * (box[3] - box[1]))
        objects["iscrowd"].append(0)

    if rng.random() < FRONT_LINE_SHARE:
        _draw_line(rng, ImageDraw.Draw(image), image.size, _colour_away_from(rng, ground, 40), width=1)
    buffer = io.BytesIO()
    _add_camera_noise(rng, image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return {
        "image": {"bytes": buffer.getvalue(), "path": None},
        "image_id": image_id,
        "width": width,
        "height": height,
        "objects": objects,
    }


# Shapes: rings of corners around (0, 0), the outline first, then the hole if there is one.


def _regular(num_corners: int, radius: float = 1.0, inner: float | None = None) -> Array:
    """Corners of a regular polygon, or of a star whose every second corner has the radius `inner`: `(corners, 2)`."""
    angles = np.linspace(0, 2 * math.pi, num_corners, endpoint=False) - math.pi / 2
    radii = np.full(num_corners, radius)
    if inner is not None:
        radii[1::2] = inner
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


SHAPES: dict[str, Callable[[np.random.Generator], list[Array]]] = {
    "circle": lambda rng: [_regular(72)],
    "square": lambda rng: [_regular(4)],
    "triangle": lambda rng: [_regular(3)],
    "star": lambda rng: [_regular(10, inner=rng.uniform(0.38, 0.5))],
    "ring": lambda rng: [_regular(72), _regular(72, radius=rng.uniform(0.45, 0.65))],
}


def _draw_objects(
    rng: np.random.Generator, image: Image.Image, ground: Array, num_objects: int
) -> list[tuple[int, list[float]]]:
    """Draw up to `num_objects` shapes, each over the ones before; return label and box (xyxy, pixels) of each."""
    drawn: list[tuple[int, list[float]]] = []
    visible: list[tuple[Array, float]] = []  # pixels of each object that no later one covers, and its full area
    for _ in range(num_objects * 3):  # a place that hides too much of another object is given up
        if len(drawn) == num_objects:
            break
        label = int(rng.integers(len(SHAPES)))
        rings = _place(rng, list(SHAPES.values())[label](rng), image.size)
        mask, box = _rasterise(rings, image.size)
        if any(_iou(box, other) > MAX_BOX_IOU for _, other in drawn):
            continue
        covered = np.asarray(mask) > 127
        area = _polygon_area(rings[0]) - sum(_polygon_area(hole) for hole in rings[1:])
        remaining = [(pixels & ~covered, full) for pixels, full in visible] + [(covered, area)]
        if any(pixels.sum() < (1 - MAX_HIDDEN) * full for pixels, full in remaining):
            continue
        visible = remaining
        image.paste(_draw_surface(rng, image.size, ground, label), mask=mask)
        drawn.append((label, box))
    return drawn


def _place(rng: np.random.Generator, rings: list[Array], size: Size) -> list[Array]:
    """Turn, scale and move a shape to a random place of the image; its centre stays inside."""
    angle = rng.uniform(0, 2 * math.pi)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    rings = [ring @ rotation for ring in rings]
    low, high = np.log(SIZE_RANGE)
    longest_side = math.exp(low + (high - low) * rng.beta(*SIZE_BETA)) * min(size)
    scale = longest_side / np.ptp(rings[0], axis=0).max()
    centre = rng.uniform(0, 1, size=2) * size
    return [ring * scale + centre for ring in rings]


def _iou(first: list[float], second: list[float]) -> float:
    overlap = [max(0.0, min(first[i + 2], second[i + 2]) - max(first[i], second[i])) for i in (0, 1)]
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    intersection = overlap[0] * overlap[1]
    return intersection / max(areas - intersection, 1e-9)


def _polygon_area(ring: Array) -> float:
    x, y = ring.T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def _rasterise(rings: list[Array], size: Size) -> tuple[Image.Image, list[float]]:
    """Anti-aliased mask (mode "L") of a shape; box (xyxy) of its part in the image, to a quarter of a pixel."""
    left, top = np.floor(rings[0].min(axis=0)).clip(0, size).astype(int)
    right, bottom = np.ceil(rings[0].max(axis=0)).clip(0, size).astype(int)
    patch = Image.new("L", ((right - left) * SUPERSAMPLING, (bottom - top) * SUPERSAMPLING))
    draw = ImageDraw.Draw(patch)
    for ring, fill in zip(rings, (255, 0), strict=False):
        # Pillow's coordinates are those of pixel centres.
        draw.polygon([tuple(corner) for corner in (ring - (left, top)) * SUPERSAMPLING - 0.5], fill=fill)
    mask = Image.new("L", size)
    mask.paste(patch.reduce(SUPERSAMPLING), (left, top))
    box = np.array(patch.getbbox() or (0, 0, 0, 0)) / SUPERSAMPLING + (left, top, left, top)
    return mask, box.tolist()


# Colours and grounds.


def _colour_away_from(
    rng: np.random.Generator, ground: Array, distance: float, at_most: float = 1e9
) -> tuple[int, ...]:
    """A random colour between the two distances from `ground`; the last one of 100 tries if none is."""
    for _ in range(100):
        near = ground + rng.normal(0, distance / 1.5, size=3)
        colour = np.clip(near if at_most < 255 else rng.uniform(0, 255, size=3), 0, 255)
        if distance <= np.linalg.norm(colour - ground) <= at_most:
            break
    return tuple(int(channel) for channel in colour)


def _typical_colour(rng: np.random.Generator, ground: Array, label: int) -> tuple[int, ...]:
    """A colour of the label's hue that stands out from `ground`; the last one of 100 tries if none does."""
    for _ in range(100):
        hue = (label / len(SHAPES) + rng.normal(0, HUE_SCATTER)) % 1.0
        colour = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, rng.uniform(0.35, 1.0), rng.uniform(0.3, 1.0)))
        if np.linalg.norm(colour - ground) >= MIN_CONTRAST:
            break
    return colour


def _draw_surface(rng: np.random.Generator, size: Size, ground: Array, label: int) -> Image.Image:
    """What fills a shape: one colour, a gradient, or stripes."""
    if rng.random() < LOW_CONTRAST_SHARE:
        return Image.new("RGB", size, _colour_away_from(rng, ground, *LOW_CONTRAST))
    colour = _typical_colour(rng, ground, label)
    surface = Image.new("RGB", size, colour)
    kind = rng.random()
    if kind < 0.3:
        shade = tuple(
            int(channel * 0.65 + ground_channel * 0.1) for channel, ground_channel in zip(colour, ground, strict=True)
        )
        blend = Image.linear_gradient("L").rotate(90 * int(rng.integers(4))).resize(size)
        surface.paste(Image.new("RGB", size, shade), mask=blend)
    elif kind < 0.45:
        draw, step = ImageDraw.Draw(surface), int(rng.integers(6, 16))
        shade = tuple(int(channel * 0.75) for channel in colour)
        for x in range(-size[1], size[0], step):
            draw.line([(x, 0), (x + size[1], size[1])], fill=shade, width=max(1, step // 4))
    return surface


def _noise(rng: np.random.Generator, size: Size, cells: int, strength: float) -> Array:
    """Smooth colour noise of about `cells` spots along each side. Shape `(height, width, 3)`."""
    spots = rng.normal(128, 48, size=(cells, cells, 3)).clip(0, 255).astype(np.uint8)
    smooth = Image.fromarray(spots).resize(size, Image.Resampling.BICUBIC)
    return (np.asarray(smooth, dtype=np.float32) - 128) * np.float32(strength)


def _draw_ground(rng: np.random.Generator, size: Size) -> tuple[Image.Image, Array]:
    """The background and its mean colour: a plain colour with a gradient, blotches and grain of random strength."""
    colour = (rng.uniform(40, 215) + rng.normal(0, 26, size=3)).clip(0, 255).astype(np.float32)
    direction, tint = rng.uniform(-1, 1, size=2), rng.uniform(-24, 24, size=3)
    ramp = np.linspace(-1, 1, size[1])[:, None] * direction[0] + np.linspace(-1, 1, size[0])[None] * direction[1]
    pixels = colour + (ramp[..., None] * tint).astype(np.float32)
    pixels += _noise(rng, size, int(rng.integers(3, 7)), rng.uniform(0, 0.3))
    pixels += _noise(rng, size, int(rng.integers(16, 48)), rng.uniform(0, 0.18))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), colour


def _draw_line(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: Size, colour: tuple, width: int) -> None:
    start, end = rng.uniform(0, 1, size=(2, 2)) * size
    draw.line([tuple(start), tuple(end)], fill=colour, width=width)


def _draw_scribble(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: Size, colour: tuple) -> None:
    letter = np.array([0.5, 1.0]) * rng.uniform(0.03, 0.06) * min(size)
    position = rng.uniform(0, 0.9, size=2) * size
    for _ in range(rng.integers(4, 12)):
        strokes = position + rng.integers(0, 3, size=(4, 2)) / 2 * letter
        draw.line([tuple(point) for point in strokes], fill=colour, width=max(1, min(size) // 160))
        position = position + letter * (1.6, 0)


def _draw_clutter(rng: np.random.Generator, image: Image.Image, ground: Array) -> None:
    """Draw things that are no object: lines, scribbles that look like text, and lobed blobs."""
    draw = ImageDraw.Draw(image)
    side = min(image.size)
    for _ in range(rng.integers(MAX_CLUTTER, endpoint=True)):
        colour = _colour_away_from(rng, ground, 30)
        kind = rng.random()
        if kind < 0.4:
            _draw_line(rng, draw, image.size, colour, width=int(rng.integers(1, 4)))
        elif kind < 0.7:
            _draw_scribble(rng, draw, image.size, colour)
        else:
            angles = np.linspace(0, 2 * math.pi, 60, endpoint=False)
            lobes = rng.uniform(0.3, 0.45) * np.sin(int(rng.integers(2, 4)) * angles + rng.uniform(0, 6.28))
            lobes = lobes + rng.uniform(0.1, 0.3) * np.sin(angles + rng.uniform(0, 6.28))
            radii = (1 + lobes) * rng.uniform(0.03, 0.15) * side
            centre = rng.uniform(0, 1, size=2) * image.size
            points = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            image.paste(colour, mask=_rasterise([points], image.size)[0])


def _add_camera_noise(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    image = image.filter(ImageFilter.BoxBlur(rng.uniform(0, 0.6)))
    grain = rng.standard_normal((image.height, image.width, 1), dtype=np.float32) * rng.uniform(0, 6)
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
