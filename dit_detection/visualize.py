"""Pictures of detections, of annotations and of a training run."""

import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from .data.image_reading import to_rgb

# Neighbours differ in hue and lightness, so that the first few stay apart for colour-blind readers too.
PALETTE = (
    *("#0b6cf0", "#f5a300", "#00a878", "#e5352b", "#8e44d6", "#00b8d9", "#d6197c", "#7a9e00", "#ff7043", "#3f4fb5"),
    *("#a0643c", "#00796b", "#ffd21f", "#b23ac2", "#5b6b7b", "#4caf50", "#c2185b", "#4f9cf9", "#9c7b00", "#7e57c2"),
)
INK, PAPER, GREY = "#1f2328", "#ffffff", "#57606a"

_Rectangle = tuple[int, int, int, int]  # the first and last column and row it covers, as left, top, right, bottom


def draw_detections(
    image: Image.Image,
    boxes: Any,
    labels: Sequence[str],
    scores: Any = None,
    *,
    class_names: Sequence[str] | None = None,
    ground_truth: bool = False,
) -> Image.Image:
    """
    Draw labelled boxes on a copy of an image; lines and letters grow with it.

    Detections have solid outlines and filled tags. Ground truth has dashed outlines and white tags, so the two can be
    drawn over each other: draw the ground truth first. The best-scored boxes end on top; in a crowd, tags that would
    hide better-scored ones are left out. Images of less than about 200 pixels are better enlarged first.

    Args:
        image (`PIL.Image.Image`): In any mode; a copy in RGB is drawn on.
        boxes (`torch.Tensor`, `np.ndarray` or `list` of shape `(K, 4)`): xyxy, pixels of `image`. What lies outside
            the image is cut off.
        labels (`Sequence[str]`): The K class names.
        scores (`torch.Tensor`, `np.ndarray` or `list` of shape `(K,)`, *optional*): From 0 to 1, written on the tags.
        class_names (`Sequence[str]`, *optional*): All classes in the order of their ids, to give each a colour of its
            own. Without it the colour follows from the name alone: the same in every picture, but two classes may
            share one.
        ground_truth (`bool`): Whether these are annotations rather than detections.

    Returns:
        `PIL.Image.Image`: In RGB, as large as `image`.

    Raises:
        ValueError: If the lengths of `boxes`, `labels` and `scores` differ, a box is not xyxy, or a label is none of
            `class_names`.
    """
    corners = _floats(boxes).reshape(-1, 4)
    values = None if scores is None else _floats(scores)
    if len(corners) != len(labels) or (values is not None and len(values) != len(labels)):
        raise ValueError(
            f"boxes, labels and scores must be of the same objects, got {len(corners)}, {len(labels)} and "
            f"{'none' if values is None else len(values)}."
        )
    inverted = (corners[:, 2:] < corners[:, :2]).any(axis=1)
    if inverted.any():
        raise ValueError(f"boxes must be xyxy in pixels, got {corners[inverted][0].tolist()}. Is it xywh?")
    if class_names is not None and (others := sorted(set(labels) - set(class_names))):
        raise ValueError(f"labels must be of class_names, {', '.join(class_names)}, got {', '.join(others)}.")
    image = to_rgb(image).copy()
    draw = ImageDraw.Draw(image)
    # At 640 by 480 pixels: lines of 2, letters of 13.
    scale = (image.width * image.height) ** 0.5 / 555
    line_width, font = max(1, round(2.4 * scale)), _font(max(9, round(13 * scale)))

    order = range(len(labels)) if values is None else np.argsort(values, kind="stable").tolist()
    visible = {i: rectangle for i in order if (rectangle := _visible(corners[i], image.size)) is not None}
    colors = {i: _color(labels[i], class_names) for i in visible}
    for i, rectangle in visible.items():
        _outline(draw, rectangle, colors[i], line_width, dashed=ground_truth)
    # Tags come after all outlines, and the best-scored one chooses its place first.
    taken: list[_Rectangle] = []
    margin = round(0.3 * font.size)
    for i in reversed(visible):
        name = " ".join(labels[i].split())  # a line break would run out of the tag
        text = name if values is None else f"{name} {values[i]:.2f}"
        text = _shortened(text, font, image.width - 2 * margin)
        tag_size = (round(font.getlength(text)) + 2 * margin, round(1.25 * font.size))
        place = _place(tag_size, visible[i], image.size, line_width, taken)
        if text and place is not None:
            _tag(draw, place, text, font, colors[i], hollow=ground_truth)
            taken.append(place)
    return image


