"""Images without annotations as the model is fed them: decoded once, cropped anew in every epoch."""

import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.utils import data
from tqdm import tqdm

from ..data import InvalidDatasetError
from ..data.image_reading import UnreadableImageError, read_image
from ..data.transforms import SharedEpoch

logger = logging.getLogger(__name__)

# Width by height of a crop, as in torchvision's RandomResizedCrop.
ASPECT_RATIOS = (3 / 4, 4 / 3)
# Successive multiples of it, modulo 1, fill [0, 1) more evenly than random numbers.
GOLDEN_RATIO = (5**0.5 - 1) / 2

Array = np.ndarray


class DecodedImages:
    """
    8-bit RGB pixels of images, decoded once and kept in memory as far as they fit.

    They are kept no larger than crops need: the shorter side of larger ones becomes `side`. Of files with the same
    content the first is taken, for of two one might be held out and the other trained on.

    Args:
        rows (`datasets.Dataset`): With an encoded column `image`.
        side (`int`): In pixels.
        max_bytes (`int`): Of memory. Images beyond it are decoded every time.
        show_progress (`bool`): Show a bar.

    Attributes:
        fingerprint (`str`): 16 hexadecimal digits of the contents of all files, in their order.
        num_small (`int`): Images that are smaller than `side`, and may have to be enlarged.

    Raises:
        InvalidDatasetError: Images cannot be read; the message names them.
    """

    def __init__(self, rows: Dataset, side: int, max_bytes: int, show_progress: bool = False) -> None:
        self.rows = rows
        self.side = side
        self.num_small = 0
        self._taken: list[int] = []  # rows
        self._kept: list[Array | None] = []
        faults: list[str] = []
        seen: set[bytes] = set()
        num_bytes, digest = 0, hashlib.blake2b(digest_size=8)
        for row, result in enumerate(tqdm(self._read_all(), "Reading images", len(rows), disable=not show_progress)):
            if isinstance(result, str):
                faults.append(result)
                continue
            pixels, content = result
            if content in seen:
                continue
            seen.add(content)
            digest.update(content)
            self._taken.append(row)
            self.num_small += min(pixels.shape[:2]) < side
            fits = num_bytes + pixels.nbytes <= max_bytes
            num_bytes += pixels.nbytes * fits
            self._kept.append(pixels if fits else None)
        self.fingerprint = digest.hexdigest()
        if faults:
            shown = "".join(f"\n  {fault}" for fault in faults[:10])
            rest = f"\n  … and {len(faults) - 10} more" if len(faults) > 10 else ""
            raise InvalidDatasetError(
                f"{len(faults)} of {len(rows)} images cannot be read. Repair or remove them:{shown}{rest}"
            )
        if num_repeated := len(rows) - len(self):
            logger.info("%d of %d images are left out: each is there already.", num_repeated, len(rows))

    @property
    def num_kept(self) -> int:
        """How many images are in memory."""
        return sum(pixels is not None for pixels in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Array:
        """
        An image `(H, W, 3)`.

        Raises:
            UnreadableImageError: It can no longer be read; the message begins with its name.
        """
        kept = self._kept[index]
        return self._read(self._taken[index])[0] if kept is None else kept

    def _read(self, row: int) -> tuple[Array, bytes]:
        """An image, and a hash of its file."""
        encoded = self.rows[row]["image"] or {"bytes": None, "path": None}
        name = encoded["path"] or f"image {row}"
        if encoded["bytes"] is None and not encoded["path"]:
            raise UnreadableImageError(f"{name}: has no image. Remove the row.")
        try:
            content = Path(encoded["path"]).read_bytes() if encoded["bytes"] is None else encoded["bytes"]
            image = read_image(content, max_pixels=None)
        except (UnreadableImageError, OSError) as error:
            raise UnreadableImageError(f"{name}: {error}") from error
        factor = self.side / min(image.size)
        if factor < 1:
            # JPEG's own reduction is not used: images must not depend on the format that they are stored in.
            size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
            image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
        return np.asarray(image), hashlib.blake2b(content, digest_size=8).digest()

    def _read_all(self) -> Iterator[tuple[Array, bytes] | str]:
        """Every image in turn, or what is wrong with it."""

        def read(row: int) -> tuple[Array, bytes] | str:
            try:
                return self._read(row)
            except UnreadableImageError as error:
                return str(error)

        # Pillow releases the interpreter while it decodes. In pieces, so that no more than one is in memory twice.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(self.rows), 256):
                yield from pool.map(read, range(start, min(start + 256, len(self.rows))))


class Views(Protocol):
    """Images or latents of one size, another of each image in every epoch."""

    def __len__(self) -> int:
        """How many images there are."""
        ...

    def get(self, index: int, epoch: int) -> Tensor:
        """Image `index` in an epoch: 8-bit pixels or latents, `(C, H, W)`."""
        ...


class RandomCrops:
    """
    Crops of random size, aspect ratio and place, half of them flipped, scaled to a square.

    Args:
        images (`DecodedImages`): Or part of them, as in `indices`.
        indices (`Sequence[int]`): Which ones.
        image_size (`int`): Side of the square, in pixels.
        crop_area (`float`): Smallest share of an image's area; the largest is 1.
        seed (`int`): A crop depends on it, the epoch and the index alone.
    """

    def __init__(self, images: DecodedImages, indices: Any, image_size: int, crop_area: float, seed: int) -> None:
        self.images, self.indices, self.image_size = images, indices, image_size
        self.crop_area, self.seed = crop_area, seed

    def __len__(self) -> int:
        return len(self.indices)

    def get(self, index: int, epoch: int) -> Tensor:
        """A crop `(3, image_size, image_size)`, 8-bit."""
        rng = np.random.default_rng((self.seed, 0, epoch, index))
        pixels = self.images[int(self.indices[index])]
        height, width = pixels.shape[:2]
        area = height * width * rng.uniform(self.crop_area, 1)
        ratio = np.exp(rng.uniform(*np.log(ASPECT_RATIOS)))
        # What does not fit is cut, and never moved to the centre: wide images would then show nothing else.
        crop_width, crop_height = min(width, np.sqrt(area * ratio)), min(height, np.sqrt(area / ratio))
        left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
        crop = _resized(pixels, (left, top, left + crop_width, top + crop_height), self.image_size)
        return crop.flip(2) if rng.random() < 0.5 else crop


class CentreCrops:
    """The largest square in the middle of each image, scaled; the arguments as of [`RandomCrops`]."""

    def __init__(self, images: DecodedImages, indices: Any, image_size: int) -> None:
        self.images, self.indices, self.image_size = images, indices, image_size

    def __len__(self) -> int:
        return len(self.indices)

    def get(self, index: int, epoch: int) -> Tensor:
        """A crop `(3, image_size, image_size)`, 8-bit; the same in every epoch."""
        pixels = self.images[int(self.indices[index])]
        height, width = pixels.shape[:2]
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        return _resized(pixels, (left, top, left + side, top + side), self.image_size)


class NoisedViews(data.Dataset[dict[str, Tensor]]):
    """
    Views with the noise that each is to get, as [`DiffusionModel`] takes them.

    Invariant: an entry depends on the seed, the epoch and the index alone.

    Args:
        views (`Views`): To train on.
        seed (`int`): Of times and noise.
    """

    def __init__(self, views: Views, seed: int) -> None:
        self.views, self.seed = views, seed
        self._epoch = SharedEpoch()

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch = self._epoch.get()
        rng = np.random.default_rng((self.seed, 1, epoch, index))
        return {"images": self.views.get(index, epoch), "time": torch.tensor(rng.random()), "seed": _noise_seed(rng)}

    def set_epoch(self, epoch: int) -> None:
        """Show the views of this epoch from now on, in running workers too."""
        self._epoch.set(epoch)


class FixedNoise(data.Dataset[dict[str, Tensor]]):
    """
    Held-out views at fixed times with fixed noise, so that losses at different steps can be compared.

    Args:
        views (`Views`): Each is shown several times if they are few.
        seed (`int`): Of the noise. Times are spread evenly.
        num_entries (`int`): At least.
    """

    def __init__(self, views: Views, seed: int, num_entries: int = 128) -> None:
        self.views, self.seed = views, seed
        self.num_entries = max(num_entries, len(views))

    def __len__(self) -> int:
        return self.num_entries

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, 2, position))
        time = (position + 0.5) * GOLDEN_RATIO % 1
        images = self.views.get(position % len(self.views), 0)
        return {"images": images, "time": torch.tensor(time), "seed": _noise_seed(rng)}


def _noise_seed(rng: np.random.Generator) -> Tensor:
    return torch.tensor(int(rng.integers(2**62)))


def _resized(pixels: Array, box: tuple[float, float, float, float], side: int) -> Tensor:
    """A box of an image `(H, W, 3)`, xyxy in its pixels, scaled to `(3, side, side)`."""
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
