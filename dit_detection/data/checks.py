"""What can be wrong with images and boxes, whatever format they come from."""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
from datasets.utils import tqdm

from .annotations import Annotations
from .image_reading import DECODING_ERRORS, open_encoded, upright_size

logger = logging.getLogger(__name__)

Size = tuple[int, int]  # width, height

NUM_THREADS = 16  # they wait for the disk: on one with 2 ms per file, 118,000 headers take 20 seconds and not 290
BATCH = 64  # encoded images in memory at a time
MAX_OVERSHOOT = 1.0  # pixels a box may stick out of its image: annotation tools round
MARGIN = 0.01  # how far fractions of the image may lie beside 0 and 1
MIN_SIDE = 1e-3  # pixels; in float32 a thinner box may have no area at all


def check_images(annotations: Annotations, images: Iterable[dict[str, Any] | None], check_files: bool = True) -> None:
    """
    Compare each image's header with its annotated size, and fill in sizes that the annotations leave out.

    Args:
        annotations (`Annotations`): Images that cannot be used are marked in it.
        images (`Iterable[dict]`): Encoded images in the order of the rows.
        check_files (`bool`): Otherwise only images without an annotated size are opened.
    """
    num_stored_upright = 0
    numbered = enumerate(images)
    with (
        ThreadPoolExecutor(NUM_THREADS) as pool,
        tqdm(total=len(annotations.image_ids), desc=f"Checking {annotations.source}", leave=False) as progress,
    ):
        while batch := list(islice(numbered, BATCH)):
            opened = [(row, encoded) for row, encoded in batch if _is_to_open(annotations, row, check_files)]
            sizes = pool.map(_read_sizes, [encoded for _, encoded in opened])
            for (row, encoded), found in zip(opened, sizes, strict=True):
                num_stored_upright += _compare(annotations, row, encoded, found)
            progress.update(len(batch))
    if num_stored_upright:
        logger.warning(
            "%s: %d images are annotated as they are stored, without their EXIF orientation. "
            "DetectionDataset takes that into account; plain decoding by datasets does not.",
            annotations.source,
            num_stored_upright,
        )


def check_image(annotations: Annotations, row: int, encoded: dict[str, Any] | None) -> None:
    """What `check_images` does, for one image."""
    _compare(annotations, row, encoded, _read_sizes(encoded))


def _is_to_open(annotations: Annotations, row: int, check_files: bool) -> bool:
    has_size = annotations.widths[row] and annotations.heights[row]
    return annotations.keep_image[row] and (check_files or not has_size)


def _read_sizes(encoded: dict[str, Any] | None) -> tuple[Size, Size] | Exception | None:
    """Sizes as stored and upright, or why there are none; `None` without an image."""
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        return None
    try:
        with open_encoded(encoded) as image:
            return image.size, upright_size(image)
    except DECODING_ERRORS as error:
        return error


def _compare(
    annotations: Annotations, row: int, encoded: dict[str, Any] | None, found: tuple[Size, Size] | Exception | None
) -> bool:
    """Whether the image is annotated as it is stored, against its EXIF orientation."""
    if encoded is None or found is None:
        annotations.drop_image(row, "missing image file", 'field "image" is empty')
    elif isinstance(found, FileNotFoundError | NotADirectoryError):
        annotations.drop_image(row, "missing image file", f"there is no file {encoded['path']}")
    elif isinstance(found, Exception):
        annotations.drop_image(row, "unreadable image", f"{encoded['path'] or 'image'} cannot be opened: {found}")
    else:
        stored, upright = found
        annotated = annotations.widths[row], annotations.heights[row]
        if not all(annotated):
            annotations.widths[row], annotations.heights[row] = upright
        elif annotated not in (stored, upright):
            what = (
                f'fields "width" and "height" are {annotated[0]} x {annotated[1]}, '
                f"the file has {upright[0]} x {upright[1]} pixels"
            )
            annotations.drop_image(row, "image size differs from the annotation", what)
        else:
            return annotated != upright
    return False


def check_objects(annotations: Annotations, quiet: bool = False) -> dict[str, np.ndarray]:
    """
    Report boxes that are not finite, empty or outside their image, and return the objects that stay.

    A box that sticks out by no more than a pixel is cut to the image and counted in the log. With `on_invalid="clip"`
    every box that overlaps its image is.

    Args:
        annotations (`Annotations`): Its images are checked already.
        quiet (`bool`): Log nothing, where there is but a row at a time.

    Returns:
        `dict[str, np.ndarray]`: As of `Annotations.object_columns`; boxes lie inside their images, areas are known.
    """
    objects = annotations.object_columns()
    problems = annotations.problems
    with_image = np.array(annotations.keep_image, dtype=bool)[objects["row"]]
    if not with_image.all():
        if not quiet:
            logger.warning("%s: %d objects belong to invalid images.", annotations.source, (~with_image).sum())
        objects = {field: values[with_image] for field, values in objects.items()}

    boxes = objects["bbox"]
    finite = np.isfinite(boxes).all(axis=1)
    empty = finite & (boxes[:, 2:] < MIN_SIDE).any(axis=1)
    sizes = np.array([annotations.widths, annotations.heights], dtype=np.float64).T[objects["row"]]
    known = np.where(finite[:, None], boxes, 0)
    corners = np.concatenate([known[:, :2], known[:, :2] + known[:, 2:]], axis=1)
    clipped = np.clip(corners, 0, np.tile(sizes, 2))
    overshoot = np.abs(corners - clipped).max(axis=1, initial=0)
    sides = clipped[:, 2:] - clipped[:, :2]
    nothing_left = (sides < MIN_SIDE).any(axis=1)
    outside = finite & ~empty & ((overshoot > MAX_OVERSHOOT) | nothing_left)

    kinds = {"non-finite box": ~finite, "empty box": empty, "box outside the image": outside}
    for kind, found in kinds.items():
        for index in np.flatnonzero(found):
            width, height = sizes[index].astype(int)
            bbox = boxes[index].tolist()
            what = f'field "bbox" is {bbox} in an image of {width} x {height} pixels'
            annotations.report(kind, what, int(objects["row"][index]), int(objects["id"][index]), bbox)

    keep = finite & ~empty & ~(nothing_left if problems.on_invalid == "clip" else outside)
    objects = {field: values[keep] for field, values in objects.items()}
    boxes, sides, overshoot = boxes[keep], sides[keep], overshoot[keep]
    num_slightly = int(((overshoot > 0) & (overshoot <= MAX_OVERSHOOT)).sum())
    if num_slightly and not quiet:
        logger.warning("%s: %d boxes cut to their image by up to 1 pixel.", annotations.source, num_slightly)
    cut = (overshoot > 0)[:, None]
    visible = np.where(cut, sides / boxes[:, 2:], 1).prod(axis=1)
    objects["bbox"] = np.where(cut, np.concatenate([clipped[keep, :2], sides], axis=1), boxes)
    objects["area"] = np.where(
        np.isnan(objects["area"]), objects["bbox"][:, 2:].prod(axis=1), objects["area"] * visible
    )
    return objects


def look_like_fractions(boxes: np.ndarray) -> np.ndarray:
    """`(M,)` bool: which boxes `(M, 4)` lie between 0 and 1, as no box in pixels does that is worth annotating."""
    return np.asarray(((boxes >= -MARGIN) & (boxes <= 1 + MARGIN)).all(axis=1))
