"""What happens when a visitor of the demo page drops images, moves a slider or saves. Needs gradio."""

import dataclasses
import html
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from ..data.image_reading import UnreadableImageError
from ..inference.prediction_formats import Prediction, unreadable
from .images import SeenImage, draw_objects, find_objects, look_at, pack_predictions, thumbnail

# Of one visitor at a time, so that no one fills the server's memory.
MAX_IMAGES = 100
NO_IMAGE_YET = '<div class="dit-summary">No image yet.</div>'
MAX_NAMED = 5  # files that could not be read: in messages


@dataclass(eq=False)
class Visit:
    """What one visitor's page holds."""

    images: list[SeenImage] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)  # name → why
    num_left_out: int = 0  # beyond MAX_IMAGES


class DemoHandlers:
    """
    The functions behind the page of one detector. They keep nothing: what a visitor has is in their [`Visit`].

    Args:
        model ([`DiTForObjectDetection`]): In eval mode.
        image_processor ([`DiTDetectionImageProcessor`]): Of the model.
    """

    def __init__(self, model: Any, image_processor: Any) -> None:
        self.model, self.image_processor = model, image_processor
        self.class_names = [model.config.id2label[label] for label in range(model.config.num_labels)]

    def see(
        self,
        paths: str | list[str] | None,
        visit: Visit,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how gradio asks for one)
    ) -> tuple[Visit, int, gr.Gallery]:
        """Files → a new visit, whose first image is shown. Images of the visit before are not seen again."""
        paths = [paths] if isinstance(paths, str) else paths or []
        known = {image.path: image for image in visit.images}
        visit = Visit()
        for index, (path, name) in enumerate(zip(paths, _distinct_names(paths), strict=True)):
            progress((index, len(paths)), desc=name)
            if len(visit.images) == MAX_IMAGES:
                visit.num_left_out = len(paths) - index
                break
            try:
                image = known.get(path) or look_at(self.model, self.image_processor, path, name)
                visit.images.append(dataclasses.replace(image, name=name))  # names depend on the others that are there
            except UnreadableImageError as error:
                visit.unreadable[name] = str(error)
        for name, fault in list(visit.unreadable.items())[:MAX_NAMED]:
            gr.Warning(f"{html.escape(name)} {html.escape(fault)}", title="Not read")
        thumbnails = [(thumbnail(image), image.name) for image in visit.images]
        return visit, 0, gr.Gallery(thumbnails, visible=len(thumbnails) > 1, selected_index=None)

    def choose(self, event: gr.SelectData) -> int:
        """A click on a small picture → its index."""
        return int(event.index)

    def show(
        self, visit: Visit, index: int, threshold: float, nms_threshold: float, labels: list[int]
    ) -> tuple[Any, str, list[list[Any]]]:
        """The picture with boxes, the summary (HTML) and the rows of the table, from what the model has said."""
        if not visit.images:
            return None, _faults(visit) or NO_IMAGE_YET, []
        seen = visit.images[min(index, len(visit.images) - 1)]
        start = time.perf_counter()
        found = find_objects(seen, self.image_processor, self.class_names, threshold, nms_threshold, labels)
        post_process_ms = (time.perf_counter() - start) * 1000
        rows = [
            [item["label"], f"{item['score']:.3f}", *(f"{value:.1f}" for value in item["box_xyxy"])]
            for item in found["detections"]
        ]
        summary = _summary(seen, found, post_process_ms, str(self.model.device)) + _faults(visit)
        return draw_objects(seen, found, self.class_names), summary, rows

    def save(self, format: str, visit: Visit, threshold: float, nms_threshold: float, labels: list[int]) -> str | None:
        """All images of the visit → a file of predictions, in a format of [`write_predictions`]."""
        if not visit.images:
            gr.Warning("There is nothing to save yet: drop an image first.", title="No image")
            return None
        predictions: list[Prediction] = [
            find_objects(seen, self.image_processor, self.class_names, threshold, nms_threshold, labels, number)
            for number, seen in enumerate(visit.images, start=1)
        ]
        for name, fault in visit.unreadable.items():
            predictions.append(unreadable(name, len(predictions) + 1, fault))
        try:
            file_name, content = pack_predictions(predictions, format, self.class_names)
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), title="Not saved", print_exception=False) from error
        return save_bytes_to_cache(content, file_name, get_upload_folder())


def _distinct_names(paths: list[str]) -> list[str]:
    """The files' names, numbered where several folders have files of one name."""
    taken: set[str] = set()
    names = []
    for path in map(Path, paths):
        name, number = path.name, 1
        while name in taken:
            number += 1
            name = f"{path.stem} ({number}){path.suffix}"
        taken.add(name)
        names.append(name)
    return names


def _summary(seen: SeenImage, found: Prediction, post_process_ms: float, device: str) -> str:
    counts = Counter(item["label"] for item in found["detections"])
    total = sum(counts.values())
    lines = [
        f"<b>{total} object{'' if total == 1 else 's'}</b> in {html.escape(seen.name)}",
        ", ".join(f"{count} {html.escape(label)}" for label, count in counts.most_common())
        or "none above the threshold",
        f"{seen.width} &times; {seen.height} pixels, on {html.escape(device)}",
        f"preprocessing {seen.preprocess_ms:.0f} ms, model {seen.model_ms:.0f} ms, post-processing "
        f"{post_process_ms:.0f} ms",
    ]
    return f'<div class="dit-summary">{"<br>".join(lines)}</div>'


def _faults(visit: Visit) -> str:
    """What was not looked at, and why."""
    lines = [f"{html.escape(name)} {html.escape(fault)}" for name, fault in list(visit.unreadable.items())[:MAX_NAMED]]
    if len(visit.unreadable) > MAX_NAMED:
        lines.append(f"{len(visit.unreadable) - MAX_NAMED} more files could not be read.")
    if visit.num_left_out:
        lines.append(
            f"{visit.num_left_out} files were left out: the page takes {MAX_IMAGES} images. <code>dit-detect "
            "predict</code> takes any number."
        )
    return f'<div class="dit-summary dit-faults">{"<br>".join(lines)}</div>' if lines else ""
