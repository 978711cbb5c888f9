"""What `dit-detect check` found, as text for the terminal and as a picture."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.findings import Example, Finding
from ..data.image_reading import DECODING_ERRORS, decode_image, read_image, to_rgb
from ..data.statistics import SplitTable
from ..visualize import draw_detections, draw_grid

NUM_SHOWN = {"error": 5, "warning": 3, "note": 1}  # examples in the text
MAX_CLASSES = 40  # rows in the text
MAX_CELLS = 24  # images in the picture
COLUMNS = 4
CLOSE_UP = 0.25  # of the image's sides, at least, are shown around small boxes


def print_report(report: Mapping[str, Any]) -> None:
    """Print the numbers, the findings, the anchors and the verdict."""
    if "splits" in report:
        _print_splits(report)
    print()
    for finding in report["findings"]:
        _print_finding(finding)
    if not report["findings"]:
        print("Nothing suspicious was found.\n")
    if "anchors" in report:
        _print_anchors(report)
    counts = {name: sum(f["severity"] == name for f in report["findings"]) for name in NUM_SHOWN}
    found = ", ".join(f"{count} {name}{'s' if count != 1 else ''}" for name, count in counts.items())
    verdict = "Training would start" if report["training_would_start"] else "Training would NOT start"
    print(f"{verdict}: {found}.")


def _print_splits(report: Mapping[str, Any]) -> None:
    splits = report["splits"]
    height, width = report["canvas"]
    rows = [["", *splits]]

    def add(name: str, cell: Any) -> None:
        rows.append([name, *(cell(numbers) for numbers in splits.values())])

    def spread(name: str, digits: int, factor: float = 1.0, shares: Sequence[str] = ("5%", "50%", "95%")) -> Any:
        return lambda n: " / ".join(f"{factor * n[name][share]:.{digits}f}" for share in shares) if n[name] else "-"

    add("images", lambda n: str(n["images"]))
    add("  without objects", lambda n: str(n["images_without_objects"]))
    add("  size in pixels", lambda n: _most_common(n["image_sizes"]))
    add("  format", lambda n: _most_common(n["file_formats"]))
    add("  mode", lambda n: _most_common(n["modes"]))
    add("objects", lambda n: str(n["objects"]))
    if any(n["crowd_regions"] for n in splits.values()):
        add("  crowd regions among them", lambda n: str(n["crowd_regions"]))
    add("  per image: fewest / median / most", spread("boxes_per_image", 0, shares=("0%", "50%", "100%")))
    add("  COCO's small / medium / large", lambda n: " / ".join(map(str, n["size_classes"].values())))
    add(f"  √area on {height} x {width}, pixels *", spread("canvas_size", 0))
    add(f"  shorter side on {height} x {width}, pixels *", spread("canvas_short_side", 0))
    add("  √area / √image area, % *", spread("relative_size", 0, factor=100))
    add("  height / width *", spread("aspect_ratio", 2))
    rows.append(["classes", *[""] * len(splits)])
    for name in report["class_names"][:MAX_CLASSES]:
        add(f"  {name}", lambda n, name=name: str(n["classes"][name]))
    _print_table(rows)
    if len(report["class_names"]) > MAX_CLASSES:
        print(f"  … and {len(report['class_names']) - MAX_CLASSES} more classes (--json has them)")
    print("* 5 % of the objects lie below the first figure, half below the second, 95 % below the third.")


def _most_common(counts: Mapping[str, int]) -> str:
    if not counts:
        return "-"
    first, count = next(iter(counts.items()))
    return first if len(counts) == 1 else f"{first} ({count}), {len(counts) - 1} other{'s' if len(counts) > 2 else ''}"


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("   ".join([row[0].ljust(widths[0]), *cells]).rstrip())


def _print_finding(finding: Mapping[str, Any]) -> None:
    splits = ", ".join(f"{split} {count}" for split, count in finding["splits"].items())
    print(f"{finding['severity'].upper()}: {finding['kind']}, {finding['count']} x{f' ({splits})' if splits else ''}")
    print(f"  {finding['remedy'][0].upper()}{finding['remedy'][1:]}")
    shown = finding["examples"][: NUM_SHOWN[finding["severity"]]]
    for example in shown:
        print(f"    {example['where']}{': ' if example['what'] else ''}{example['what']}")
    if finding["count"] > len(shown):
        print(f"    … and {finding['count'] - len(shown)} more")
    print()


def _print_anchors(report: Mapping[str, Any]) -> None:
    settings, fitted = dict(report["anchors"]), report.get("fitted_anchors")
    if fitted is not None:
        settings["fitted"] = fitted["coverage"]
    sizes = ("all", "small", "medium", "large")
    rows = [["anchors", "split", *sizes]]
    for name, splits in settings.items():
        for split in [split for split in ("train", "validation") if split in splits]:
            rows.append([name, split, *(_coverage_cell(splits[split][size]) for size in sizes)])
    if len(rows) == 1:  # a test split alone
        return
    print("Objects whose best anchor reaches IoU 0.5 (and the mean of the best IoUs), by COCO's sizes")
    _print_table(rows)
    if fitted is not None:
        old = report["anchors"][fitted["instead_of"]]["train"]["all"]["covered"]
        new = fitted["coverage"]["train"]["all"]["covered"]
        if fitted["suggested"]:
            print(
                f"The fitted anchors cover {new:.1%} of the training objects instead of {old:.1%}. `dit-detect train` "
                "fits those of a new detector by itself; for a stream, or a detector that is there already:"
            )
            print(f"  {fitted['command']}")
        else:
            print(
                f"Fitted anchors are no better than those of {fitted['instead_of']} ({new:.1%} and {old:.1%} of the "
                f"training objects): {fitted['file']} holds the latter, unchanged."
            )
    print()


def _coverage_cell(found: Mapping[str, float]) -> str:
    return f"{found['covered']:.1%} ({found['mean_iou']:.2f})" if found["objects"] else "-"


def draw_findings(findings: Sequence[Finding], tables: Mapping[str, SplitTable]) -> Image.Image | None:
    """
    A grid of the worst cases: every kind has its turn, errors first; the boxes in question are drawn.

    Args:
        findings (`Sequence[Finding]`): Gravest first.
        tables (`Mapping[str, SplitTable]`): The splits, for their images.

    Returns:
        `PIL.Image.Image`, *optional*: `None` if no finding has to do with an image.
    """
    queues = [(finding.kind, _by_image(finding)) for finding in findings]
    cells = [(kind, queue[turn]) for turn in range(MAX_CELLS) for kind, queue in queues if turn < len(queue)][
        :MAX_CELLS
    ]
    if not cells:
        return None
    captions = [f"{kind}: {_caption(examples[0])}" for kind, examples in cells]
    return draw_grid([_draw(examples, tables) for _, examples in cells], columns=COLUMNS, captions=captions)


def _by_image(finding: Finding) -> list[list[Example]]:
    """The examples of a finding that have to do with an image, those of the same one together."""
    groups: dict[Any, list[Example]] = {}
    for example in finding.examples:
        if example.row is not None or example.image is not None:
            groups.setdefault((example.split, example.row, example.image), []).append(example)
    return list(groups.values())


def _caption(example: Example) -> str:
    name = example.where if example.image is None else Path(example.image).name
    # Where no box shows it, words must.
    return name if example.boxes or not example.what else f"{name}, {example.what}"


def _draw(examples: Sequence[Example], tables: Mapping[str, SplitTable]) -> Image.Image:
    try:
        image = _open(examples[0], tables)
    except DECODING_ERRORS:
        return Image.new("RGB", (480, 360), "#d8dee4")
    boxes = [box for example in examples for box in example.boxes]
    labels = [label for example in examples for label in example.labels]
    corners = np.array(boxes, dtype=float).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    corners = np.hstack([np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])])
    drawable = np.isfinite(corners).all(axis=1)
    corners, labels = corners[drawable], [label for label, ok in zip(labels, drawable, strict=True) if ok]
    image, corners = _close_up(image, corners)
    # Enlarged first, or the letters of small images would cover them.
    scale = max(1.0, 640 / max(image.size))
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    return draw_detections(image, corners * scale, labels)


def _open(example: Example, tables: Mapping[str, SplitTable]) -> Image.Image:
    if example.image is not None:
        if example.size is not None:
            with suppress(ValueError):  # of another size than annotated
                return to_rgb(decode_image({"path": example.image, "bytes": None}, *example.size))
        return read_image(example.image, max_pixels=None)
    row = tables[str(example.split)].dataset[example.row]
    return to_rgb(decode_image(row["image"], row["width"], row["height"]))


def _close_up(image: Image.Image, corners: Any) -> tuple[Image.Image, Any]:
    """Cut out the surroundings of boxes that would be hard to see in the whole image."""
    if not len(corners):
        return image, corners
    low, high = corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)
    share = max(CLOSE_UP, 2 * ((high - low) / image.size).max())
    if share >= 1 or (high < 0).any() or (low > image.size).any():
        return image, corners
    side = np.ceil(share * np.array(image.size))
    corner = np.clip((low + high) / 2 - side / 2, 0, image.size - side).round()
    left, top, right, bottom = np.concatenate([corner, corner + side]).astype(int).tolist()
    return image.crop((left, top, right, bottom)), corners - np.tile(corner, 2)
