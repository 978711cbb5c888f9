import itertools
import json
import re
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tiny_training
import torch
from huggingface_hub import ModelCard
from tiny_training import label_fields

from dit_detection import (
    DetectionDataset,
    DetectionIterableDataset,
)
from dit_detection.card.detection_report import ImageDetections, report_detections
from dit_detection.card.model_card import DetectionModelCardData
from dit_detection.card.training_card import Evaluation, Evaluations, hardware_of, held_out_of
from dit_detection.data import draw_shapes_dataset
from dit_detection.data.fingerprint import count_objects, fingerprint_of

PICTURES = {
    "predictions.jpg",
    "worst_predictions.jpg",
    "history.png",
    "precision_recall.png",
    "confusion_matrix.png",
}


@pytest.fixture(scope="module")
def dataset():
    return draw_shapes_dataset(4, 3, 5, image_size=64)


@pytest.fixture
def make_trainer(tiny_model, dataset, tmp_path):
    def make(model=None, more=None, **arguments):
        arguments = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **arguments}
        model = model or tiny_model(**label_fields(dataset))
        return tiny_training.make_trainer(model, dataset, tmp_path, more, **arguments)

    return make


def inputs(trainer, rows):
    kind = DetectionDataset if isinstance(rows, datasets.Dataset) else DetectionIterableDataset
    return kind(rows, trainer.processing_class)


def saved(folder):
    return DetectionModelCardData.load(folder / "model_card.json")


@pytest.mark.slow
def test_the_trainer_alone_writes_the_whole_card(make_trainer, dataset, tmp_path):
    trainer = make_trainer()
    trainer.train()
    metrics = trainer.evaluate(inputs(trainer, dataset["test"]), metric_key_prefix="test")
    trainer.create_model_card()
    assert {path.name for path in tmp_path.iterdir()} >= PICTURES - {"precision_recall.png"}
    data = saved(tmp_path)
    assert data.split_sizes == {"train": 4, "validation": 3, "test": 5}
    assert data.class_counts == {split: count_objects(rows) for split, rows in dataset.items()}
    assert data.fingerprints == {split: fingerprint_of(rows) for split, rows in dataset.items()}
    assert (data.metrics_split, data.metrics["map"]) == ("test", metrics["test_map"])
    assert data.hyperparameters["frozen blocks"] == "0 of 2"
    assert data.seed == 42 and data.minutes >= 0 and data.hardware
    assert [one.objects for one in data.report.classes] == list(data.class_counts["test"].values())
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results[0].metric_value == round(metrics["test_map"], 4)
    for name in PICTURES:
        assert (name in card.text) == (tmp_path / name).is_file()


@pytest.mark.slow
def test_the_threshold_is_chosen_by_what_the_best_weights_find_in_the_validation_images(
    make_trainer, dataset, tmp_path, monkeypatch
):
    chosen = []

    def choose(images, id2label):
        chosen.append(images)
        return 0.25

    monkeypatch.setattr("dit_detection.card.training_card.choose_threshold", choose)
    trainer = make_trainer(num_train_epochs=3)
    trainer.train()
    trainer.evaluate(inputs(trainer, dataset["test"]), metric_key_prefix="test")
    trainer.create_model_card()
    # The same weights once more, evaluated by themselves.
    again = make_trainer(trainer.model)
    again.evaluate()
    again.create_model_card()
    remembered, expected = chosen
    assert [image.image_id for image in remembered] == sorted(dataset["validation"]["image_id"])
    for one, other in zip(remembered, expected, strict=True):
        np.testing.assert_allclose(one.found, other.found, atol=1e-4)
        np.testing.assert_array_equal(one.expected, other.expected)
    assert saved(tmp_path).threshold == 0.25 and saved(tmp_path).threshold_split == "validation"


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_takes_no_step_and_tells_the_same(make_trainer, dataset, tmp_path):
    def finish(**arguments):
        trainer = make_trainer()
        trainer.train(**arguments)
        metrics = trainer.evaluate(inputs(trainer, dataset["test"]), metric_key_prefix="test")
        trainer.create_model_card()
        return trainer, metrics, saved(tmp_path)

    first, first_metrics, before = finish()
    assert first.state.best_global_step == 2  # neither epoch finds anything: the first stays the best
    # As if it had taken long.
    checkpoint = tmp_path / "checkpoint-4"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["log_history"][-1]["minutes"] = 77.0
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "SHA256SUMS").unlink()  # or it would not be taken for whole
    (tmp_path / "README.md").unlink()
    second, second_metrics, after = finish(resume_from_checkpoint=str(checkpoint))
    assert second.state.global_step == first.state.global_step == 4
    assert second_metrics["test_map"] == pytest.approx(first_metrics["test_map"], abs=1e-6)
    assert second_metrics["test_loss"] == pytest.approx(first_metrics["test_loss"], rel=1e-5)
    assert after.minutes == 77
    assert after.report == before.report and after.threshold_split == before.threshold_split
    assert after.history == before.history
    assert (tmp_path / "README.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, {"epochs": 2}),
        ({"max_steps": 3}, {"steps": 3}),
        ({"early_stopping_patience": 1}, {"epochs at most": 2}),
    ],
)
def test_the_card_tells_the_length_that_was_asked_for(make_trainer, tmp_path, arguments, told):
    trainer = make_trainer(**arguments)
    trainer.state.global_step = 1  # as if it had been trained
    trainer.create_model_card()
    facts = saved(tmp_path).hyperparameters
    assert {name: value for name, value in facts.items() if "epochs" in name or "steps" in name} == told


