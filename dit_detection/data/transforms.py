"""Rows of a data set → what a model is fed: decoded, augmented if wanted, and through the image processor."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils import data
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from .augmentation import DetectionAugmentation
from .image_reading import DECODING_ERRORS, decode_image, to_rgb
from .target import DetectionTarget, Sample

ImageProcessor = Callable[..., Mapping[str, Any]]

COLUMNS = ["image", "image_id", "width", "height", "objects"]


class SharedEpoch:
    """The number of the epoch, in shared memory: workers that outlive an epoch have to hear of the next."""

    def __init__(self) -> None:
        self._number = torch.zeros((), dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._number.share_memory_()  # plain pickling and copying put it into ordinary memory

    def get(self) -> int:
        """The epoch, 0 before the first `set`."""
        return int(self._number)

    def set(self, epoch: int) -> None:
        """Tell this process and its workers."""
        self._number.fill_(epoch)


class DetectionDataset(data.Dataset[dict[str, Any]]):
    """
    What a model is fed: `pixel_values` `(3, H, W)`, `labels` and, if the image processor makes it, `pixel_mask`
    `(H, W)`.

    Invariant: an entry depends on (seed, view, index) and nothing else: not on the global random state, the number of
    workers or processes, the order of access, or what it is batched with. Views are numbered; without an augmentation
    all are equal. Epoch e shows view e, or, with `num_views`, view e modulo that, so that what is computed from the
    few can be kept.

    Args:
        rows (`datasets.Dataset`): In the row format (`row_format.py`). Images are decoded here and not by `datasets`,
            which always applies the EXIF orientation, even where the annotated image ignored it.
        image_processor (`Callable`): A transformers image processor that takes images and COCO annotations, as DETR's.
        augmentation (`DetectionAugmentation`, *optional*): For training; leave it out at evaluation.
        seed (`int`): 0 or more.
        num_views (`int`, *optional*): Views to go round in; by default every epoch has a new one.

    Raises:
        ValueError: An argument is out of its range, or a column is missing.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_processor: ImageProcessor,
        augmentation: DetectionAugmentation | None = None,
        *,
        seed: int = 0,
        num_views: int | None = None,
    ) -> None:
        if num_views is not None and num_views < 1:
            raise ValueError(f"num_views is {num_views}; it must be 1 or more, or None: a new view every epoch.")
        self.rows = rows.with_format(None).select_columns(COLUMNS).cast_column("image", datasets.Image(decode=False))
        self.image_processor = image_processor
        self.augmentation = augmentation
        self.seed = _checked_seed(seed)
        self.num_views = num_views
        self._epoch = SharedEpoch()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.get_view(index, self.view)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """What a `DataLoader` calls for a batch."""
        view = self.view
        return [self.get_view(index, view) for index in indices]

    @property
    def view(self) -> int:
        """The view that this epoch shows."""
        epoch = self._epoch.get()
        return epoch if self.num_views is None else epoch % self.num_views

    def set_epoch(self, epoch: int) -> None:
        """Show the view of this epoch from now on, in running workers too. `DetectionTrainer` calls it."""
        self._epoch.set(epoch)

    def get_view(self, index: int, view: int) -> dict[str, Any]:
        """
        One entry in one view.

        Args:
            index (`int`): Row.
            view (`int`): 0 or more.

        Raises:
            ValueError: The image cannot be read or has not the size that was annotated; the message names it.
        """
        index = range(len(self))[index]
        row = self.rows[index]
        if self.augmentation is None:
            return _encode(self.image_processor, row["image_id"], read_image(row), row["objects"])
        generator = make_generator(self.seed, view, index)
        image, target = self.augmentation(*read_sample(row), generator, self._draw_other)
        return _encode(self.image_processor, row["image_id"], image, _from_target(target))

    def _draw_other(self, generator: torch.Generator) -> Sample:
        return read_sample(self.rows[int(torch.randint(len(self), (), generator=generator))])


