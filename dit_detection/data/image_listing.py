"""Images without annotations: files, folders of them and data sets of `datasets`, as numbered rows."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from datasets.arrow_writer import ArrowWriter
from PIL import Image

from .dataset_files import is_image, is_name
from .hub import find_saved_dataset, is_saved_to_disk, load_hub_dataset
from .image_reading import read_image
from .problems import InvalidDatasetError

FILE_FEATURES = Features({"image": {"bytes": Value("binary"), "path": Value("string")}})


def is_dataset(source: str) -> bool:
    """Whether a source is read by `datasets`: a folder that it saved, parquet files, or the name of one on the Hub."""
    path = Path(source)
    if path.is_dir():
        return is_saved_to_disk(path) or (next(find_images(path), None) is None and bool(find_saved_dataset(path)))
    if path.exists():
        return False
    return not (path.is_absolute() or source.startswith(".") or source.count("/") > 1 or is_image(path))


def find_images(folder: str | Path, leave_out: Path | None = None) -> Iterator[str]:
    """
    Paths of the images in and below a folder, in the order of their names. Left out are the folder `leave_out`, the
    pictures that `dit-detect predict` drew, links to folders, and names that begin with a dot, as `list_files` does.
    """
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            is_left_out = leave_out is not None and leave_out.is_dir() and os.path.samefile(entry.path, leave_out)
            if not is_left_out and not _is_drawn(Path(entry.path)):
                yield from find_images(entry.path, leave_out)
        elif is_image(Path(entry.name)):
            yield entry.path


def _is_drawn(folder: Path) -> bool:
    """Whether a folder holds the pictures of a run of `dit-detect predict`."""
    run = folder.parent
    return folder.name == "pictures" and (run / "manifest.json").is_file() and (run / "shards").is_dir()


def list_images(sources: Sequence[str], target: Path) -> None:
    """
    Write the names of image files, and of all in and below folders, to an Arrow file; no image is opened.

    Args:
        sources (`Sequence[str]`): Files and folders.
        target (`Path`): The Arrow file.

    Raises:
        InvalidDatasetError: A source does not exist, a folder holds no image, or a name is no text.
    """
    unfinished = target.with_suffix(".unfinished")
    try:
        _write_list(sources, unfinished)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_list(sources: Sequence[str], target: Path) -> None:
    seen: set[str] = set()  # folders and files that are named may lie in one another
    with ArrowWriter(features=FILE_FEATURES, path=str(target), writer_batch_size=10_000) as writer:
        for source in sources:
            found = False
            paths = find_images(source) if os.path.isdir(source) else [source][: os.path.isfile(source)]
            for path in paths:
                if not is_name(path):
                    raise InvalidDatasetError(f"{os.fsencode(path)!r}: the file name is not UTF-8. Rename it.")
                found = True
                if len(sources) > 1:
                    place = os.path.abspath(path)
                    if place in seen:
                        continue
                    seen.add(place)
                writer.write({"image": {"bytes": None, "path": path}})
            if not found:
                what = "The folder {} holds no images." if os.path.isdir(source) else "There is no file or folder {}."
                raise InvalidDatasetError(f"{what.format(source)} Check the path.")
        writer.finalize()


def open_list(listed: Path) -> Dataset:
    """The images that `list_images` wrote down, memory-mapped."""
    return Dataset.from_file(str(listed))


def open_dataset(
    source: str, name: str | None, split: str | None, revision: str | None, streaming: bool
) -> Dataset | IterableDataset:
    """
    The images of a data set of `datasets`, encoded, with `image_id` where it has one.

    Raises:
        InvalidDatasetError: It cannot be loaded, has no such configuration or split, or no column "image".
    """
    loaded: Any = load_hub_dataset(source, name, revision, streaming)
    if isinstance(loaded, dict):
        if split is None and len(loaded) > 1:
            raise InvalidDatasetError(f"{source} has the splits {', '.join(loaded)}. Name one with --split.")
        if split is not None and split not in loaded:
            raise InvalidDatasetError(f"{source} has no split {split!r}, but {', '.join(loaded)}.")
        loaded = loaded[split or next(iter(loaded))]
    if streaming and isinstance(loaded, Dataset):
        loaded = loaded.to_iterable_dataset()
    if "image" not in (loaded.features or {}):
        columns = ", ".join(loaded.features or {})
        raise InvalidDatasetError(
            f'{source} needs a column "image", but has {columns}. Rename the one with the images.'
        )
    kept = ["image"]
    if pa.types.is_integer(getattr(loaded.features.get("image_id"), "pa_type", pa.null())):
        kept.append("image_id")  # other ids are in the way of COCO's, which are numbers
    return loaded.with_format(None).select_columns(kept).cast_column("image", ImageFeature(decode=False))


def read_encoded(encoded: dict[str, Any]) -> Image.Image:
    """
    An image of an encoded column ("bytes" or, where that is `None`, "path"), 8-bit RGB and upright.

    Raises:
        UnreadableImageError: It cannot be read.
    """
    source = encoded["path"] if encoded["bytes"] is None else encoded["bytes"]
    if isinstance(source, str) and "://" in source:  # of a stream
        with fsspec.open(source, "rb") as stream:
            source = stream.read()
    return read_image(source, max_pixels=None)
