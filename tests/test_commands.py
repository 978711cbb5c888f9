import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from annotation_folders import copy_as_voc, copy_as_yolo
from coco_folder import write_images, write_shapes_as_coco
from PIL import Image
from safetensors.torch import load_file
from tiny_training import TINY, label_fields

from dit_detection import DiTDetectionImageProcessor, InvalidDatasetError, cli, id2label_of, load_detection_dataset
from dit_detection.card.model_card import DetectionModelCardData
from dit_detection.commands import evaluate, predict, train
from dit_detection.data import draw_shapes_dataset
from dit_detection.data.transforms import plain_inputs
from dit_detection.small_dit import DETECTORS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def coco_set(tmp_path_factory):
    return write_shapes_as_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def trained(coco_set, tmp_path_factory):
    """A detector after one pass over four images, and the metrics that `train` returned."""
    folder = tmp_path_factory.mktemp("detector")
    metrics = train.main([*TINY, "--dataset", str(coco_set), "--num_train_epochs", "1", "--output_dir", str(folder)])
    return folder, metrics


def test_train_leaves_everything_there_is_to_share(trained):
    folder, metrics = trained
    assert {"test_map", "test_map_50", "test_loss"} <= metrics.keys()
    for name in (
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "modeling_dit_detection.py",
        "README.md",
        "model_card.json",
        "predictions.jpg",
        "worst_predictions.jpg",
        "history.png",
        "confusion_matrix.png",
        "test_results.json",
    ):
        assert (folder / name).is_file(), name
    card = (folder / "README.md").read_text()
    assert "dit-detect train" in card and "circle" in card


def test_evaluate_measures_what_train_reported(trained, coco_set, tmp_path):
    folder, metrics = trained
    target = tmp_path / "metrics.json"
    again = evaluate.main([str(folder), "--dataset", str(coco_set), "--split", "test", "--output", str(target)])
    assert again["test_map"] == pytest.approx(metrics["test_map"], abs=1e-6)
    assert again["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-4)
    assert json.loads(target.read_text())["test_map"] == again["test_map"]


def test_evaluate_refuses_other_classes_and_missing_splits(trained, coco_set, tmp_path, capsys):
    folder, _ = trained
    content = json.loads((coco_set / "annotations_test.json").read_text())
    used = content["annotations"][0]["category_id"]
    next(entry for entry in content["categories"] if entry["id"] == used)["name"] = "disc"
    write_images(tmp_path / "images", tuple(image["file_name"] for image in content["images"]))
    for image in content["images"]:
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / image["file_name"])
    (tmp_path / "annotations_test.json").write_text(json.dumps(content))
    with pytest.raises(InvalidDatasetError, match=r"disc(.|\n)*class_names are here the classes of .*: rename them"):
        evaluate.main([str(folder), "--dataset", str(tmp_path)])
    with pytest.raises(SystemExit):
        evaluate.main([str(folder), "--dataset", str(coco_set), "--split", "tset"])
    assert "train, validation, test" in capsys.readouterr().err


def test_evaluate_minds_the_split_that_it_measures_alone(trained, coco_set, tmp_path):
    folder, metrics = trained
    shutil.copy(coco_set / "annotations_test.json", tmp_path)
    content = json.loads((coco_set / "annotations_train.json").read_text())
    gone = [{**image, "file_name": f"gone-{image['file_name']}"} for image in content["images"]]
    content["categories"][0]["name"] = "disc"
    for annotations in (content["annotations"], []):
        (tmp_path / "annotations_train.json").write_text(
            json.dumps({**content, "images": gone, "annotations": annotations})
        )
        write_images(tmp_path / "images", ())
        for image in json.loads((tmp_path / "annotations_test.json").read_text())["images"]:
            shutil.copy(coco_set / "images" / image["file_name"], tmp_path / "images")
        again = evaluate.main([str(folder), "--dataset", str(tmp_path)])
        assert again["test_map"] == pytest.approx(metrics["test_map"], abs=1e-6)
    with pytest.raises(InvalidDatasetError, match="gone"):
        evaluate.main([str(folder), "--dataset", str(tmp_path), "--split", "train"])