class DetectionIterableDataset(data.IterableDataset[dict[str, Any]]):
    """
    [`DetectionDataset`] for rows that are streamed: what is random about a row depends on (seed, epoch, image_id).

    Args:
        rows (`datasets.IterableDataset`): In the row format. Its shards are spread over the `DataLoader`'s workers.
        image_processor (`Callable`): As of [`DetectionDataset`].
        augmentation (`DetectionAugmentation`, *optional*): As of [`DetectionDataset`], without mosaic and copy-paste.
        seed (`int`): 0 or more.

    Raises:
        ValueError: The augmentation needs other images, or an argument is out of its range.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        image_processor: ImageProcessor,
        augmentation: DetectionAugmentation | None = None,
        *,
        seed: int = 0,
    ) -> None:
        if augmentation is not None and augmentation.needs_other_images:
            raise ValueError(
                f"The augmentation has mosaic={augmentation.mosaic} and copy_paste={augmentation.copy_paste}, which "
                "read other images at random; streamed rows cannot be. Set both to 0, or do without streaming."
            )
        self.rows = rows.select_columns(COLUMNS).cast_column("image", datasets.Image(decode=False))
        self.image_processor = image_processor
        self.augmentation = augmentation
        self.seed = _checked_seed(seed)
        self._epoch = SharedEpoch()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = self._epoch.get()
        for row in self.rows:
            if self.augmentation is None:
                yield _encode(self.image_processor, row["image_id"], read_image(row), row["objects"])
            else:
                generator = make_generator(self.seed, epoch, row["image_id"])
                image, target = self.augmentation(*read_sample(row), generator)
                yield _encode(self.image_processor, row["image_id"], image, _from_target(target))

    def set_epoch(self, epoch: int) -> None:
        """Shuffle and augment as in this epoch from now on, in running workers too."""
        self._epoch.set(epoch)
        self.rows.set_epoch(epoch)


def plain_inputs(
    rows: datasets.Dataset | datasets.IterableDataset, image_processor: ImageProcessor
) -> DetectionDataset | DetectionIterableDataset:
    """Rows as a model is fed them when it is evaluated: without augmentation, streamed if they are."""
    kind = DetectionIterableDataset if isinstance(rows, datasets.IterableDataset) else DetectionDataset
    return kind(rows, image_processor)


def make_generator(*numbers: int) -> torch.Generator:
    """A generator whose seed is mixed from integers, so that neighbours have nothing in common."""
    state = np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def read_sample(row: dict[str, Any]) -> Sample:
    """The image `(3, H, W)`, uint8, and the objects of a row, for augmentation."""
    image = tv_tensors.Image(read_image(row))
    objects = row["objects"]
    boxes = torch.tensor(objects["bbox"], dtype=torch.float32).reshape(-1, 4)
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    return image, {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:])),
        "category": torch.tensor(objects["category"], dtype=torch.int64),
        "area": torch.tensor(objects["area"], dtype=torch.float32),
        "iscrowd": torch.tensor(objects["iscrowd"], dtype=torch.int64),
        "visible": torch.ones(len(boxes)),
    }


def read_image(row: dict[str, Any]) -> torch.Tensor:
    """The image of a row whose image column is not decoded, `(3, H, W)`, uint8."""
    try:
        return F.pil_to_tensor(to_rgb(decode_image(row["image"], row["width"], row["height"])))
    except DECODING_ERRORS as error:
        name = row["image"]["path"] or "(no file name)"
        raise ValueError(
            f"Image {name!r} (image_id {row['image_id']}) cannot be used: {error}. Repair or remove it."
        ) from error


def _checked_seed(seed: int) -> int:
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more.")
    return seed


def _from_target(target: DetectionTarget) -> dict[str, list[Any]]:
    boxes = target["boxes"].as_subclass(torch.Tensor)
    return {
        "bbox": torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist(),
        "category": target["category"].tolist(),
        "area": target["area"].tolist(),
        "iscrowd": target["iscrowd"].tolist(),
    }


def _encode(
    image_processor: ImageProcessor, image_id: int, image: torch.Tensor, objects: dict[str, list[Any]]
) -> dict[str, Any]:
    columns = zip(objects["bbox"], objects["category"], objects["area"], objects["iscrowd"], strict=True)
    annotations = [
        {"image_id": image_id, "category_id": category, "iscrowd": iscrowd, "area": area, "bbox": bbox}
        for bbox, category, area, iscrowd in columns
    ]
    encoded = image_processor(
        images=[image.as_subclass(torch.Tensor)],
        annotations=[{"image_id": image_id, "annotations": annotations}],
        input_data_format="channels_first",
        return_tensors="pt",
    )
    return {name: encoded[name][0] for name in ("pixel_values", "pixel_mask", "labels") if name in encoded}