def test_classes_may_be_called_as_they_like(make_trainer, capsys):
    """transformers takes what holds "_mem_" for bytes, and "_runtime" for seconds."""
    metrics = {"test_map_mem_card": 0.25, "test_map_a_mem_b": -1.0, "test_map_x_runtime": 0.51234, "test_runtime": 3.0}
    make_trainer().log_metrics("test", metrics)
    printed = capsys.readouterr().out
    assert printed.splitlines() == [
        "***** test metrics *****",
        "  test_map_a_mem_b   = -1.0000",
        "  test_map_mem_card  =  0.2500",
        "  test_map_x_runtime =  0.5123",
        "  test_runtime       =  3.0000",
    ]


@pytest.mark.parametrize(
    ("device", "world_size", "expected"),
    [
        ("cuda", 1, "1 x H200"),  # of 16, as training takes one for each process
        ("cuda", 4, "4 x H200"),
        ("cpu", 2, r"\w+ CPU, \d+ threads?, 2 processes"),
        ("mps", 1, r"\w+ mps"),
    ],
)
def test_the_hardware_is_what_was_used(monkeypatch, device, world_size, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 16)
    args = SimpleNamespace(device=torch.device(device), world_size=world_size)
    assert re.fullmatch(expected, hardware_of(args))


def test_minutes_are_those_since_the_start(make_trainer, monkeypatch):
    clock = itertools.count(0, 60)  # a minute passes from look to look
    monkeypatch.setattr("dit_detection.training.card_trainer.time", SimpleNamespace(monotonic=lambda: next(clock)))
    trainer = make_trainer(num_train_epochs=3, eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
    trainer.train()
    assert [entry["minutes"] for entry in trainer.state.log_history] == [1, 2, 3, 4]  # three epochs, and the end
    trainer.evaluate()
    assert "minutes" not in trainer.state.log_history[-1]


def test_without_validation_the_threshold_is_not_chosen(make_trainer, dataset, tmp_path):
    trainer = make_trainer(eval_strategy="no", save_strategy="no", load_best_model_at_end=False, num_train_epochs=1)
    trainer.train()
    trainer.evaluate(inputs(trainer, dataset["test"]), metric_key_prefix="test")
    trainer.create_model_card()
    data = saved(tmp_path)
    assert (data.threshold, data.threshold_split) == (0.5, None)
    assert "not chosen on data" in (tmp_path / "README.md").read_text()


def test_without_any_evaluation_there_are_no_results(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.create_model_card(model_name="untrained")
    card = (tmp_path / "README.md").read_text()
    assert "## Results" not in card and "## Sample" not in card and "**untrained**" in card
    assert not any((tmp_path / name).exists() for name in PICTURES)


def test_streamed_splits_are_counted_by_what_came_through(make_trainer, dataset, tmp_path):
    trainer = make_trainer()
    trainer.evaluate(inputs(trainer, dataset["test"].to_iterable_dataset()), metric_key_prefix="test")
    trainer.create_model_card(dataset_name="a stream")
    data = saved(tmp_path)
    assert data.split_sizes["test"] == 5 and data.class_counts["test"] == count_objects(dataset["test"])
    # Nothing was trained: how the detector was, and on what, is not known.
    assert not data.fingerprints and set(data.split_sizes) == {"test"}
    assert not data.hyperparameters and (data.seed, data.hardware, data.versions) == (None, None, {})
    card = (tmp_path / "README.md").read_text()
    assert "## What it was measured on" in card and "How it was trained" not in card
    assert (tmp_path / "predictions.jpg").is_file()


def test_metrics_of_the_user_are_told_without_a_report(make_trainer, dataset, tmp_path):
    calls = []

    def compute_metrics(prediction):
        calls.append(prediction)
        return {"map": 0.5, "of_mine": 1.0}

    trainer = make_trainer(more={"compute_metrics": compute_metrics})
    trainer.train()
    trainer.evaluate(inputs(trainer, dataset["test"].to_iterable_dataset()), metric_key_prefix="test")
    assert len(calls) == 3  # two epochs, and the test
    trainer.create_model_card(dataset_name="a stream")
    data = saved(tmp_path)
    assert (data.metrics, data.metrics_split, data.report) == ({"map": 0.5}, "test", None)
    card = (tmp_path / "README.md").read_text()
    assert "Without objects" not in card and "recall" not in card and "None" not in card


@pytest.mark.slow  # accelerate collects garbage
def test_the_batch_size_that_was_found_is_told(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(
        auto_find_batch_size=True,
        per_device_train_batch_size=4,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
    )
    forward = trainer.model.forward

    def too_large(pixel_values, **kwargs):
        if len(pixel_values) > 2:
            raise RuntimeError("CUDA out of memory.")
        return forward(pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(trainer.model, "forward", too_large)
    trainer.train()
    trainer.create_model_card()
    assert trainer._train_batch_size < 4
    assert saved(tmp_path).hyperparameters["images per step"] == trainer._train_batch_size


def test_a_split_without_objects_has_a_card(make_trainer, dataset, tmp_path):
    def without_objects(row):
        return {"objects": {name: [] for name in row["objects"]}}

    empty = dataset["test"].map(without_objects, features=dataset["test"].features)
    trainer = make_trainer()
    trainer.evaluate(inputs(trainer, empty), metric_key_prefix="test")
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "and so without a result" in card and "None" not in card
    assert not (tmp_path / "precision_recall.png").exists()


def test_what_is_remembered_of_the_evaluations():
    def evaluation(prefix, step):
        return Evaluation(prefix, step, {}, [], None)

    kept = Evaluations()
    for step, best in ((10, None), (20, 10), (30, 10), (40, 30)):
        kept.add(evaluation("eval", step), best)
    assert [step for step in (10, 20, 30, 40) if kept.of(step)] == [30, 40]
    kept.add(evaluation("test", 30), 30)
    kept.add(evaluation("test", 30), 30)
    assert list(kept.of(30)) == ["eval", "test"]
    assert held_out_of(kept.of(30)).split == "test" and held_out_of(kept.of(40)).split == "validation"
    kept.add(evaluation("train", 30), 30)
    assert held_out_of(kept.of(30)).split == "test"
    assert held_out_of({}) is None


def test_an_image_that_comes_twice_counts_once(make_trainer):
    trainer = make_trainer()
    once, twice = (ImageDetections(1, np.zeros((count, 6)), np.zeros((0, 7))) for count in (1, 2))
    trainer.remember_images([ImageDetections(2, np.zeros((0, 6)), np.zeros((0, 7))), once, twice])
    assert [(image.image_id, len(image.found)) for image in trainer._images] == [(1, 1), (2, 0)]


def test_fingerprints(dataset, tmp_path):
    rows = dataset["train"]
    name = fingerprint_of(rows)
    assert len(name) == 16 and name == fingerprint_of(rows) and name != fingerprint_of(rows.select([1, 0, 2, 3]))
    files = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        encoded = rows.cast_column("image", datasets.Image(decode=False))["image"]
        paths = [folder / f"{index}.png" for index in range(len(rows))]
        for path, image in zip(paths, encoded, strict=True):
            path.write_bytes(image["bytes"])
        columns = {**rows.remove_columns("image").to_dict(), "image": [str(path) for path in paths]}
        files.append(datasets.Dataset.from_dict(columns, features=rows.features))
    assert fingerprint_of(files[0]) == fingerprint_of(files[1]) == name
    content = bytearray((tmp_path / "b" / "2.png").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "b" / "2.png").write_bytes(content)
    assert fingerprint_of(files[1]) != name

    def moved(row, index):
        row["objects"]["bbox"][0][0] += 1.0 if index == 1 else 0.0
        return row

    assert fingerprint_of(rows.map(moved, with_indices=True)) != name

    def with_crowds(row):
        row["objects"]["iscrowd"] = [1] * len(row["objects"]["iscrowd"])
        return row

    assert sum(count_objects(rows).values()) > 0 == sum(count_objects(rows.map(with_crowds)).values())
    assert count_objects(rows.select([])) == dict.fromkeys(count_objects(rows), 0)
    assert len(fingerprint_of(rows.select([]))) == 16


def test_report_and_evaluation_agree(make_trainer, dataset):
    trainer = make_trainer()
    trainer.evaluate(inputs(trainer, dataset["test"]), metric_key_prefix="test")
    (evaluation,) = trainer._evaluated().values()
    report, _ = report_detections(evaluation.images, trainer.model.config.id2label, 0.0)
    defined = [one.ap_50 for one in report.classes if one.ap_50 is not None]
    assert np.mean(defined) == pytest.approx(evaluation.metrics["test_map_50"], abs=1e-5)
