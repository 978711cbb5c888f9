import dataclasses
import json
import re

import numpy as np
import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from dit_detection.card.detection_report import ClassReport, DetectionReport
from dit_detection.card.model_card import DetectionModelCardData, create_model_card
from dit_detection.metrics import CocoMetric

CONFIG = {"id2label": {"0": "WBC", "1": "RBC", "2": "Platelets"}, "timestep": 50}

METRICS = {
    **{"map": 0.50612, "map_50": 0.854, "map_75": 0.5, "map_small": -1.0, "map_medium": 0.4, "map_large": 0.6},
    **{"mar_1": 0.2, "mar_10": 0.5, "mar_100": 0.61, "mar_small": -1.0, "mar_medium": 0.5, "mar_large": 0.7},
    **{"map_WBC": 0.812, "map_RBC": 0.205, "map_Platelets": -1.0},
}


REPORT = DetectionReport(
    threshold=0.37,
    classes=[
        ClassReport("WBC", 71, 70, 5, 0.972, [1.0, 0.972]),
        ClassReport("RBC", 805, 600, 200, 0.85, [1.0, 0.85]),
        ClassReport("Platelets", 0, 0, 0),
    ],
    confusion=[[0, 0, 70], [1, 1, 600], [3, 1, 200], [1, 3, 205]],
)


def full_data(**changes):
    data = {
        "model_name": "dit-bccd",
        "config": CONFIG,
        "repo_id": "someone/dit-bccd",
        "base_model": "facebook/DiT-XL-2-256",
        "dataset_name": "BCCD",
        "dataset_id": "someone/bccd",
        "fingerprints": {"train": "a1b2c3", "test": "d4e5f6"},
        "split_sizes": {"train": 205, "test": 72},
        "class_counts": {"train": {"WBC": 214, "RBC": 2381, "Platelets": 9}, "test": {"WBC": 71, "RBC": 805}},
        "metrics": METRICS,
        "threshold": 0.37,
        "threshold_split": "validation",
        "report": REPORT,
        "command": "dit-detect train --data bccd",
        "seed": 0,
        "minutes": 15.25,
        "hardware": "1 H100",
        "versions": {"torch": "2.15.0", "transformers": "5.23.0"},
        "hyperparameters": {"learning_rate": 1e-4},
        "history": [{"epoch": 1.0, "loss": 2.0}],
        "sample_picture": "sample.png",
        "worst_picture": "worst.png",
        "curves_picture": "curves.png",
        "confusion_picture": "confusion.png",
        "history_picture": "history.png",
        "limits": ["Many red cells of the test split are not annotated."],
    }
    return DetectionModelCardData(**data | changes)


def headings(card):
    return [line for line in card.text.splitlines() if line.startswith("#") and not line.startswith("# ")]


def test_full_card_round_trips():
    card = create_model_card(full_data())
    again = ModelCard(str(card))
    assert str(again) == str(card)
    assert again.data.to_dict() == card.data.to_dict()
    assert ModelCardData(**again.data.to_dict()).to_dict() == card.data.to_dict()
    assert "\n\n\n" not in card.text and "{{" not in card.text and "None" not in card.text


def test_front_matter():
    data = create_model_card(full_data()).data.to_dict()
    index = data.pop("model-index")
    assert data.pop("tags")[:2] == ["dit_detection", "diffusion-transformer"]
    assert data == {
        "base_model": "facebook/DiT-XL-2-256",
        "datasets": ["someone/bccd"],
        "library_name": "transformers",
        "license": "cc-by-nc-4.0",
        "metrics": ["mean_average_precision"],
        "pipeline_tag": "object-detection",
    }
    name, results = model_index_to_eval_results(index)
    assert name == "dit-bccd"
    assert [(result.metric_name, result.metric_value) for result in results] == [
        ("mAP, IoU 0.50 to 0.95", 0.5061),
        ("mAP, IoU 0.50", 0.854),
        ("mAP, IoU 0.75", 0.5),
    ]
    assert {(r.task_type, r.dataset_type, r.dataset_name, r.dataset_split) for r in results} == {
        ("object-detection", "someone/bccd", "BCCD", "test")
    }


