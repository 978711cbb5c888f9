"""Which images of a data set are the same, byte for byte."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.compute as pc
from datasets import Dataset
from datasets import Image as ImageFeature

PIECE = 4096  # bytes from the middle: enough to tell apart most files of the same size

Place = tuple[str, int]  # split and row
T = TypeVar("T")


def find_duplicate_images(splits: Mapping[str, Dataset]) -> list[list[Place]]:
    """
    Find images with the same content, in one split or in several.

    Files are compared by path, then by size; only where these are equal is anything read, first a piece, then all.

    Args:
        splits (`Mapping[str, Dataset]`): With a column "image", files or encoded bytes.

    Returns:
        `list[list[tuple[str, int]]]`: Groups of two or more places (split, row), each in the order of the splits.
        Images that are missing are in none.
    """
    images = {
        split: dataset.select_columns("image").cast_column("image", ImageFeature(decode=False))
        for split, dataset in splits.items()
    }
    sources: dict[str | Place, list[Place]] = {}  # one for each file, and for each image that is embedded
    sizes: dict[str | Place, int] = {}
    for split, column in images.items():
        for row, (path, size) in enumerate(_paths_and_sizes(column)):
            source = path if size is None and path is not None else (split, row)
            sources.setdefault(source, []).append((split, row))
            if size is not None:
                sizes[source] = size

    def size_of(source: str | Place) -> int | None:
        try:
            return Path(source).stat().st_size if isinstance(source, str) else sizes.get(source)
        except (OSError, ValueError):
            return None

    def read(source: str | Place, start: int = 0, length: int = -1) -> bytes:
        if isinstance(source, str):
            with Path(source).open("rb") as file:
                file.seek(start)
                return file.read(length)
        data: bytes = images[source[0]][source[1]]["image"]["bytes"]
        return data[start:] if length < 0 else data[start : start + length]

    groups = _refine([list(sources)], size_of)
    groups = _refine(groups, lambda source: read(source, (size_of(source) or 0) // 2, PIECE))
    groups = _refine(groups, lambda source: hashlib.blake2b(read(source)).digest())
    found = [[place for source in group for place in sources[source]] for group in groups]
    together = {source for group in groups for source in group}
    found += [places for source, places in sources.items() if len(places) > 1 and source not in together]
    return sorted(found)


def _refine(groups: list[list[T]], key: Callable[[T], Any]) -> list[list[T]]:
    """Split groups by a key, and keep those of two or more; what has no key, or cannot be read, is in none."""
    refined: list[list[T]] = []
    for group in groups:
        by_key: dict[Any, list[T]] = {}
        for member in group:
            try:
                value = key(member)
            except OSError:
                continue
            if value is not None:
                by_key.setdefault(value, []).append(member)
        refined += [members for members in by_key.values() if len(members) > 1]
    return refined


def _paths_and_sizes(images: Dataset) -> list[tuple[str | None, int | None]]:
    """Path and number of embedded bytes of each image, without loading the bytes."""
    found: list[tuple[str | None, int | None]] = []
    for table in images.with_format("arrow").iter(batch_size=1000):
        paths, data = (pc.struct_field(table["image"], name) for name in ("path", "bytes"))
        found += zip(paths.to_pylist(), pc.binary_length(data).to_pylist(), strict=True)
    return found
