import logging
from collections import Counter
from typing import Literal

logger = logging.getLogger(__name__)

OnInvalid = Literal["error", "drop", "clip"]

NUM_SHOWN = 10

# Every kind of damage and its remedy. What is wrong with the file as a whole cannot be left out, so it always stops.
REMEDIES = {
    "unusable file": "export the annotations again, as COCO JSON with the lists images, annotations and categories.",
    "no images": "check that the path and the split are the ones you mean.",
    "no objects": "a detector cannot learn from this; check that annotations and images belong together.",
    "unusable category": 'give each category an integer "id" and a "name" of its own.',
    "categories differ between splits": "write the same list of categories into the JSON of every split.",
    "duplicate image id": "give each image an id of its own, or remove the copy.",
    "unusable image entry": 'each image needs an integer "id", a "file_name", and "width" and "height" in pixels.',
    "file name leads outside the image folder": "use file names relative to the image folder.",
    "missing image file": "put the file there, or remove the image from the annotations.",
    "unreadable image": "replace the file, or remove the image from the annotations.",
    "image size differs from the annotation": "annotate the file again, or put back the one that was annotated.",
    "unusable object": 'each object needs an integer "id", "image_id" and "category_id", and "bbox" as four numbers.',
    "duplicate annotation id": "give each annotation an id of its own, or remove the copy.",
    "unknown image": "remove the annotation, or add its image.",
    "unknown category": "add the category to the list of categories, or correct the annotation.",
    "non-finite box": "correct or remove the box.",
    "empty box": "a box needs a width and a height above 0 pixels: correct or remove it.",
    "box outside the image": "boxes are [x, y, width, height] in pixels: convert corners or fractions, or correct it.",
    "unusable area": "areas are numbers of square pixels, at least 0; correct it or leave it out.",
    "unusable iscrowd": "0 for one object, 1 for a crowd region; correct it or leave it out.",
}
FATAL = {
    "unusable file",
    "no images",
    "no objects",
    "unusable category",
    "categories differ between splits",
    "duplicate image id",
}


class InvalidDatasetError(ValueError):
    """A data set whose annotations or images are damaged; the message names file, entry, field and remedy."""


class ProblemLog:
    """
    Collects what is wrong with a data set, so that one report tells all of it.

    Args:
        on_invalid (`"error"`, `"drop"` or `"clip"`): Whether `finish` raises, or says what was left out.
    """

    def __init__(self, on_invalid: OnInvalid) -> None:
        self.on_invalid = on_invalid
        self.counts: Counter[str] = Counter()
        self.first: list[str] = []

    def add(self, kind: str, where: str, what: str) -> None:
        """Note one problem: its kind (a key of `REMEDIES`), the file and entry, and what is wrong with which field."""
        self.counts[kind] += 1
        if len(self.first) < NUM_SHOWN:
            self.first.append(f"{where}: {what}")

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
        if not self.counts:
            return
        if self.on_invalid != "error" and not self.fatal:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in self.counts.items())
            logger.warning('Left out or clipped (on_invalid="%s"): %s.', self.on_invalid, kinds)
            return
        total = sum(self.counts.values())
        lines = [f"{total} problem{'s' if total > 1 else ''} in the data set."]
        lines += [f"  {problem}" for problem in self.first]
        if total > len(self.first):
            lines.append(f"  ... and {total - len(self.first)} more.")
        lines.append("What to do:")
        lines += [f"  {count} x {kind}: {REMEDIES[kind]}" for kind, count in self.counts.items()]
        if not self.fatal:
            lines.append(
                'Or leave out what is invalid with on_invalid="drop", or "clip" to also cut boxes to their image.'
            )
        raise InvalidDatasetError("\n".join(lines))