def test_text_says_what_happened():
    text = create_model_card(full_data()).text
    first_line = text.strip().splitlines()[0]
    assert "*Diffusion* Transformer" in first_line and "Microsoft's Document Image Transformer" in first_line
    for line in [
        "It was fine-tuned from [facebook/DiT-XL-2-256](https://huggingface.co/facebook/DiT-XL-2-256), whose features "
        "it reads at diffusion timestep 50.",
        "| class | train | test |",
        "| RBC | 2381 | 805 |",
        "| Platelets | 9 | 0 |",
        "On the `test` split of [BCCD](https://huggingface.co/datasets/someone/bccd) (72 images), by COCO's protocol:",
        "| mAP, IoU 0.50 to 0.95 | 0.506 |",
        "| mAR, the best 100 per image and class | 0.610 |",
        "| class | objects | mAP | AP, IoU 0.50 | precision | recall |",
        "| WBC | 71 | 0.812 | 0.972 | 0.933 | 0.986 |",
        "The confidence threshold is **0.37** (chosen on the `validation` split for the highest F1 at IoU 0.50, "
        "counted over the detections of all classes together). Detections above it have, at IoU 0.50, precision "
        "**0.766** and recall **0.765** on the `test` split.",
        "![Precision over recall of each class at IoU 0.50; the dots are at the threshold](curves.png)",
        "![Confusion matrix](confusion.png)",
        "![Worst images of dit-bccd](worst.png)",
        "Without objects in this split, and so without a result: Platelets.",
        "![Detections of dit-bccd](sample.png)",
        "![Loss and mean average precision over the epochs](history.png)",
        "- Fingerprint of the data: train `a1b2c3`, test `d4e5f6` (of all annotations, and of each image's file the "
        "length and the 4096 bytes in its middle)",
        "- Seed: 0",
        "- Duration: 15.2 minutes",
        "- Versions: torch 2.15.0, transformers 5.23.0",
        "dit-detect train --data bccd",
        "| learning_rate | 0.0001 |",
        "- Classes with few training objects: Platelets (9).",
        "- The results rest on 72 images: small differences between models mean little.",
        "- Many red cells of the test split are not annotated.",
    ]:
        assert line in text.splitlines(), line
    assert "small objects" not in text  # undefined on this split
    assert "2212.09748" in text


def code_blocks(text):
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    for block in blocks:
        compile(block, "card", "exec")
    return blocks


def test_usage_is_code_that_compiles_and_names_the_model():
    three_lines, by_hand, with_package = code_blocks(create_model_card(full_data()).text)
    for block in (three_lines, by_hand):
        assert '"someone/dit-bccd"' in block and "trust_remote_code=True" in block and "revision=" in block
    assert "trust_remote_code" not in with_package and "from dit_detection import" in with_package
    assert 'pipeline("object-detection"' in three_lines
    assert all("threshold=0.37" in block for block in (three_lines, by_hand, with_package))


def test_without_the_code_beside_it_only_the_package_can_use_it():
    text = create_model_card(full_data(has_code=False)).text
    assert len(code_blocks(text)) == 1 and "trust_remote_code" not in text


def test_an_adapter_names_its_base():
    card = create_model_card(full_data(adapter_of="someone/base", license="mit", tags=["lora"]))
    data = card.data.to_dict()
    assert (data["library_name"], data["base_model"]) == ("peft", "someone/base")
    assert data["base_model_relation"] == "adapter" and "lora" in data["tags"]
    (block,) = code_blocks(card.text)
    assert "load_detector(name" in block and '"someone/dit-bccd"' in block
    assert "[someone/base](https://huggingface.co/someone/base)" in card.text


def test_a_threshold_that_nobody_chose_is_called_so():
    chosen_here = create_model_card(full_data(threshold_split="test")).text
    assert "which are the better for it" in chosen_here
    not_chosen = create_model_card(full_data(threshold_split=None)).text
    assert "not chosen on data" in not_chosen
    assert "threshold=0.50" in create_model_card(DetectionModelCardData(model_name="tiny", config=CONFIG)).text


