"""The finished cards of this repository are what their saved state makes."""

from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from dit_detection.card.model_card import DetectionModelCardData
from dit_detection.card.training_card import plot_card, write_card

FOLDERS = sorted(path.parent for path in Path(__file__).parents[1].glob("model_cards/*/model_card.json"))
# Another version of matplotlib may draw letters and edges a little differently: mean difference in levels of 255.
TOLERANCE = 4.0


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def test_the_text_is_the_same_to_the_byte(folder, tmp_path):
    write_card(tmp_path, DetectionModelCardData.load(folder / "model_card.json"))
    for name in ("README.md", "model_card.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_plots_are_the_same_to_the_eye(folder):
    data = DetectionModelCardData.load(folder / "model_card.json")
    plots = plot_card(data)
    assert plots
    for field, plot in plots.items():
        with Image.open(folder / getattr(data, field)) as stored:
            # A little more or less room for letters changes the size.
            assert all(abs(a - b) <= 0.05 * a for a, b in zip(stored.size, plot.size, strict=True))
            pixels = np.asarray(stored.convert("RGB"), dtype=float)
        again = np.asarray(plot.resize(pixels.shape[1::-1]), dtype=float)
        assert np.abs(pixels - again).mean() <= TOLERANCE, field


def test_a_card_is_whole(folder):
    data = DetectionModelCardData.load(folder / "model_card.json")
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "object-detection" and card.data.eval_results
    assert data.threshold_split == "validation" and data.metrics_split == "test"
    assert data.command and "resume" not in data.command and data.minutes and data.fingerprints
    for field in ("sample_picture", "worst_picture", "history_picture", "curves_picture", "confusion_picture"):
        name = getattr(data, field)
        assert (folder / name).is_file() and f"({name})" in card.text


def test_the_index_lists_every_card():
    index = Path(__file__).parents[1] / "model_cards" / "README.md"
    text = index.read_text(encoding="utf-8")
    folders = [path.parent.name for path in index.parent.glob("*/README.md")]
    assert folders and all(f"]({name}/README.md)" in text for name in folders)