def test_evaluate_reads_classes_in_the_order_of_the_checkpoint(trained, coco_set, tmp_path):
    folder, metrics = trained
    content = json.loads((coco_set / "annotations_test.json").read_text())
    for part, field in (("categories", "id"), ("annotations", "category_id")):
        for entry in content[part]:
            entry[field] = 10 - entry[field]
    (tmp_path / "annotations_test.json").write_text(json.dumps(content))
    (tmp_path / "images").symlink_to(coco_set / "images")
    again = evaluate.main([str(folder), "--dataset", str(tmp_path)])
    assert again["test_map"] == pytest.approx(metrics["test_map"], abs=1e-6)
    assert again["test_map_circle"] == pytest.approx(metrics["test_map_circle"], abs=1e-6)


@pytest.mark.slow
def test_training_from_the_cache_of_frozen_states(coco_set, tmp_path):
    arguments = ["--dataset", str(coco_set), "--num_train_epochs", "2", "--freeze_layers", "-1", "--num_views", "2"]
    results = []
    for name, more in (("plain", []), ("cached", ["--cache_frozen", "--frozen_cache_dir", str(tmp_path / "cache")])):
        metrics = train.main([*TINY, *arguments, *more, "--output_dir", str(tmp_path / name)])
        results.append(metrics)
    assert results[1]["test_loss"] == pytest.approx(results[0]["test_loss"], rel=1e-5)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # of train and of validation


@pytest.mark.slow
def test_training_on_a_stream(coco_set, tmp_path, capsys):
    arguments = ["--dataset", str(coco_set), "--streaming", "--output_dir", str(tmp_path)]
    metrics = train.main([*TINY, *arguments, "--max_steps", "2", "--per_device_train_batch_size", "2"])
    assert "test_map" in metrics and (tmp_path / "predictions.jpg").is_file()
    # A stream is not read twice: no anchors are fitted to it.
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["anchor_sizes"] == DETECTORS["tiny"]["anchor_sizes"]
    for wrong, message in (
        (["--cache_frozen"], "--cache_frozen needs to see all"),
        (["--max_steps", "-1"], "max_steps"),
    ):
        with pytest.raises(SystemExit):
            train.main([*TINY, *arguments, "--max_steps", "2", *wrong])
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_set_aside_from_a_stream_can_be_evaluated_again(tmp_path):
    (tmp_path / "set").mkdir()
    draw_shapes_dataset(12, 0, 0, image_size=64)["train"].to_parquet(tmp_path / "set" / "train.parquet")
    data = ["--dataset", str(tmp_path / "set"), "--streaming", "--validation_fraction", "0.4"]
    options = [*TINY, *data, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    trained = train.main([*options, "--per_device_train_batch_size", "2"])
    again = evaluate.main([str(tmp_path / "out"), *data, "--split", "validation"])
    assert again["validation_loss"] == pytest.approx(trained["validation_loss"], abs=1e-4)
    stored = evaluate.main([str(tmp_path / "out"), *data[:2], *data[3:], "--split", "validation"])
    assert stored["validation_loss"] != pytest.approx(trained["validation_loss"], abs=1e-4)  # of other images


@pytest.mark.slow
@pytest.mark.parametrize("copy", [copy_as_voc, copy_as_yolo])
def test_the_annotation_format_changes_nothing(trained, coco_set, tmp_path, copy):
    metrics = trained[1]
    dataset = load_detection_dataset(coco_set)
    copy(dataset, tmp_path / "copy")
    arguments = ["--dataset", str(tmp_path / "copy"), "--class_names", *id2label_of(dataset).values()]
    again = train.main([*TINY, *arguments, "--num_train_epochs", "1", "--output_dir", str(tmp_path / "detector")])
    assert {name: again[name] for name in metrics if "map" in name} == {
        name: value for name, value in metrics.items() if "map" in name
    }
    assert again["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-5)


def test_predict_writes_boxes_and_pictures(trained, coco_set, tmp_path):
    folder, _ = trained
    Image.new("L", (30, 50), 128).save(tmp_path / "grey.png")
    predict.main(
        [
            str(folder),
            str(coco_set / "images"),
            str(tmp_path / "grey.png"),
            "--output_dir",
            str(tmp_path / "out"),
            "--threshold",
            "0",
            "--batch_size",
            "4",
        ]
    )
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(predictions) == 10 and len(list((tmp_path / "out" / "pictures").glob("*.jpg"))) == 10
    grey = predictions[-1]
    assert (grey["width"], grey["height"]) == (30, 50)
    for found in grey["detections"]:
        left, top, right, bottom = found["box_xyxy"]
        assert 0 <= left <= right <= 30 and 0 <= top <= bottom <= 50


@pytest.mark.slow
def test_a_held_out_file_is_measured_whole(trained, coco_set, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(
        "dit_detection.commands.evaluate.plain_inputs",
        lambda rows, processor: measured.append(len(rows)) or plain_inputs(rows, processor),
    )
    shutil.copytree(coco_set / "images", tmp_path / "images")
    shutil.copy(coco_set / "annotations_test.json", tmp_path / "annotations.json")  # one file, in no split
    options = [str(trained[0]), "--dataset", str(tmp_path)]
    for more, expected in (
        (["--split", "train"], 3),
        (["--split", "train", "--validation_fraction", "0.4"], 2),
        (["--split", "validation"], 1),  # as `dit-detect train` set them aside
    ):
        evaluate.main([*options, *more])
        assert measured.pop() == expected


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder / "nothing", "no file or folder"),
        (lambda folder: folder, "holds no images"),
        (lambda folder: folder / "broken.png", "broken.png is no image"),
    ],
)
def test_predict_names_what_it_cannot_read(trained, tmp_path, capsys, prepare, message):
    source = prepare(tmp_path)
    if source.name == "broken.png":
        source.write_bytes(b"\x89PNG not really")
    with pytest.raises(SystemExit) as error:
        predict.main([str(trained[0]), str(source), "--output_dir", str(tmp_path / "out")])
    assert error.value.code != 0 and message in f"{error.value}{capsys.readouterr().err}"


