"""
The page of `dit-detect demo`: images in, boxes that follow thresholds and classes, tables and files out. Needs gradio.

    launch(load_page("my-detector"))
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from transformers.utils import cached_file

from ..adapters import load_detector, load_image_processor
from .handlers import NO_IMAGE_YET, DemoHandlers, Visit
from .images import MIN_THRESHOLD

DEFAULT_THRESHOLD = 0.3

_HELP = (
    "Drop images or a folder of them, or take a picture. The model runs once per image; thresholds and classes change "
    "what is shown at once."
)
_FORMATS = {"json": "JSON", "coco": "COCO", "yolo": "YOLO"}
_COLUMNS = {
    "class": "str",
    "score": "number",
    "left": "number",
    "top": "number",
    "right": "number",
    "bottom": "number",
}
_CSS = """
.gradio-container {max-width: 1280px !important}
.dit-summary {font-size: 14px; line-height: 1.6; padding: 0 4px}
.dit-faults {color: #b91c1c; margin-top: 8px}
.dark .dit-faults {color: #fca5a5}
#classes .wrap {max-height: 160px; overflow-y: auto}
#table [aria-colindex]:not([aria-colindex="1"]) :is(.cell-wrap, .header-content, span) {
    justify-content: flex-end; text-align: right; flex-grow: 1;
}
#table .cell-menu-button {display: none}
"""
# The browser follows the link as if it had been clicked; there is no file where the handler has warned instead.
_SAVE_FILE = """(file) => {
    if (!file) return;
    const link = document.createElement("a");
    link.href = file.url; link.download = file.orig_name; link.click();
}"""


def load_page(
    checkpoint: str,
    *,
    revision: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    title: str | None = None,
) -> gr.Blocks:
    """
    Load a detector and build its page.

    Args:
        checkpoint (`str`): Folder or Hub id, also of an adapter.
        revision (`str`, *optional*): Of the Hub id.
        device (`str`, *optional*): Where the model runs; by default a GPU if there is one.
        trust_remote_code (`bool`): Whether to run the code that lies beside the weights instead of this package's.
        title (`str`, *optional*): By default the name of the checkpoint.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: It is no detector of this package.
    """
    model = load_detector(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
    image_processor = load_image_processor(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    is_local = Path(checkpoint).is_dir()
    return build_page(
        model.to(device).eval(),
        image_processor,
        title=title or (Path(checkpoint).resolve().name if is_local else checkpoint),
        threshold=chosen_threshold(_read(checkpoint, "model_card.json", revision)),
        card=_read(checkpoint, "README.md", revision) if is_local else None,
        card_address=None if is_local else f"https://huggingface.co/{checkpoint}",
    )


def chosen_threshold(card_data: str | None) -> float:
    """The confidence threshold that was chosen on validation data, from the card's saved state; or the usual one."""
    try:
        card = json.loads(card_data or "{}")
        threshold, split = card.get("threshold"), card.get("threshold_split")
    except (ValueError, AttributeError):  # someone else's file of that name
        return DEFAULT_THRESHOLD
    is_chosen = split is not None and isinstance(threshold, float) and 0 <= threshold < 1
    return round(max(threshold, MIN_THRESHOLD), 2) if is_chosen else DEFAULT_THRESHOLD


def build_page(
    model: Any,
    image_processor: Any,
    *,
    title: str,
    threshold: float = DEFAULT_THRESHOLD,
    card: str | None = None,
    card_address: str | None = None,
) -> gr.Blocks:
    """
    The page of a detector that is loaded. It asks nothing of the network.

    Args:
        model ([`DiTForObjectDetection`]): In eval mode.
        image_processor ([`DiTDetectionImageProcessor`]): Of the model.
        title (`str`): Heading.
        threshold (`float`): The first one; scores are above it.
        card (`str`, *optional*): The model card, Markdown, to be shown in the page.
        card_address (`str`, *optional*): Where the card is on the web, to be linked to.
    """
    handlers = DemoHandlers(model, image_processor)
    classes = [(name, label) for label, name in enumerate(handlers.class_names)]
    # Uploads and pictures are removed after six hours.
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 6 * 3600)) as page:
        visit, index = gr.State(Visit()), gr.State(0)
        link = f" [Model card]({card_address})" if card_address else ""
        gr.Markdown(f"# {title}\n{_HELP}{link}")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                with gr.Tab("Images"):
                    files = gr.File(file_count="multiple", show_label=False, height=150, elem_id="files")
                with gr.Tab("Folder"):
                    folder = gr.File(file_count="directory", show_label=False, height=150, elem_id="folder")
                with gr.Tab("Webcam"):
                    webcam = gr.Image(sources=["webcam"], type="filepath", show_label=False, elem_id="webcam")
                choice = [
                    _slider("Confidence threshold", MIN_THRESHOLD, 0.99, threshold, "Scores are above it"),
                    _slider(
                        "NMS threshold", 0, 1, image_processor.nms_threshold, "Boxes of a class may overlap so far"
                    ),
                    gr.CheckboxGroup(
                        classes,
                        value=[label for _, label in classes],
                        show_select_all=len(classes) > 3,
                        label="Classes",
                        elem_id="classes",
                    ),
                ]
                summary = gr.HTML(NO_IMAGE_YET, elem_id="summary")
                with gr.Row():
                    buttons = {
                        format: gr.Button(f"Save {name}", size="sm", min_width=80, elem_id=f"save-{format}")
                        for format, name in _FORMATS.items()
                    }
                saved = gr.File(visible=False)
            with gr.Column(scale=2, min_width=480):
                picture = gr.Image(
                    format="jpeg",
                    interactive=False,
                    show_label=False,
                    buttons=["download", "fullscreen"],
                    elem_id="picture",
                )
                gallery = gr.Gallery(
                    visible=False,
                    format="jpeg",
                    columns=5,
                    height=175,
                    fit_columns=False,
                    allow_preview=False,
                    show_label=False,
                    buttons=[],
                    elem_id="gallery",
                )
                table = gr.Dataframe(
                    headers=list(_COLUMNS),
                    datatype=list(_COLUMNS.values()),  # type: ignore[arg-type]
                    interactive=False,
                    max_height=320,
                    label="Objects, best first; corners in pixels",
                    elem_id="table",
                )
        if card:
            with gr.Accordion("Model card", open=False):
                gr.Markdown(without_pictures(card))

        shown: dict[str, Any] = {
            "fn": handlers.show,
            "inputs": [visit, index, *choice],
            "outputs": [picture, summary, table],
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        for source in (files, folder, webcam):
            source.change(
                handlers.see,
                [source, visit],
                [visit, index, gallery],
                show_progress_on=picture,
                concurrency_limit=1,
                concurrency_id="model",  # visitors take turns
                api_visibility="private",
            ).success(**shown)
        gallery.select(handlers.choose, None, index, show_progress="hidden", api_visibility="private").success(**shown)
        # While a slider is dragged, only its latest place counts.
        changes = [part.change for part in choice]  # type: ignore[attr-defined]
        gr.on(changes, trigger_mode="always_last", concurrency_limit=4, **shown)
        for format, button in buttons.items():
            button.click(partial(handlers.save, format), [visit, *choice], saved, api_visibility="private").success(
                None, saved, None, js=_SAVE_FILE
            )
    return page


def launch(page: gr.Blocks, **options: Any) -> None:
    """Serve the page until interrupted; `options` are those of `gradio.Blocks.launch`."""
    page.launch(
        theme=gr.themes.Default(primary_hue="blue"),
        css=_CSS,
        max_file_size="100mb",
        ssr_mode=False,
        footer_links=[],
        **options,
    )


def without_pictures(card: str) -> str:
    """A card's Markdown without front matter and pictures, which the page would have to load from elsewhere."""
    text = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    # With the address behind it, or with the name of one that stands elsewhere; brackets in the text are escaped.
    picture = r"!\[(?:\\.|[^\]\\])*\](?:\([^)]*\)|\[[^\]]*\])?|<img\b[^>]*>"
    return re.sub(picture, "", text, flags=re.IGNORECASE)


def _slider(label: str, low: float, high: float, value: float, info: str) -> gr.Slider:
    return gr.Slider(low, high, value, step=0.01, label=label, info=info, elem_id=label.split()[0].lower())


def _read(checkpoint: str, name: str, revision: str | None) -> str | None:
    """A text file beside the weights, or `None`."""
    path = cached_file(
        checkpoint,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if path is None else Path(path).read_text(encoding="utf-8", errors="replace")
