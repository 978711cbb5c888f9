import logging
from collections import Counter
from dataclasses import dataclass
from typing import Literal

logger = logging.getLogger(__name__)

OnInvalid = Literal["error", "drop", "clip"]

NUM_SHOWN = 10  # in the message of an error
NUM_REMARKED = 3  # in the log
NUM_KEPT = 20  # of each kind, for reports that show more

# Every kind of damage and its remedy. What is wrong with the file as a whole cannot be left out, so it always stops.
REMEDIES = {
    "unusable data set": "correct the path, the folder or the argument that is named.",
    "unusable file": "export the annotations again, as COCO JSON with the lists images, annotations and categories.",
    "no images": "check that the path and the split are the ones you mean.",
    "no objects": "a detector cannot learn from this; check that annotations and images belong together.",
    "unusable category": 'give each category an integer "id" and a "name" of its own.',
    "categories differ between splits": "write the same list of categories into the JSON of every split.",
    "duplicate image id": "give each image an id of its own, or remove the copy.",
    "unusable image entry": 'each image needs an integer "id", a "file_name", and "width" and "height" in pixels.',
    "file name leads outside the image folder": "use file names relative to the image folder.",
    "file name that is not UTF-8": "rename the file.",
    "missing image file": "put the file there, or remove the image from the annotations.",
    "unreadable image": "replace the file, or remove the image from the annotations.",
    "image size differs from the annotation": "annotate the file again, or put back the one that was annotated.",
    "unusable object": 'each object needs an integer "id", "image_id" and "category_id", and "bbox" as four numbers.',
    "duplicate annotation id": "give each annotation an id of its own, or remove the copy.",
    "unknown image": "remove the annotation, or add its image.",
    "unknown category": "add the category to the list of categories, or to class_names, or correct the annotation.",
    "non-finite box": "correct or remove the box.",
    "empty box": "a box needs a width and a height above 0 pixels: correct or remove it.",
    "box outside the image": "boxes are [x, y, width, height] in pixels: convert corners or fractions, or correct it.",
    "unusable area": "areas are numbers of square pixels, at least 0; correct it or leave it out.",
    "unusable iscrowd": "0 for one object, 1 for a crowd region; correct it or leave it out.",
    "unusable annotation file": "export or correct the file, or remove it with its image.",
    "missing annotation file": "put the file there, or remove its line from the list.",
    "ignored shape": "it is no object.",
    "unusable shape": "it needs a label and the points of a rectangle, polygon, circle or mask; lines have no box.",
    "unusable label line": "a line is a class number with x, y, width and height, or with the points of a polygon.",
    "box not in fractions": "divide pixels by the width and height of the image; of poses export the boxes alone.",
    "label file without image": "put the image there, or remove the file.",
    "unusable metadata row": "correct or remove the line.",
    "unknown split": "write train, validation or test there, or give the column another name.",
    "image listed twice": "put all objects of an image into one row.",
    "link leads outside the data set": "put the file itself in the place of the link.",
    "no group": "fill in the field that group_by names, or leave group_by out.",
    "same image in two splits": "what was seen in training says nothing in a test: keep one of them.",
    "same image twice in a split": "keep one of them, with the objects of both.",
    "same group in two splits": "the data set's own splits are kept.",
    "image without a label file": "it counts as an image without objects.",
    "image without annotations": "it is not used.",
    "rotated box": "the upright box around it is taken.",
    "difficult object": "it counts as an object like all others.",
    "annotation file in no split": "it is not used.",
    "category above others": "it is no class.",
    "split without images": "the split is left out.",
    "file name differs from the annotation": "the only file that differs in case, accents or prefix is used.",
    "images outside the data set's folder": "the link to their folder is followed.",
}
CROWD_REMEDY = 'CVAT writes its masks so: export them as polygons, or write "iscrowd" 0.'
FATAL = {
    "unusable data set",
    "unusable file",
    "no images",
    "no objects",
    "unusable category",
    "categories differ between splits",
    "duplicate image id",
}
# Said, never a reason to stop or to leave anything out.
REMARKS = {
    "same image in two splits",
    "same image twice in a split",
    "same group in two splits",
    "image without a label file",
    "image without annotations",
    "rotated box",
    "difficult object",
    "ignored shape",
    "annotation file in no split",
    "category above others",
    "split without images",
    "file name differs from the annotation",
    "images outside the data set's folder",
}


