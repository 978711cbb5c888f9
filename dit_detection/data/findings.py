"""What is suspicious about a data set, beyond what the readers refuse."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from .problems import CROWD_REMEDY, FATAL, REMARKS, REMEDIES, ProblemLog

Severity = Literal["error", "warning", "note"]

NUM_KEPT = 20  # examples of each kind
FEW_OBJECTS = 10  # of a class, in training

# Every kind, how grave it is, and what to do. An error stops training; a note asks for nothing.
FINDINGS: dict[str, tuple[Severity, str]] = {
    "no training split": ("error", "training needs a split named train."),
    "image cannot be decoded": ("error", "training would stop when it reaches it: replace the file or remove it."),
    "two boxes for one object": (
        "warning",
        "same class, same place: remove one, or the detector learns to report twice.",
    ),
    "two classes at one place": ("warning", "decide for one class: a detector cannot learn both."),
    "box of the whole image": ("warning", "is it an image label rather than an object? Then remove the box."),
    "object too small for the canvas": (
        "warning",
        "hardly any pixels are left of it: raise --image_size, or cut the images into tiles.",
    ),
    "extreme aspect ratio": ("note", "no anchor is that long and thin."),
    "labels may be one class off": (
        "warning",
        "do the labels count from 0 or from 1? If they are right, remove the class.",
    ),
    "class for the background": ("warning", "remove it: what lies in no box is background already."),
    "class that is never used": ("warning", "remove it, or look for its objects: it is trained to be nowhere."),
    "class without training objects": ("warning", "it cannot be learned: move some of its images to train."),
    "class in training only": ("note", "no metric will tell how well it is found."),
    "class with few training objects": ("warning", f"fewer than {FEW_OBJECTS}: expect little; annotate more."),
    "classes without names": ("note", "their names are numbers: give names, for people to read."),
    "mostly crowd regions": (
        "warning",
        f"nothing is learned in them, and no metric counts what is found there. {CROWD_REMEDY}",
    ),
    "split without objects": ("warning", "nothing can be measured on it: annotate it, or leave the split out."),
    "image without objects": ("note", "it teaches what is background; annotate it if something is missing."),
    "image without a usual class": ("note", "nearly all others show it: was it forgotten there, or is there none?"),
    "same image in two splits": ("warning", REMEDIES["same image in two splits"]),
    "same image twice in a split": ("warning", REMEDIES["same image twice in a split"]),
    "wrong file name extension": ("note", "the content is read as what it is."),
    "turned by its EXIF orientation": ("note", "pixels are turned upright; the boxes are taken as drawn on those."),
    "annotated against its EXIF orientation": (
        "note",
        "the annotated size is that of the stored pixels, so they are left as they are, and the boxes with them.",
    ),
    "CMYK image": ("note", "converted to RGB without a colour profile."),
    "more than 8 bits per channel": ("note", "scaled to 8 bits by the depth that its values use."),
    "palette image": ("note", "converted to RGB."),
    "transparent image": ("note", "transparency is dropped: hidden colours appear."),
    "greyscale image": ("note", "its three channels become equal."),
}
# Remarks of the readers that ask for nothing; the others are warnings.
NOTED = {
    "image without a label file",
    "rotated box",
    "difficult object",
    "ignored shape",
    "file name differs from the annotation",
    "images outside the data set's folder",
}


@dataclass(frozen=True)
class Example:
    """
    One place where something was found.

    Args:
        where (`str`): Image and split, or the file and entry.
        what (`str`): What is the matter there.
        split (`str`, *optional*), row (`int`, *optional*): Where to find the image in the data set.
        image (`str`, *optional*): Path of the image, if it is not in the data set.
        size (`tuple[int, int]`, *optional*): Width and height that such an image is annotated with, where known.
        boxes (`tuple`): The boxes in question, xywh, original pixels.
        labels (`tuple[str, ...]`): A word for each.
    """

    where: str
    what: str
    split: str | None = None
    row: int | None = None
    image: str | None = None
    size: tuple[int, int] | None = None
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    labels: tuple[str, ...] = ()


@dataclass
class Finding:
    """Everything of one kind: how grave, how often, in which splits (where known), what to do, and the worst of it."""

    kind: str
    severity: Severity
    remedy: str
    count: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)


class FindingLog:
    """Collects findings."""

    def __init__(self) -> None:
        self.findings: dict[str, Finding] = {}

    def add(self, kind: str, count: int, examples: Iterable[Example], split: str | None = None) -> None:
        """
        Note some cases of one kind.

        Args:
            kind (`str`): A key of `FINDINGS`.
            count (`int`): How many; with 0 nothing is noted.
            examples (`Iterable[Example]`): Worst first; no more than `NUM_KEPT` are taken.
            split (`str`, *optional*): Where they are.
        """
        if count:
            finding = self.findings.setdefault(kind, Finding(kind, *FINDINGS[kind]))
            finding.count += count
            finding.examples += islice(examples, NUM_KEPT)
            if split is not None:
                finding.splits[split] = count

    def add_problems(self, problems: ProblemLog) -> None:
        """Note what the reader found: an error if training would stop for it, else a warning or a note."""
        for kind, count in problems.counts.items():
            if kind in FINDINGS:  # looked for again, with the places of the images
                continue
            stops = kind in FATAL or (problems.on_invalid == "error" and kind not in REMARKS)
            examples = [
                Example(
                    p.where,
                    p.what,
                    image=p.image,
                    size=p.size,
                    boxes=() if p.box is None else (p.box,),
                    labels=("",) * (p.box is not None),
                )
                for p in problems.examples[kind]
            ]
            remedy = REMEDIES[kind]
            if stops and kind not in FATAL:
                remedy += " Or leave it out with --on_invalid drop."
            elif not stops and kind not in REMARKS:
                remedy = f"left out or clipped (--on_invalid {problems.on_invalid}): {remedy}"
            severity: Severity = "error" if stops else "note" if kind in NOTED else "warning"
            self.findings[kind] = Finding(kind, severity, remedy, count, examples=examples)

    def sorted(self) -> list[Finding]:
        """Errors first, then warnings, then notes."""
        order = ("error", "warning", "note")
        return sorted(self.findings.values(), key=lambda finding: order.index(finding.severity))