NASTY = [
    "a|b",
    "*bold* `code`",
    "<b>&amp;</b>",
    "$x$ ~~y~~",
    "_private_",
    "[link](x)",
    'quote"\\',
    "two\nlines",
    "\N{SNOWMAN}\U0001f600",
    "x" * 300,
    "{{ config }}",
    "- item",
]


def test_names_of_classes_and_models_stay_what_they_are():
    names = dict(enumerate(NASTY))
    data = full_data(
        config={"id2label": names, "timestep": None},
        model_name='a|b"c',
        repo_id=None,
        command="train ```x```",
        dataset_name="<script>",
        metrics={"map": 0.5, **{f"map_{name}": 0.25 for name in NASTY}},
        class_counts={"test": dict.fromkeys(NASTY, 3)},
        report=DetectionReport(0.37, [ClassReport(name, 3, 1, 1, 0.5, [0.5]) for name in NASTY], [[0, 0, 12]]),
    )
    card = create_model_card(data)
    rows = [line for line in card.text.splitlines() if line.startswith("| ") and line.endswith("| 0.500 | 0.333 |")]
    assert len(rows) == len(NASTY)
    for row, name in zip(rows, NASTY, strict=True):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)][1:-1]
        assert len(cells) == 6
        assert re.sub(r"\\([\W_])", r"\1", cells[0]) == " ".join(name.split())
    assert "<script>" not in card.text.replace("\\<script\\>", "")
    assert len(code_blocks(card.text)) == 3 and "````bash" in card.text
    assert str(ModelCard(str(card))) == str(card)


def test_saved_state_makes_the_same_card(tmp_path):
    for number, data in enumerate(
        [
            full_data(),
            full_data(base_model=str(tmp_path / "DiT-XL-2-256" / "transformer")),
            DetectionModelCardData(model_name="t", config=CONFIG),
            full_data(metrics={"map": np.float32(0.5)}, hyperparameters={"path": tmp_path}),
        ]
    ):
        path = tmp_path / f"{number}.json"
        data.save(path)
        again = DetectionModelCardData.load(path)
        assert str(create_model_card(again)) == str(create_model_card(data))
        assert again.report == data.report
        again.save(tmp_path / "again.json")
        assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_saved_state_keeps_every_field_and_strings_as_they_are(tmp_path):
    path = tmp_path / "card.json"
    full_data(limits=["[\n1,\n2]", "[ 1,  2 ]"]).save(path)
    values = json.loads(path.read_text())
    assert set(values) == {field.name for field in dataclasses.fields(DetectionModelCardData)}
    assert values["limits"] == ["[\n1,\n2]", "[ 1,  2 ]"]
    assert "[ 1.0, 0.972 ]" in path.read_text()
    path.write_text('{"model_name": 1}')
    with pytest.raises(ValueError, match=r"card\.json is not the saved state of a model card"):
        DetectionModelCardData.load(path)


def test_sections_without_data_are_left_out():
    card = create_model_card(DetectionModelCardData(model_name="tiny", config=CONFIG))
    assert headings(card) == ["## What it detects", "## How to use it", "## Limits", "## Citation"]
    assert "WBC, RBC, Platelets." in card.text
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert "None" not in str(card) and "\n\n\n" not in card.text
    assert str(ModelCard(str(card))) == str(card)
    assert headings(create_model_card(full_data())) == [
        *("## What it detects", "## Results", "## Sample", "## How it was trained", "## How to use it"),
        *("## Limits", "## Licence", "## Citation"),
    ]


@pytest.mark.parametrize(
    ("given", "section", "shown"),
    [
        ({"metrics": METRICS}, "## Results", "On the `test` split, by COCO's protocol:"),
        ({"metrics": METRICS}, "## Results", "| class | mAP |"),
        ({"seed": 0}, "## How it was trained", "- Seed: 0"),
        ({"command": "python train.py"}, "## How it was trained", "python train.py"),
        ({"history_picture": "h.png"}, "## How it was trained", "(h.png)"),
        ({"worst_picture": "w.png"}, "## Sample", "(w.png)"),
        ({"sample_picture": "s.png"}, "## Sample", "(s.png)"),
        ({"license": "mit"}, "## Licence", "The weights are under `mit`"),
    ],
)
def test_each_fact_alone_makes_its_section(given, section, shown):
    card = create_model_card(DetectionModelCardData(model_name="tiny", config=CONFIG, **given))
    assert section in headings(card) and len(headings(card)) == 5
    assert shown in card.text and "\n\n\n" not in card.text
    # A model index needs a dataset to speak of.
    assert "model-index" not in card.data.to_dict()