def escape_name(text: str) -> str:
    """A text in which what is no text, of a file name in another encoding than UTF-8, stands as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


class InvalidDatasetError(ValueError):
    """A data set whose annotations or images are damaged; the message names file, entry, field and remedy."""


@dataclass(frozen=True)
class Problem:
    """
    One thing that is wrong with a data set.

    Args:
        kind (`str`): A key of `REMEDIES`.
        where (`str`): The file and the entry.
        what (`str`): The field and what is wrong with it.
        image (`str`, *optional*): Path of the image, where one is concerned and it is a file.
        box (`tuple[float, float, float, float]`, *optional*): The box concerned, xywh, original pixels; may hold
            anything that is a number.
        size (`tuple[int, int]`, *optional*): Width and height of the image as annotated, where the annotations say.
    """

    kind: str
    where: str
    what: str
    image: str | None = None
    box: tuple[float, float, float, float] | None = None
    size: tuple[int, int] | None = None


class ProblemLog:
    """
    Collects what is wrong with a data set, so that one report tells all of it.

    Args:
        on_invalid (`"error"`, `"drop"` or `"clip"`): Whether `finish` raises, or says what was left out.

    Attributes:
        counts (`Counter[str]`): How often each kind occurred.
        examples (`dict[str, list[Problem]]`): The first `NUM_KEPT` problems of each kind.
    """

    def __init__(self, on_invalid: OnInvalid) -> None:
        self.on_invalid = on_invalid
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[Problem]] = {}
        self.first: list[str] = []

    def add(
        self,
        kind: str,
        where: str,
        what: str,
        image: str | None = None,
        box: tuple[float, float, float, float] | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Note one problem; the arguments are those of `Problem`."""
        where, what = escape_name(where), escape_name(what)
        image = None if image is None else escape_name(image)
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < NUM_KEPT:
            examples.append(Problem(kind, where, what, image, box, size))
        if kind not in REMARKS and len(self.first) < NUM_SHOWN:
            self.first.append(f"{f'{where}: {what}':.1000}")  # file names may be endless

    @property
    def fatal(self) -> bool:
        """Whether something was found that cannot be left out."""
        return any(kind in FATAL for kind in self.counts)

    def finish(self) -> None:
        """
        Raise or log what was collected.

        Raises:
            InvalidDatasetError: There are problems, and `on_invalid` is "error" or they cannot be left out.
        """
        for kind in REMARKS & self.counts.keys():
            shown = "; ".join(f"{problem.where}: {problem.what}" for problem in self.examples[kind][:NUM_REMARKED])
            logger.warning("%d x %s: %s %s", self.counts[kind], kind, REMEDIES[kind], f"First: {shown}.")
        counts = {kind: count for kind, count in self.counts.items() if kind not in REMARKS}
        if not counts:
            return
        if self.on_invalid != "error" and not self.fatal:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in counts.items())
            logger.warning('Left out or clipped (on_invalid="%s"): %s.', self.on_invalid, kinds)
            return
        total = sum(counts.values())
        lines = [f"{total} problem{'s' if total > 1 else ''} in the data set."]
        lines += [f"  {problem}" for problem in self.first]
        if total > len(self.first):
            lines.append(f"  ... and {total - len(self.first)} more.")
        lines.append("What to do:")
        lines += [f"  {count} x {kind}: {REMEDIES[kind]}" for kind, count in counts.items()]
        if not self.fatal:
            lines.append(
                'Or leave out what is invalid with on_invalid="drop", or "clip" to also cut boxes to their image.'
            )
        raise InvalidDatasetError("\n".join(lines))