@pytest.mark.parametrize("name", ["batch_size", "shard_size", "num_workers"])
def test_predict_refuses_numbers_below_the_least(tmp_path, capsys, name):
    with pytest.raises(SystemExit):
        predict.main([str(tmp_path), str(tmp_path), "--output_dir", str(tmp_path / "out"), f"--{name}", "-1"])
    assert f"--{name} is -1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_evaluate_refuses_a_place_for_its_metrics_at_once(trained, coco_set, tmp_path, capsys):
    output = ["--output", str(tmp_path / "none" / "metrics.json")]
    with pytest.raises(SystemExit):
        evaluate.main([str(trained[0]), "--dataset", str(coco_set), *output])
    printed = capsys.readouterr()
    assert "there is no folder" in printed.err and "metrics *****" not in printed.out


@pytest.mark.slow
def test_resumes_from_the_last_checkpoint(coco_set, tmp_path):
    job = [*TINY, "--dataset", str(coco_set), "--output_dir", str(tmp_path), "--num_train_epochs", "1"]
    train.main(job)
    job[-1] = "2"
    metrics = train.main([*job, "--resume_from_checkpoint", "last"])
    assert (tmp_path / "checkpoint-2").is_dir()
    assert metrics["test_map"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", [True, False])
def test_no_evaluation_costs_the_detector(coco_set, tmp_path, fault):
    """Of a split that nobody has looked at before; nor is what is evaluated in 16 bits saved so."""
    data = shutil.copytree(coco_set, tmp_path / "data")
    if fault:  # the header of a photograph is whole, and so the check of the data finds nothing
        annotations = json.loads((data / "annotations_test.json").read_text())
        first = annotations["images"][0]
        drawn = Image.effect_noise((first["width"], first["height"]), 100).convert("RGB")
        first["file_name"] = "cut.jpg"
        (data / "annotations_test.json").write_text(json.dumps(annotations))
        drawn.save(data / "images" / "cut.jpg")
        os.truncate(data / "images" / "cut.jpg", (data / "images" / "cut.jpg").stat().st_size - 1000)
    out = tmp_path / "out"
    job = [*TINY, "--dataset", str(data), "--num_train_epochs", "1", "--output_dir", str(out), "--bf16_full_eval"]
    job += ["True", "--save_strategy", "no", "--load_best_model_at_end", "False"]
    with pytest.raises(ValueError, match="truncated") if fault else nullcontext():
        train.main(job)
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {torch.float32}
    assert (out / "README.md").is_file() != fault


@pytest.mark.slow
def test_a_test_split_without_objects_is_no_result(coco_set, tmp_path, caplog):
    """Its annotations are often held back."""
    data = shutil.copytree(coco_set, tmp_path / "data")
    annotations = json.loads((data / "annotations_test.json").read_text())
    (data / "annotations_test.json").write_text(json.dumps(annotations | {"annotations": []}))
    out = tmp_path / "out"
    metrics = train.main([*TINY, "--dataset", str(data), "--num_train_epochs", "1", "--output_dir", str(out)])
    assert "No image of the test split has an object" in caplog.text
    assert metrics["validation_map"] >= 0 and (out / "validation_results.json").is_file()
    assert not (out / "test_results.json").exists()
    card = (out / "README.md").read_text()
    assert "On the `validation` split of data (" in card and "`test` split" not in card


def test_a_finished_run_writes_its_card_again(trained, coco_set, tmp_path):
    folder, metrics = trained
    copy = tmp_path / folder.name  # the card's title
    shutil.copytree(folder, copy)
    before = DetectionModelCardData.load(folder / "model_card.json")
    (copy / "README.md").unlink()
    job = [*TINY, "--dataset", str(coco_set), "--num_train_epochs", "1", "--output_dir", str(copy)]
    again = train.main([*job, "--resume_from_checkpoint=last"])
    for name in ("test_map", "test_map_50"):
        assert again[name] == pytest.approx(metrics[name], abs=1e-6)
    after = DetectionModelCardData.load(copy / "model_card.json")
    assert after.report == before.report and after.fingerprints == before.fingerprints
    # The minutes of a run that goes on are those of its checkpoint.
    [checkpoint] = copy.glob("checkpoint-*")
    assert after.minutes >= json.loads((checkpoint / "trainer_state.json").read_text())["log_history"][-1]["minutes"]
    card = (copy / "README.md").read_text()
    assert "resume" not in card and f"--num_train_epochs 1 --output_dir {copy}" in card
    steps = [json.loads((where / "trainer_state.json").read_text())["global_step"] for where in (folder, copy)]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("script", ["train", "evaluate", "predict", "convert_dit", "check", "preview", "export"])
def test_scripts_say_how_they_are_run(script):
    text = (ROOT / "scripts" / f"{script}.py").read_text()
    assert text.count(f"scripts/{script}.py") == 2
    assert "sys.path.pop(0)" in text


def test_the_console_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dit-detect", "--help"])
    cli.main()
    printed = capsys.readouterr().out
    assert all(command in printed for command in cli.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["dit-detect", "trian"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "'trian'" in capsys.readouterr().err


def test_bad_data_end_the_console_command_with_the_report_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dit-detect", "train", "--dataset", str(tmp_path), "--use_cpu"])
    with pytest.raises(SystemExit, match=r"(?s)^dit-detect train: .* holds no annotations that are known"):
        cli.main()


def test_the_readme_runs_what_ci_runs():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert "uv run pytest" in readme and "\nuv run pytest\n" in ci
    assert "uv run scripts/train.py" in readme


@pytest.mark.alone
def test_the_embedded_job_reaches_its_map(tmp_path):
    """As a newcomer runs it: the script, without arguments, in a folder of its own."""
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "facebook/DiT-XL-2-256" in run.stdout + run.stderr
    config = json.loads((tmp_path / "outputs" / "config.json").read_text())
    assert config["base_model"] == "small-dit"
    card = (tmp_path / "outputs" / "README.md").read_text()
    assert "`small-dit`" in card and "random weights" not in card
    metrics = json.loads((tmp_path / "outputs" / "test_results.json").read_text())
    assert metrics["test_map_50"] >= 0.80


def test_the_console_says_what_is_wrong_without_a_traceback(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_DEBUG", raising=False)
    with pytest.raises(SystemExit, match=r"dit-detect evaluate: .*nowhere"):
        cli.run("evaluate", [str(tmp_path / "nowhere"), "--dataset", str(tmp_path)])
    monkeypatch.setenv("HF_DEBUG", "1")
    with pytest.raises((OSError, ValueError)):
        cli.run("evaluate", [str(tmp_path / "nowhere"), "--dataset", str(tmp_path)])


def test_a_split_that_was_set_aside_can_be_evaluated_again(tiny_model, tmp_path, monkeypatch):
    rows = draw_shapes_dataset(12, 0, 0, image_size=64)["train"]
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    tiny_model(**label_fields({"train": rows})).save_pretrained(tmp_path / "detector")
    DiTDetectionImageProcessor(size=64).save_pretrained(tmp_path / "detector")
    monkeypatch.chdir(tmp_path)
    metrics = evaluate.main(["detector", "--dataset", "set", "--test_fraction", "0.25", "--seed", "7"])
    assert "test_map" in metrics and {path.name for path in tmp_path.iterdir()} == {"set", "detector"}
    with pytest.raises(SystemExit):
        evaluate.main(["detector", "--dataset", "set", "--class_names", "a"])