def draw_grid(
    images: Sequence[Image.Image],
    *,
    columns: int = 3,
    captions: Sequence[str] | None = None,
    cell_size: int = 480,
) -> Image.Image:
    """
    Lay images out in rows on white, each scaled to fit its cell, with a caption below it.

    Args:
        images (`Sequence[PIL.Image.Image]`): At least one, of any sizes.
        columns (`int`): Images per row; fewer images than that make a narrower picture.
        captions (`Sequence[str]`, *optional*): One per image; what is wider than the cell ends in an ellipsis.
        cell_size (`int`): Longer side of each image in the grid, in pixels.

    Returns:
        `PIL.Image.Image`: In RGB.

    Raises:
        ValueError: Without images, if `captions` are not as many, or if `columns` or `cell_size` is below 1.
    """
    if not images or columns < 1 or cell_size < 1:
        raise ValueError(
            f"draw_grid needs an image, a column and a pixel, got {len(images)} images, columns={columns} and "
            f"cell_size={cell_size}."
        )
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"captions must be one per image, got {len(captions)} for {len(images)} images.")
    cells = [_fitted(image, cell_size) for image in images]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    gap = max(4, cell_size // 40)
    font = _font(max(9, cell_size // 30))
    caption_height = 0 if captions is None else round(1.8 * font.size)
    width = max(cell.width for cell in cells)
    heights = [max(cell.height for cell in row) + caption_height for row in rows]
    grid = Image.new("RGB", (len(rows[0]) * (width + gap) + gap, sum(heights) + gap * (len(rows) + 1)), PAPER)
    draw = ImageDraw.Draw(grid)
    top = gap
    for row_number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        for column, cell in enumerate(row):
            left = gap + column * (width + gap)
            grid.paste(cell, (left + (width - cell.width) // 2, top + (height - caption_height - cell.height) // 2))
            if captions is not None:
                text = _shortened(captions[row_number * columns + column], font, width)
                middle = (left + width / 2, top + height - caption_height / 2)
                draw.text(middle, text, fill=INK, font=font, anchor="mm")
        top += height + gap
    return grid


def plot_history(log_history: Sequence[Mapping[str, Any]]) -> Image.Image:
    """
    Plot a training run from the Trainer's log: losses on the left, mAP on the right, over epochs.

    Args:
        log_history (`Sequence[Mapping]`): `trainer.state.log_history`. Of each entry `epoch` and, where present,
            `loss`, `eval_loss`, `eval_map` and `eval_map_50` are read.

    Returns:
        `PIL.Image.Image`: In RGB; a panel that would be empty is left out.

    Raises:
        ValueError: If there is nothing to plot.
    """
    # Here, because matplotlib is slow to import and the other functions do without it.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = {
        "Loss": {"loss": "training", "eval_loss": "evaluation"},
        "Mean average precision": {"eval_map": "IoU 0.50 to 0.95", "eval_map_50": "IoU 0.50"},
    }
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for title, names in panels.items():
        for key, name in names.items():
            # Undefined metrics are -1, as COCO has it.
            points = [(e["epoch"], e[key]) for e in log_history if "epoch" in e and e.get(key, -1) >= 0]
            if points:
                curves.setdefault(title, {})[name] = points
    if not curves:
        raise ValueError("log_history has neither losses nor eval_map with their epochs: nothing to plot.")

    # Without pyplot, which would pick a backend for the whole process and keep the figure alive.
    figure = Figure(figsize=(4.8 * len(curves), 3.2), dpi=150, layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for color, (name, points) in zip(PALETTE, lines.items(), strict=False):
            # A short run has points rather than a curve.
            marker = "o" if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), color=color, label=name, marker=marker, markersize=3)
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("epoch", fontsize=9, color=GREY)
        axes.tick_params(labelsize=8, colors=GREY)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0, top=1 if title != "Loss" else None)
        axes.grid(color="#d8dee4", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return render(figure)


def render(figure: Any) -> Image.Image:
    """A matplotlib figure as an image in RGB: its pixels alone, nothing that tells versions or dates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # Letters that its font has not, in names of classes, become boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _floats(values: Any) -> Any:
    """Tensors, wherever they live and of whatever precision, arrays and lists as float64."""
    return np.asarray(values.tolist() if hasattr(values, "tolist") else values, dtype=float)


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Given a size, Pillow returns the scalable font; the other kind is for calls without one.
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=size))


def _color(label: str, class_names: Sequence[str] | None) -> str:
    # Python's own hash() of a string changes from process to process.
    index = zlib.crc32(label.encode()) if class_names is None else list(class_names).index(label)
    return PALETTE[index % len(PALETTE)]


def _visible(box: Any, image_size: tuple[int, int]) -> _Rectangle | None:
    """The pixels of the image at the edges of a box, inclusive; `None` if no part of the box is in the image."""
    if (box[2:] < 0).any() or (box[:2] >= image_size).any():
        return None
    left, right = np.clip(np.round(box[0::2]), 0, image_size[0] - 1).astype(int).tolist()
    top, bottom = np.clip(np.round(box[1::2]), 0, image_size[1] - 1).astype(int).tolist()
    return left, top, right, bottom


def _outline(draw: ImageDraw.ImageDraw, rectangle: _Rectangle, color: str, width: int, *, dashed: bool) -> None:
    if not dashed:
        draw.rectangle(rectangle, outline=color, width=width)
        return
    # White between the dashes keeps the outline closed to the eye on any background.
    draw.rectangle(rectangle, outline=PAPER, width=width)
    left, top, right, bottom = rectangle
    dash, period = 4 * width, 7 * width
    for start in range(left, right, period):
        end = min(start + dash, right)
        draw.rectangle((start, top, end, min(top + width - 1, bottom)), fill=color)
        draw.rectangle((start, max(bottom - width + 1, top), end, bottom), fill=color)
    for start in range(top, bottom, period):
        end = min(start + dash, bottom)
        draw.rectangle((left, start, min(left + width - 1, right), end), fill=color)
        draw.rectangle((max(right - width + 1, left), start, right, end), fill=color)


def _place(
    size: tuple[int, int],
    box: _Rectangle,
    image_size: tuple[int, int],
    line_width: int,
    taken: Sequence[_Rectangle],
) -> _Rectangle | None:
    """
    Where at the corners of its box, and wholly inside the image, a tag hides the least of those already placed; `None`
    if they would overlap by more than half of it, or the image is lower than the tag.
    """
    left, top, right, bottom = box
    width, height = size
    places = []
    for y in (top - height + line_width, top, bottom - line_width + 1, bottom - height + 1):
        for x in (left, right - width + 1):
            x0, y0 = min(max(x, 0), image_size[0] - width), min(max(y, 0), image_size[1] - height)
            places.append((x0, y0, x0 + width - 1, y0 + height - 1))
    hidden = [sum(_overlap(place, other) for other in taken) for place in places]
    least = min(hidden)
    return places[hidden.index(least)] if 2 * least <= width * height and height <= image_size[1] else None


def _tag(
    draw: ImageDraw.ImageDraw,
    place: _Rectangle,
    text: str,
    font: ImageFont.FreeTypeFont,
    color: str,
    *,
    hollow: bool,
) -> None:
    draw.rectangle(place, fill=PAPER if hollow else color, outline=color)
    red, green, blue = ImageColor.getrgb(color)[:3]
    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 150
    ink = INK if hollow or is_light else PAPER
    draw.text((sum(place[0::2]) / 2, sum(place[1::2]) / 2), text, fill=ink, font=font, anchor="mm")


def _overlap(first: _Rectangle, second: _Rectangle) -> int:
    width = min(first[2], second[2]) - max(first[0], second[0]) + 1
    height = min(first[3], second[3]) - max(first[1], second[1]) + 1
    return max(width, 0) * max(height, 0)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, or as much of it as fits into the width, with an ellipsis; empty if not even that fits."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…" if text else ""


def _fitted(image: Image.Image, size: int) -> Image.Image:
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return to_rgb(image).resize((width, height), Image.Resampling.LANCZOS)
