import warnings

import numpy as np
import pytest
from PIL import Image

from dit_detection.card.detection_report import ClassReport, DetectionReport, ImageDetections, ImageErrors
from dit_detection.card.report_pictures import (
    MAX_CLASSES,
    caption_of,
    confused_classes,
    draw_images,
    evenly_spaced,
    plot_confusion_matrix,
    plot_precision_recall,
    worst_images,
)
from dit_detection.data import draw_shapes_dataset

NASTY = ["_hidden", "$x_1$", "$ alone", "\N{SNOWMAN}\U0001f600", "two\nlines", "x" * 300, "{a}", r"\frac"]


def report_of(names, confusion=None):
    curve = np.linspace(1, 0.5, 101).tolist()
    classes = [ClassReport(name, 10, 6, 2, 0.75, curve) for name in names]
    return DetectionReport(0.4, classes, confusion or [[label, label, 6] for label in range(len(names))])


@pytest.mark.slow
@pytest.mark.parametrize("names", [["one"], NASTY, [f"class {label}" for label in range(80)]], ids=len)
@pytest.mark.parametrize("plot", [plot_precision_recall, plot_confusion_matrix])
def test_any_names_and_numbers_of_classes_can_be_plotted(names, plot):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture, again = plot(report_of(names)), plot(report_of(names))
    assert picture.mode == "RGB" and not picture.info and max(picture.size) < 2500
    assert picture.tobytes() == again.tobytes()
    # A light background.
    assert np.median(np.asarray(picture)) == 255


def test_names_that_matplotlib_would_hide_are_in_the_legend(monkeypatch):
    monkeypatch.setattr("dit_detection.card.report_pictures.render", lambda figure: figure)
    texts = plot_precision_recall(report_of(["_hidden", "$x$"])).axes[0].get_legend().get_texts()
    assert [(text.get_text(), text.get_parse_math()) for text in texts] == [
        ("_hidden  0.75", False),
        ("$x$  0.75", False),
    ]


def test_a_curve_needs_objects():
    report = DetectionReport(0.5, [ClassReport("a", 0, 0, 0)], [])
    with pytest.raises(ValueError, match="No class of the report has objects"):
        plot_precision_recall(report)
    assert plot_confusion_matrix(report).size[0] > 100


def test_of_many_classes_the_most_confused_are_shown():
    confusion = [[label, label, 50] for label in range(80)]
    confusion += [[label, label + 1, label] for label in range(40, 79)]  # the later, the more
    confusion += [[5, 80, 1000], [80, 6, 1000]]  # missed, and found on the background
    shown = confused_classes(report_of([str(label) for label in range(80)], confusion))
    # A class counts its errors as row and as column: label 78 has 78 + 77 of them, label 79 has 78.
    assert shown == list(range(79 - MAX_CLASSES, 79))
    assert confused_classes(report_of(["a", "b"])) == [0, 1]


def test_worst_and_evenly_spaced_images():
    errors = [
        ImageErrors(1, 5, 0, 0),  # F1 1
        ImageErrors(2, 1, 1, 1),  # 0.5
        ImageErrors(3, 0, 1, 0),  # 0
        ImageErrors(4, 0, 2, 3),  # 0, with more errors
        ImageErrors(5, 2, 2, 2),  # 0.5, with more errors
        ImageErrors(6, 0, 0, 0),  # nothing to find
    ]
    assert worst_images(errors, 3) == [3, 2, 4]
    assert worst_images(errors, 9) == [3, 2, 4, 1]
    assert worst_images(errors[:1], 9) == []
    assert evenly_spaced(errors, 3) == [0, 2, 5]
    assert evenly_spaced(errors, 9) == [0, 1, 2, 3, 4, 5]
    assert evenly_spaced(errors[:1], 4) == [0] and evenly_spaced([], 4) == []
    assert caption_of(errors[1]) == "image 2: 1 right, 1 wrong, 1 missed (F1 0.50)"
    # Never rounded up to the 1 of an image without errors.
    assert caption_of(ImageErrors(7, 1000, 1, 0)).endswith("(F1 0.99)")


@pytest.mark.parametrize("is_stream", [False, True])
def test_images_are_found_by_their_ids_and_cut_at_the_threshold(is_stream):
    rows = draw_shapes_dataset(0, 0, 4, image_size=64)["test"]
    ids = rows["image_id"]
    box = np.array([[8.0, 8.0, 56.0, 56.0, 0.6, 0.0]])
    images = [ImageDetections(ids[2], box, np.zeros((0, 7))), ImageDetections(ids[0], box[:0], np.zeros((0, 7)))]

    def draw(images, threshold):
        source = rows.to_iterable_dataset() if is_stream else rows
        return draw_images(source, images, ["a", "b"], {0: "shape"}, threshold)

    plain = [ImageDetections(image.image_id, box[:0], np.zeros((0, 7))) for image in images]
    assert draw(images, 0.7) == draw(plain, 0.5)
    drawn, bare = (np.asarray(draw(which, 0.5)) for which in (images, plain))
    changed = (drawn != bare).any(axis=(0, 2)).nonzero()[0]
    assert len(changed) and changed.max() < drawn.shape[1] / 2  # the first picture alone
    assert isinstance(draw(images, 0.5), Image.Image)