@pytest.mark.parametrize(
    ("base_model", "given", "expected"),
    [
        ("facebook/DiT-XL-2-256", None, "cc-by-nc-4.0"),
        ("facebook/DiT-XL-2-512", "mit", "cc-by-nc-4.0"),
        ("checkpoints/DiT-XL-2-256x256.pt", "mit", "cc-by-nc-4.0"),
        ("someone/other-dit", "mit", "mit"),
        ("someone/other-dit", None, None),
        (None, "apache-2.0", "apache-2.0"),
    ],
)
def test_licence_of_the_published_weights_is_inherited(base_model, given, expected):
    card = create_model_card(full_data(base_model=base_model, license=given))
    assert card.data.to_dict().get("license") == expected
    assert ("no commercial use" in card.text) == (expected == "cc-by-nc-4.0")
    assert ("## Licence" in card.text) == (expected is not None)


def test_local_checkpoint_shows_its_name_but_not_its_place(tmp_path):
    folder = tmp_path / "my-dit"
    folder.mkdir()
    card = create_model_card(full_data(base_model=str(folder)))
    assert "fine-tuned from `my-dit`" in card.text
    assert str(tmp_path) not in str(card) and "base_model" not in card.data.to_dict()


def test_the_folder_that_one_is_in_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "my-detector").mkdir()
    monkeypatch.chdir(tmp_path / "my-detector")
    assert full_data(adapter_of=".").adapter_of == "my-detector"
    assert full_data(adapter_of="../..").adapter_of == tmp_path.parent.name
    (tmp_path / "DiT-XL-2-256-pets").mkdir()
    monkeypatch.chdir(tmp_path / "DiT-XL-2-256-pets")
    own = full_data(base_model="small-dit")
    assert (own.base_model, own.license) == ("small-dit", None)  # whatever folder we are in


def test_names_of_splits_stay_in_their_cells():
    card = create_model_card(full_data(class_counts={"day|night": {"WBC": 3}}, split_sizes={}))
    assert r"| class | day\|night |" in card.text


def test_dataset_without_a_hub_id_still_has_a_model_index():
    card = create_model_card(full_data(dataset_id=None, dataset_name="Blood Cells (BCCD)"))
    (result,) = card.data.to_dict()["model-index"][0]["results"]
    assert result["dataset"] == {"name": "Blood Cells (BCCD)", "type": "blood-cells-bccd", "split": "test"}
    assert "datasets" not in card.data.to_dict()


def test_results_on_the_training_split_are_called_so():
    card = create_model_card(full_data(metrics_split="train"))
    assert "measured on the training images" in card.text


def test_classes_named_like_a_metric_get_their_own_results(tmp_path):
    id2label = {0: "50", 1: "small", 2: "a|b"}
    metric = CocoMetric(id2label, cache_dir=str(tmp_path))
    box = np.array([[0.0, 0.0, 200.0, 200.0]])
    found = {"image_id": 1, "scores": [0.9, 0.8], "labels": [0, 2], "boxes": box.repeat(2, axis=0)}
    truth = {"image_id": 1, "labels": [0, 1, 2], "boxes": box.repeat(3, axis=0)}
    metrics = metric.compute(predictions=[found], references=[truth])
    text = create_model_card(
        DetectionModelCardData(model_name="tiny", config={"id2label": id2label}, metrics=metrics)
    ).text
    for line in ["| 50 | 1.000 |", "| small | 0.000 |", "| a\\|b | 1.000 |", "| mAP, IoU 0.50 | 0.667 |"]:
        assert line in text.splitlines()
    assert "mAP, small objects" not in text


def test_metrics_with_a_prefix_are_refused():
    with pytest.raises(ValueError, match="Remove a prefix such as 'eval_'"):
        create_model_card(full_data(metrics={f"eval_{key}": value for key, value in METRICS.items()}))
