import math
from collections.abc import Callable
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from .mosaic import MID_GREY, copy_paste, mosaic
from .target import DetectionTarget, Sample, crop, move, select


class DetectionAugmentation:
    """
    Random flips, scale jitter and light photometric changes of an image together with its boxes; mosaic and copy-paste
    if wanted.

    Scale jitter takes a factor: above 1 it cuts out a region so much smaller than the image, below 1 it places the
    image on a mid-grey canvas so much larger. The result has any size; the image processor resizes it afterwards.
    Boxes are clipped to the new image. An object stays if enough of its box is visible; a crowd region stays however
    little is.

    All randomness is drawn from the generator that is handed in, so its seed alone decides the result.

    Measured in `model_cards/evidence/README.md`: scale jitter costs where all images have one magnification or are
    seen a few times only, and gains where they are seen often; mosaic and copy-paste cost in short runs.

    Args:
        horizontal_flip (`float`): Probability.
        vertical_flip (`float`): Probability; 0.5 suits images without up and down, as from a microscope or the air.
        scale (`tuple[float, float]`): Smallest and largest factor, drawn evenly on a logarithmic scale.
        scale_probability (`float`): Share of the images whose scale changes; 0 turns it off.
        photometric (`float`): Brightness, contrast and saturation change by up to this share, the hue by up to a tenth
            of it (of the colour circle); 0 turns it off.
        mosaic (`float`): Probability that parts of four images stand for the image.
        copy_paste (`float`): Probability that objects of another image are pasted in, as rectangles.
        min_visible (`float`): Smallest share of its box's area that must remain for an object to stay.
        min_side (`float`): Smallest side that must remain of a box of which something was cut away, pixels.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.0,
        scale: tuple[float, float] = (0.6, 1.8),
        scale_probability: float = 0.8,
        photometric: float = 0.2,
        mosaic: float = 0.0,
        copy_paste: float = 0.0,
        min_visible: float = 0.25,
        min_side: float = 2.0,
    ) -> None:
        for name, value in {
            "horizontal_flip": horizontal_flip,
            "vertical_flip": vertical_flip,
            "scale_probability": scale_probability,
            "photometric": photometric,
            "mosaic": mosaic,
            "copy_paste": copy_paste,
            "min_visible": min_visible,
        }.items():
            # They come from JSON, too.
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} is {value!r}; it must lie between 0 and 1.")
        is_pair = (
            isinstance(scale, list | tuple) and [isinstance(factor, int | float) for factor in scale] == [True] * 2
        )
        if not is_pair or not 0 < scale[0] <= scale[1] < math.inf:
            raise ValueError(f"scale is {scale!r}; it must be (smallest, largest), both above 0.")
        if not isinstance(min_side, int | float) or min_side <= 0:
            raise ValueError(f"min_side is {min_side!r}; it must be above 0 pixels.")
        self.horizontal_flip = horizontal_flip
        self.vertical_flip = vertical_flip
        self.scale = scale
        self.scale_probability = scale_probability
        self.photometric = photometric
        self.mosaic = mosaic
        self.copy_paste = copy_paste
        self.min_visible = min_visible
        self.min_side = min_side

    @property
    def needs_other_images(self) -> bool:
        """Whether `draw_other` has to be given."""
        return self.mosaic > 0 or self.copy_paste > 0

    def __call__(
        self,
        image: tv_tensors.Image,
        target: DetectionTarget,
        generator: torch.Generator,
        draw_other: Callable[[torch.Generator], Sample] | None = None,
    ) -> Sample:
        """
        Change one image and its objects; the arguments stay as they are.

        Args:
            image (`tv_tensors.Image` of shape `(3, H, W)`): uint8.
            target (`DetectionTarget`): Boxes in pixels of `image`.
            generator (`torch.Generator`): On the CPU.
            draw_other (`Callable`, *optional*): Gives another image and its objects, drawn with the generator.

        Returns:
            The new image `(3, H', W')` and the objects that are left, areas in its pixels.

        Raises:
            ValueError: Mosaic or copy-paste is on and there is no `draw_other`.
        """
        if self.needs_other_images:
            if draw_other is None:
                raise ValueError("mosaic and copy_paste need other images: give draw_other, or set both to 0.")
            if _uniform(0, 1, generator) < self.mosaic:
                others = [draw_other(generator) for _ in range(3)]
                image, target = mosaic([(image, target), *others], generator)
            if _uniform(0, 1, generator) < self.copy_paste:
                image, target = copy_paste((image, target), draw_other(generator), generator)
        factor = 1.0
        if _uniform(0, 1, generator) < self.scale_probability:
            factor = math.exp(_uniform(math.log(self.scale[0]), math.log(self.scale[1]), generator))
        if factor > 1:
            image, target = _zoom_in(image, target, factor, generator)
        if self.photometric > 0:
            image = _jitter_colour(image, self.photometric, generator)
        if factor < 1:
            image, target = _zoom_out(image, target, factor, generator)
        for probability, flip in ((self.horizontal_flip, F.horizontal_flip), (self.vertical_flip, F.vertical_flip)):
            if _uniform(0, 1, generator) < probability:
                image, target = flip(image), {**target, "boxes": flip(target["boxes"])}
        return image, self._keep_visible(target)

    def _keep_visible(self, target: DetectionTarget) -> DetectionTarget:
        sides = (target["boxes"][:, 2:] - target["boxes"][:, :2]).as_subclass(torch.Tensor)
        visible_enough = (target["visible"] >= self.min_visible) | (target["iscrowd"] == 1)
        # Pixels of the image, which may be far fewer than the canvas has: an object may be small, but no sliver.
        no_sliver = (sides >= self.min_side).all(dim=1) | (target["visible"] >= 1)
        return select(target, no_sliver & visible_enough & (target["visible"] > 0))


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _zoom_in(image: Any, target: DetectionTarget, factor: float, generator: torch.Generator) -> Sample:
    height, width = image.shape[-2:]
    new_height, new_width = max(1, round(height / factor)), max(1, round(width / factor))
    top = int(torch.randint(height - new_height + 1, (), generator=generator))
    left = int(torch.randint(width - new_width + 1, (), generator=generator))
    return F.crop(image, top, left, new_height, new_width), crop(target, left, top, (new_height, new_width))


def _jitter_colour(image: Any, strength: float, generator: torch.Generator) -> Any:
    """
    Change brightness, contrast, saturation and hue in one matrix product: 15 times faster than v2's `ColorJitter`.

    The hue turns about the grey axis of RGB, which for small angles is what a detour over HSV does.
    """
    brightness, contrast, saturation = (1 + _uniform(-strength, strength, generator) for _ in range(3))
    angle = 2 * math.pi * _uniform(-strength, strength, generator) / 10
    pixels = image.as_subclass(torch.Tensor).flatten(1).float()  # (3, H * W)
    luma = torch.tensor([0.299, 0.587, 0.114])
    turn = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) * (math.sin(angle) / math.sqrt(3))
    turn += torch.eye(3) * math.cos(angle) + (1 - math.cos(angle)) / 3
    matrix = brightness * contrast * (saturation * turn + (1 - saturation) * luma.expand(3, 3))
    # Contrast is the distance from the mean grey. Sums of whole numbers are exact in float32 up to 2^24, so that any
    # number of threads gets the same.
    row_sums = pixels.reshape(image.shape).sum(dim=2)
    mean_grey = luma @ (row_sums.double().sum(dim=1) / pixels.shape[1]).float()
    offset = (brightness * (1 - contrast) * mean_grey).expand(3, 1)
    changed = torch.addmm(offset, matrix, pixels).round_().clamp_(0, 255).to(torch.uint8)
    return tv_tensors.wrap(changed.reshape(image.shape), like=image)


def _zoom_out(image: Any, target: DetectionTarget, factor: float, generator: torch.Generator) -> Sample:
    height, width = image.shape[-2:]
    new_height, new_width = round(height / factor), round(width / factor)
    top = int(torch.randint(new_height - height + 1, (), generator=generator))
    left = int(torch.randint(new_width - width + 1, (), generator=generator))
    padding = [left, top, new_width - width - left, new_height - height - top]
    return F.pad(image, padding, fill=MID_GREY), move(target, left, top, (new_height, new_width))
