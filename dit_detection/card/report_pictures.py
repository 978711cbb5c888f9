"""Pictures of what a detector gets right and wrong: curves, confusion matrix, images with what was found in them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from PIL import Image

from ..data.image_reading import decode_image, to_rgb
from ..visualize import GREY, INK, PALETTE, PAPER, draw_detections, draw_grid, render
from .detection_report import DetectionReport, ImageDetections, ImageErrors

# More curves, or more rows and columns, than these nobody can tell apart.
MAX_CURVES, MAX_CLASSES = 12, 24
# Letters of a class name that fit beside a plot.
NAME_LENGTH = 24
# Longer side that small images are enlarged to, or the letters of the tags would cover them.
PICTURE_SIZE = 640


def plot_precision_recall(report: DetectionReport) -> Image.Image:
    """
    Plot precision over recall at IoU 0.5, a curve per class with a dot at the report's threshold; with more than
    `MAX_CURVES` classes, their mean among thin grey curves.

    Raises:
        ValueError: If no class has objects.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    curves = {index: one for index, one in enumerate(report.classes) if one.curve}
    if not curves:
        raise ValueError("No class of the report has objects: there is no precision-recall curve to plot.")
    recalls = np.linspace(0, 1, 101)
    figure = Figure(figsize=(6.4, 3.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    names, lines = [], []
    if len(curves) > MAX_CURVES:
        for one in curves.values():
            axes.plot(recalls, one.curve, color="#c4ccd4", linewidth=0.7)
        lines += axes.plot(recalls, np.mean([one.curve for one in curves.values()], axis=0), color=PALETTE[0])
        names.append(f"mean of {len(curves)} classes  {np.mean([one.ap_50 for one in curves.values()]):.2f}")
    else:
        for index, one in curves.items():
            color = PALETTE[index % len(PALETTE)]
            lines += axes.plot(recalls, one.curve, color=color, linewidth=1.8)
            names.append(f"{_short(one.name)}  {one.ap_50:.2f}")
            if one.precision is not None and one.recall is not None:
                axes.plot([one.recall], [one.precision], "o", color=color, markersize=6, markeredgecolor="white")
    axes.set_title("Precision and recall at IoU 0.50", fontsize=10, color=INK, loc="left")
    axes.set_xlabel("recall: share of the objects that are found", fontsize=9, color=GREY)
    axes.set_ylabel("precision: share of right detections", fontsize=9, color=GREY)
    axes.set_xlim(0, 1.01)
    axes.set_ylim(0, 1.03)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    _tidy(axes)
    # Of its own accord, matplotlib leaves out names that begin with "_" and sets those between "$" as formulas.
    legend = axes.legend(
        lines,
        ["x"] * len(lines),
        title="average precision",
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        frameon=False,
        fontsize=8,
        title_fontsize=8,
        alignment="left",
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
        text.set_color(INK)
    return render(figure)


def plot_confusion_matrix(report: DetectionReport) -> Image.Image:
    """
    Plot what is taken for what at the report's threshold: blue what is right, red what is wrong, the deeper the larger
    its share. With more than `MAX_CLASSES` classes, those that are most often confused with others.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    table = report.confusion_matrix()
    shown = confused_classes(report)
    order = [*shown, len(report.classes)]
    counts = table[np.ix_(order, order)]
    # Shares of all objects of the row, shown or not; where there is no object, of all detections of the column.
    shares = counts / np.maximum(table[order].sum(axis=1, keepdims=True), 1)
    shares[-1] = counts[-1] / np.maximum(table[:, order].sum(axis=0), 1)
    is_right = np.eye(len(order), dtype=bool)
    names = [_short(report.classes[index].name) for index in shown]
    size = max(2.6, 0.42 * len(order) + 0.6)
    figure = Figure(figsize=(size + 2.0, size + 1.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for color, part in ((PALETTE[0], is_right), (PALETTE[3], ~is_right)):
        colors = LinearSegmentedColormap.from_list(color, [PAPER, color])
        axes.imshow(np.ma.array(shares, mask=~part), cmap=colors, vmin=0, vmax=1)
    for row, column in np.argwhere(counts).tolist():
        ink = "white" if shares[row, column] > 0.6 else INK
        digits = len(str(counts[row, column]))
        font_size = 8 if digits < 4 else 32 / digits
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=font_size, color=ink)
    rotation = 0 if len(names) <= 4 and max(map(len, names), default=0) <= 10 else 90
    axes.set_xticks(range(len(order)), [*names, "missed"], rotation=rotation, parse_math=False)
    axes.set_yticks(range(len(order)), [*names, "background"], parse_math=False)
    axes.set_xlabel("detected as", fontsize=9, color=GREY)
    axes.set_ylabel("annotated as", fontsize=9, color=GREY)
    title = f"Detections above {report.threshold:.2f}"
    if len(shown) < len(report.classes):
        title += f": the {len(shown)} most confused of {len(report.classes)} classes"
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.tick_params(labelsize=8, colors=INK, length=0)
    axes.set_xticks(np.arange(len(order) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(order) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#d8dee4", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    return render(figure)


def confused_classes(report: DetectionReport) -> list[int]:
    """The labels that the confusion matrix shows: all, or the `MAX_CLASSES` most often taken for another class."""
    num_classes = len(report.classes)
    if num_classes <= MAX_CLASSES:
        return list(range(num_classes))
    table = report.confusion_matrix()[:-1, :-1]
    np.fill_diagonal(table, 0)
    errors = table.sum(axis=0) + table.sum(axis=1)
    return sorted(np.argsort(-errors, kind="stable")[:MAX_CLASSES].tolist())


def draw_images(
    rows: datasets.Dataset | datasets.IterableDataset,
    images: Sequence[ImageDetections],
    captions: Sequence[str],
    id2label: Mapping[int, str],
    threshold: float,
    columns: int = 4,
) -> Image.Image:
    """
    A grid of images: dashed the annotations, solid the detections above the threshold.

    Args:
        rows (`Dataset` or `IterableDataset`): In the row format; it must have the images.
        images (`Sequence[ImageDetections]`): The images to draw.
        captions (`Sequence[str]`): Of each.
        id2label (`Mapping[int, str]`): The classes.
        threshold (`float`): Detections with higher scores are drawn.
        columns (`int`): Images per row of the grid.
    """
    found_rows = {row["image_id"]: row for row in _rows(rows, {image.image_id for image in images})}
    class_names = [id2label[label] for label in sorted(id2label)]
    pictures = []
    for image in images:
        row = found_rows[image.image_id]
        picture = to_rgb(decode_image(row["image"], row["width"], row["height"]))
        scale = max(1.0, PICTURE_SIZE / max(picture.size))
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
        names = [id2label[int(label)] for label in image.expected[:, 4]]
        boxes = image.expected[:, :4] * scale
        picture = draw_detections(picture, boxes, names, class_names=class_names, ground_truth=True)
        found = image.found[image.found[:, 4] > np.float32(threshold)]
        names = [id2label[int(label)] for label in found[:, 5]]
        pictures.append(draw_detections(picture, found[:, :4] * scale, names, found[:, 4], class_names=class_names))
    return draw_grid(pictures, columns=columns, captions=captions)


def evenly_spaced(errors: Sequence[ImageErrors], count: int) -> list[int]:
    """Indices of up to `count` images, the first and the last included."""
    return sorted({round(index) for index in np.linspace(0, len(errors) - 1, min(count, len(errors)))})


def worst_images(errors: Sequence[ImageErrors], count: int) -> list[int]:
    """Indices of up to `count` images with the lowest F1 below 1; of equals, those with more errors come first."""
    order = sorted(
        range(len(errors)), key=lambda i: (errors[i].f1, -errors[i].wrong - errors[i].missed, errors[i].image_id)
    )
    return [index for index in order[:count] if errors[index].f1 < 1]


def caption_of(errors: ImageErrors) -> str:
    """What happened in an image, in a line."""
    counts = f"{errors.correct} right, {errors.wrong} wrong, {errors.missed} missed"
    return f"image {errors.image_id}: {counts} (F1 {math.floor(100 * errors.f1 + 1e-9) / 100:.2f})"


def _rows(rows: datasets.Dataset | datasets.IterableDataset, image_ids: set[int]) -> Iterable[dict[str, Any]]:
    """The rows with these ids, images not decoded."""
    rows = rows.cast_column("image", datasets.Image(decode=False))
    if isinstance(rows, datasets.Dataset):
        all_ids = rows.select_columns(["image_id"])["image_id"]
        rows = rows.select([index for index, image_id in enumerate(all_ids) if image_id in image_ids])
    left = set(image_ids)
    for row in rows:
        if row["image_id"] in left:
            left.remove(row["image_id"])
            yield row
        if not left:
            return


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def _tidy(axes: Any) -> None:
    axes.tick_params(labelsize=8, colors=GREY)
    axes.grid(color="#d8dee4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
