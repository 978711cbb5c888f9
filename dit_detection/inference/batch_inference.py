"""A detector on many images: read ahead in workers, shared out over processes, kept in shards that survive a kill."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import groupby, islice
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from PIL import Image
from torch.utils import data
from tqdm import tqdm

from ..data.image_listing import read_encoded
from ..data.image_reading import UnreadableImageError
from ..visualize import draw_detections
from ..weight_digest import digest_weights
from .batch_predictor import detect_processed, model_class_names
from .prediction_formats import Prediction, detections_of, prediction_of, unreadable
from .prediction_shards import PredictionShards

# Of a configuration, what says nothing of what is found.
PLACE_AND_VERSION = ("_name_or_path", "transformers_version")
JPEG_SIDE = 65_500  # pixels that libjpeg writes at most


class _Item(NamedTuple):
    """An image to be read."""

    shard: str
    number: int  # its place in the list of images
    row: dict[str, Any] | None  # of a stream; otherwise it is fetched from that place


class _Batch(NamedTuple):
    """Images that were read, of one shard."""

    shard: str
    numbers: list[int]
    predictions: list[Prediction]  # without detections yet
    images: list[Image.Image]  # the readable ones, if they are to be drawn
    inputs: Any  # what the image processor made of the readable ones


def predict_images(
    model: Any,
    image_processor: Any,
    images: Dataset | IterableDataset,
    shards: PredictionShards,
    *,
    threshold: float,
    nms_threshold: float | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    shard_size: int = 256,
    pictures: Path | None = None,
) -> None:
    """
    Detect objects in all images whose shard is not on disk yet. Each process takes its share of the shards.

    What is found in an image depends neither on the number of processes nor on what an earlier run did: the shards
    are the same ones, and so are the batches in them.

    Args:
        model, image_processor: Of a detector, on the device that computes.
        images (`Dataset` or `IterableDataset`): With the column "image", encoded, and optionally "image_id". Of a
            stream, each process reads its share of the parts (`num_shards`).
        shards ([`PredictionShards`]): Started.
        threshold (`float`): Scores must be above it.
        nms_threshold (`float`, *optional*): By default the image processor's own.
        batch_size (`int`), num_workers (`int`): Images at a time, and workers that read them, of each process.
        shard_size (`int`): Images per shard: what a kill loses at most, of each process.
        pictures (`Path`, *optional*): Folder for a picture of each image with its detections.
    """
    state = PartialState()
    done = set(shards.names())
    # All must have looked before one writes: from different lists they would share the work out differently.
    state.wait_for_everyone()
    work = _unfinished(images, done, shard_size, state.process_index, state.num_processes)
    loader = data.DataLoader(
        _Images(images),
        batch_sampler=_batches(work, batch_size),
        num_workers=num_workers,
        collate_fn=_Preprocess(image_processor, keep_images=pictures is not None),
    )
    class_names = model_class_names(model)
    with tqdm(unit=" images", disable=not state.is_local_main_process) as progress:
        for shard, batches in groupby(loader, key=lambda batch: batch.shard):
            predictions: list[Prediction] = []
            for batch in batches:
                readable = [entry for entry in batch.predictions if entry["error"] is None]
                if readable:
                    sizes = [(entry["height"], entry["width"]) for entry in readable]
                    results = detect_processed(model, image_processor, batch.inputs, sizes, threshold, nms_threshold)
                    for entry, result in zip(readable, results, strict=True):
                        entry["detections"] = detections_of(**result, class_names=class_names)
                if pictures is not None:
                    _draw(pictures, batch, class_names)
                predictions += batch.predictions
                progress.update(len(batch.predictions))
            shards.write(shard, predictions)


def settings_of(model: Any, image_processor: Any, images: Dataset | IterableDataset, **more: Any) -> dict[str, Any]:
    """
    Everything that predictions depend on, for `PredictionShards.start`.

    Images count by their names, their `image_id` and, where a data set holds them, the length of their bytes. Of a
    stream, only the number of its parts is known.
    """
    fields = {key: value for key, value in model.config.to_dict().items() if key not in PLACE_AND_VERSION}
    digest = hashlib.blake2b(json.dumps(fields, sort_keys=True, default=str).encode(), digest_size=16)
    digest_weights(digest, model.state_dict().items())
    settings = {"checkpoint": digest.hexdigest(), **more, "image_processor": image_processor.to_dict()}
    if isinstance(images, IterableDataset):
        settings["parts of the stream"] = images.num_shards
    else:
        settings |= {"number of images": len(images), "list of images": _digest_of(images)}
    return settings | {"version of dit_detection": version("dit_detection")}


def _digest_of(images: Dataset) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for table in images.with_format("arrow").iter(batch_size=10_000):
        image = table["image"].combine_chunks()
        columns = [pc.struct_field(image, "path"), pc.binary_length(pc.struct_field(image, "bytes"))]
        columns += [table[name] for name in table.column_names if name == "image_id"]
        digest.update(json.dumps([column.to_pylist() for column in columns]).encode())
    return digest.hexdigest()


def _unfinished(
    images: Dataset | IterableDataset, done: set[str], shard_size: int, process: int, num_processes: int
) -> Iterator[Iterable[_Item]]:
    """The share of this process of the shards that are not done, each as the images in it."""
    if isinstance(images, Dataset):
        starts = range(0, len(images), shard_size)
        missing = [(f"{start:012d}", start) for start in starts if f"{start:012d}" not in done]
        for name, start in missing[process::num_processes]:
            yield [_Item(name, number, None) for number in range(start, min(start + shard_size, len(images)))]
        return
    for part in range(process, images.num_shards, num_processes):
        first = next(index for index in range(len(done) + 1) if _part_name(part, index) not in done)
        rows = images.shard(images.num_shards, part).skip(first * shard_size)
        numbered = enumerate(rows, start=first * shard_size)
        for index, members in groupby(numbered, key=lambda member: member[0] // shard_size):
            name = _part_name(part, index)
            # Numbers of all parts interleave, so that they differ and do not depend on how long the parts are.
            yield (_Item(name, position * images.num_shards + part, row) for position, row in members)


def _part_name(part: int, index: int) -> str:
    return f"{part:06d}-{index:06d}"


def _batches(work: Iterable[Iterable[_Item]], batch_size: int) -> Iterator[list[_Item]]:
    for items in map(iter, work):
        while batch := list(islice(items, batch_size)):
            yield batch


class _Images(data.Dataset[tuple[_Item, Prediction, Image.Image | None]]):
    """Reads images; what is streamed comes with its row."""

    def __init__(self, images: Dataset | IterableDataset) -> None:
        self.images = images if isinstance(images, Dataset) else None

    def __getitem__(self, item: _Item) -> tuple[_Item, Prediction, Image.Image | None]:
        row = item.row if self.images is None else self.images[item.number]
        image_id = (row or {}).get("image_id", item.number)
        encoded = (row or {}).get("image") or {"bytes": b"", "path": None}
        file = encoded["path"] or f"image {image_id}"
        try:
            image = read_encoded(encoded)
        except UnreadableImageError as error:
            return item, unreadable(file, image_id, str(error)), None
        return item, prediction_of(file, image_id, *image.size, [], [], [], []), image


class _Preprocess:
    """Runs the image processor on the images that could be read, in the worker that read them."""

    def __init__(self, image_processor: Any, keep_images: bool) -> None:
        self.image_processor = image_processor
        self.keep_images = keep_images

    def __call__(self, batch: Sequence[tuple[_Item, Prediction, Image.Image | None]]) -> _Batch:
        images = [image for _, _, image in batch if image is not None]
        return _Batch(
            shard=batch[0][0].shard,
            numbers=[item.number for item, _, _ in batch],
            predictions=[prediction for _, prediction, _ in batch],
            images=images if self.keep_images else [],
            inputs=self.image_processor(images, return_tensors="pt") if images else None,
        )


def _draw(folder: Path, batch: _Batch, class_names: Sequence[str]) -> None:
    folder.mkdir(exist_ok=True)
    images = iter(batch.images)
    for number, entry in zip(batch.numbers, batch.predictions, strict=True):
        if entry["error"] is None:
            found = entry["detections"]
            picture = draw_detections(
                next(images),
                [item["box_xyxy"] for item in found],
                [item["label"] for item in found],
                [item["score"] for item in found],
                class_names=class_names,
            )
            # The number keeps equal names of different folders apart; a stem leads to no other folder.
            picture.thumbnail((JPEG_SIDE, JPEG_SIDE))
            picture.save(folder / f"{number:05d}_{PurePath(entry['file']).stem[:60]}.jpg", quality=90)
