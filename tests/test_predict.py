import contextlib
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoModelForObjectDetection, pipeline

from dit_detection import DiTDetectionImageProcessor
from dit_detection.commands import predict
from dit_detection.inference import batch_inference
from dit_detection.inference.batch_predictor import BatchPredictor
from dit_detection.inference.prediction_shards import PredictionShards

ROOT = Path(__file__).parents[1]
SIZES = [(90, 60), (50, 140), (64, 64), (31, 33), (128, 96)]


def picture(seed, size):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def checkpoint(finding_detector, tmp_path_factory):
    """A detector that finds five things in every image."""
    folder = shutil.copytree(finding_detector, tmp_path_factory.mktemp("checkpoint"), dirs_exist_ok=True)
    DiTDetectionImageProcessor(size=64, max_detections=5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of eleven images, some of them deeper in it, and what is no image."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "b" / "deep").mkdir(parents=True)
    names = ["a.png", "b/0.PNG", "b/1.jpg", "b/deep/0.png", "c.webp", *(f"d{index}.png" for index in range(6))]
    for index, name in enumerate(names):
        picture(index, SIZES[index % len(SIZES)]).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def run(checkpoint, capsys):
    """Runs the command; returns its exit code and what it printed to stderr."""

    def run(source, output_dir, *more, model=checkpoint):
        sources = [str(path) for path in (source if isinstance(source, list) else [source])]
        arguments = [str(model), *sources, "--output_dir", str(output_dir), "--num_workers", "0", "--batch_size", "2"]
        try:
            predict.main([*arguments, "--shard_size", "3", *more])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
            return code, f"{error.code}" + capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


def read(output_dir):
    return json.loads((output_dir / "predictions.json").read_text())


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_every_image_is_there_once_as_the_pipeline_sees_it(run, checkpoint, images, tmp_path):
    single = picture(20, (40, 40))
    single.save(tmp_path / "single.bmp")
    code, _ = run([images, tmp_path / "single.bmp"], tmp_path / "out")
    assert code == 0
    predictions = read(tmp_path / "out")
    paths = [*sorted(path for path in images.rglob("*") if path.suffix != ".txt" and path.is_file())]
    assert [found["file"] for found in predictions] == [*map(str, paths), str(tmp_path / "single.bmp")]
    assert [found["image_id"] for found in predictions] == list(range(12))
    detector = pipeline("object-detection", str(checkpoint))
    for found in predictions:
        with Image.open(found["file"]) as image:
            assert (found["width"], found["height"]) == image.size
            expected = detector(image.convert("RGB"), threshold=0.3)
        assert len(found["detections"]) == len(expected) > 0
        for ours, theirs in zip(found["detections"], expected, strict=True):
            assert ours["label"] == theirs["label"] == ["cat", "dog", "owl"][ours["label_id"]]
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
            assert ours["box_xyxy"] == pytest.approx(list(theirs["box"].values()), abs=1)
    pictures = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert len(pictures) == 12 and pictures[3] == "00003_0.jpg" and pictures[-1] == "00011_single.jpg"
    assert not (tmp_path / "out" / "images.arrow").exists()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["complete"], manifest["num_images"], manifest["num_unreadable"]) == (True, 12, 0)
    assert manifest["num_detections"] == sum(len(found["detections"]) for found in predictions)


def test_other_formats_come_without_running_the_model_again(run, images, tmp_path, monkeypatch):
    assert run(images, tmp_path, "--format", "parquet")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "shards"]
    table = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "shards").iterdir())])
    monkeypatch.setattr(batch_inference, "detect_processed", None)
    before = stamps(tmp_path / "shards")
    assert run(images, tmp_path, "--no_pictures")[0] == 0
    assert read(tmp_path) == table.to_pylist()
    assert run(images, tmp_path, "--format", "coco")[0] == 0
    content = json.loads((tmp_path / "coco.json").read_text())
    assert len(content["images"]) == 11 and len(content["annotations"]) == 55
    assert run(images, tmp_path, "--format", "yolo")[0] == 0
    assert (tmp_path / "yolo" / "labels" / "b" / "deep" / "0.txt").read_text().count("\n") == 5
    assert stamps(tmp_path / "shards") == before
    # Datasets of `datasets` read the shards.
    assert Dataset.from_parquet(str(tmp_path / "shards" / "*.parquet"), cache_dir=str(tmp_path / "c")).num_rows == 11


def test_an_unreadable_image_is_recorded_and_the_run_goes_on(run, images, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(5):
        picture(index, (40, 50)).save(folder / f"{index}.png")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "2.png").write_bytes(b"")
    (folder / "3.png").write_bytes(b"nothing of the kind")
    (folder / "5.png").symlink_to(folder / "nowhere.png")
    for _ in range(2):  # the second run finds all there, and says the same
        code, message = run(folder, tmp_path / "out")
        assert code == 3 and "4 of the images could not be read" in message and "2.png is empty" in message
        predictions = read(tmp_path / "out")
        assert [found["error"] is None for found in predictions] == [True, False, False, False, True, False]
        assert all(found["width"] is None and not found["detections"] for found in predictions if found["error"])
        assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2
    assert predictions[0]["detections"] and predictions[4]["detections"]


@pytest.mark.parametrize("stop", [0, 2, 3])
def test_a_run_that_was_stopped_goes_on(run, images, tmp_path, monkeypatch, stop):
    assert run(images, tmp_path / "whole", "--no_pictures")[0] == 0
    write, count = PredictionShards.write, 0

    def stopping(shards, name, predictions):
        nonlocal count
        if count == stop:
            # As a kill in the midst of it would leave it.
            (shards.folder / "shards" / f"{name}.unfinished-1").write_bytes(b"PAR1")
            raise KeyboardInterrupt
        count += 1
        write(shards, name, predictions)

    with monkeypatch.context() as patch:
        patch.setattr(PredictionShards, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(images, tmp_path / "out", "--no_pictures")
    manifest = PredictionShards(tmp_path / "out").manifest()
    assert manifest["complete"] is False and not (tmp_path / "out" / "predictions.json").exists()
    before = {path: stamp for path, stamp in stamps(tmp_path / "out").items() if path.suffix == ".parquet"}
    assert len(before) == stop
    assert run(images, tmp_path / "out", "--no_pictures")[0] == 0
    assert read(tmp_path / "out") == read(tmp_path / "whole")
    assert before.items() <= stamps(tmp_path / "out").items()  # what was done is not done again
    assert not list(tmp_path.rglob("*.unfinished*"))


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", None])
def test_a_damaged_or_missing_shard_is_made_again(run, images, tmp_path, damage):
    assert run(images, tmp_path, "--no_pictures")[0] == 0
    before = read(tmp_path)
    shard = sorted((tmp_path / "shards").iterdir())[1]
    shard.unlink() if damage is None else shard.write_bytes(damage(shard.read_bytes()))
    assert run(images, tmp_path, "--no_pictures")[0] == 0
    assert read(tmp_path) == before and len(before) == 11


def test_a_shard_that_is_damaged_within_is_named(run, images, tmp_path):
    assert run(images, tmp_path, "--no_pictures")[0] == 0
    shard = sorted((tmp_path / "shards").iterdir())[1]
    shard.write_bytes(shard.read_bytes()[4:])  # its end says nothing of that
    with pytest.raises(OSError, match=rf"(?s){shard.name} is damaged .* Remove it and run the command again"):
        run(images, tmp_path, "--no_pictures")


def other_weights(folder, tmp_path):
    from dit_detection import DiTForObjectDetection

    model = DiTForObjectDetection.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    DiTDetectionImageProcessor(size=64, max_detections=5).save_pretrained(tmp_path / "other")
    return {"model": tmp_path / "other"}


def test_an_image_that_is_named_twice_is_predicted_once(run, images, tmp_path, monkeypatch):
    monkeypatch.chdir(images)
    code, printed = run(["a.png", ".", "./a.png"], tmp_path / "out", "--no_pictures")
    assert code == 0, printed
    files = [Path(found["file"]).name for found in read(tmp_path / "out")]
    assert len(files) == 11 and files.count("a.png") == 1 and files[0] == "a.png"


def test_images_of_one_label_file_are_found_beforehand(run, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "load_detector", lambda source: pytest.fail("nothing is loaded"))
    (tmp_path / "in").mkdir()
    for name in ("a.png", "a.jpg"):
        picture(0, (20, 20)).save(tmp_path / "in" / name)
    with pytest.raises(ValueError, match=r"a.jpg and .*a.png would have the same YOLO label file, a.txt"):
        run(tmp_path / "in", tmp_path / "out", "--format", "yolo")


def other_processor(folder, tmp_path):
    from dit_detection import DiTForObjectDetection

    DiTForObjectDetection.from_pretrained(folder).save_pretrained(tmp_path / "other")
    DiTDetectionImageProcessor(size=64, max_detections=6).save_pretrained(tmp_path / "other")
    return {"model": tmp_path / "other"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--threshold", "0.4"], "threshold was 0.3 and is now 0.4"),
        (["--nms_threshold", "0.5"], "nms_threshold was null and is now 0.5"),
        (["--shard_size", "4"], "shard_size was 3 and is now 4"),
        (other_weights, "the checkpoint is another one"),
        (other_processor, "image_processor.max_detections was 5 and is now 6"),
        ("add", "number of images was 11 and is now 12"),
        ("remove", "number of images was 11 and is now 10"),
        ("rename", "the list of images is another one"),
    ],
)
def test_changed_settings_are_refused_by_name(run, checkpoint, images, tmp_path, change, message):
    import shutil

    folder = shutil.copytree(images, tmp_path / "images")
    assert run(folder, tmp_path / "out", "--no_pictures")[0] == 0
    (sorted((tmp_path / "out" / "shards").iterdir())[-1]).unlink()  # as if it had been killed
    options, arguments = [], {}
    if callable(change):
        arguments = change(checkpoint, tmp_path)
    elif isinstance(change, list):
        options = change
    elif change == "add":
        picture(9, (20, 20)).save(folder / "zz.png")
    elif change == "remove":
        (folder / "a.png").unlink()
    else:
        (folder / "a.png").rename(folder / "aa.png")
    before = stamps(tmp_path / "out")
    code, printed = run(folder, tmp_path / "out", "--no_pictures", *options, **arguments)
    assert code == 2 and message in printed and "--overwrite" in printed
    assert stamps(tmp_path / "out") == before
    assert run(folder, tmp_path / "out", "--no_pictures", "--overwrite", *options, **arguments)[0] == 0
    assert run(folder, tmp_path / "fresh", "--no_pictures", *options, **arguments)[0] == 0
    assert read(tmp_path / "out") == read(tmp_path / "fresh")


def test_the_same_checkpoint_at_another_place_is_the_same(run, checkpoint, images, tmp_path, monkeypatch):
    folder = shutil.copytree(checkpoint, tmp_path / "detector")
    assert run(images, tmp_path / "out", model=folder)[0] == 0
    before = stamps(tmp_path / "out" / "shards")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "5.0.0"}))
    monkeypatch.chdir(tmp_path)
    for name in ("detector", "./detector", folder.rename(tmp_path / "moved")):
        code, printed = run(
            images, tmp_path / "out", "--format", "coco", model=name if Path(name).is_dir() else "moved"
        )
        assert code == 0, printed
    assert stamps(tmp_path / "out" / "shards") == before


def test_an_image_too_long_for_a_jpeg_has_a_smaller_picture(run, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (66_000, 8)).save(tmp_path / "images" / "scan.png")
    code, printed = run(tmp_path / "images", tmp_path / "out")
    assert code == 0, printed
    assert [found["width"] for found in read(tmp_path / "out")] == [66_000]
    with Image.open(tmp_path / "out" / "pictures" / "00000_scan.jpg") as drawn:
        assert drawn.width <= 65_500


def test_predictions_are_not_written_into_a_data_set(run, images, tmp_path):
    paths = [str(path) for path in sorted(images.rglob("*.png"))[:2]]
    rows = Dataset.from_dict({"image": paths}).cast_column("image", ImageFeature())
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set" / "a.parquet")
    code, printed = run(tmp_path / "set", tmp_path / "set" / "out")
    assert code == 2 and "--output_dir" in printed and "outside" in printed
    assert run(tmp_path / "set", tmp_path / "out")[0] == 0


def test_nothing_is_overwritten_before_all_is_found(run, images, tmp_path):
    assert run(images, tmp_path / "out")[0] == 0
    before = stamps(tmp_path / "out")
    assert run(tmp_path / "typo", tmp_path / "out", "--overwrite")[0] == 2
    with pytest.raises(OSError):
        run(images, tmp_path / "out", "--overwrite", model=tmp_path / "typo")
    assert stamps(tmp_path / "out") == before
    assert run(images, tmp_path / "out", "--overwrite")[0] == 0
    assert stamps(tmp_path / "out") != before


def test_a_damaged_manifest_names_the_way_out(run, images, tmp_path):
    assert run(images, tmp_path / "out")[0] == 0
    (tmp_path / "out" / "manifest.json").write_text("{")
    code, message = run(images, tmp_path / "out")
    assert code == 2 and "damaged" in message and "--overwrite" in message
    assert run(images, tmp_path / "out", "--overwrite")[0] == 0


def test_ids_that_are_no_numbers_are_left_out(run, images, tmp_path):
    paths = [str(path) for path in sorted(images.rglob("*.png"))[:2]]
    rows = Dataset.from_dict({"image": paths, "image_id": ["x", "y"]}).cast_column("image", ImageFeature())
    rows.save_to_disk(tmp_path / "set")
    assert run(tmp_path / "set", tmp_path / "out")[0] == 0
    assert [found["image_id"] for found in read(tmp_path / "out")] == [0, 1]


def test_its_own_pictures_are_not_among_the_images(run, images, tmp_path, monkeypatch):
    """The default place of the predictions lies in the folder that `.` names."""
    folder = shutil.copytree(images, tmp_path / "images")
    for options in ([], [], ["--overwrite"]):
        assert run(folder, folder / "predictions", *options)[0] == 0
        assert len(read(folder / "predictions")) == 11
    assert len(list((folder / "predictions" / "pictures").iterdir())) == 11
    monkeypatch.chdir(folder)
    (tmp_path / "link").symlink_to(folder)
    for source in (Path("..") / "images", tmp_path / "link"):
        for _ in range(2):
            assert run(source, "out", "--overwrite")[0] == 0
            assert len(read(Path("out"))) == 22  # with the pictures of the other run


def test_pictures_that_were_not_drawn_are_asked_for_in_vain(run, images, tmp_path):
    assert run(images, tmp_path, "--no_pictures")[0] == 0
    code, printed = run(images, tmp_path)
    assert code == 2 and "pictures was null and is now true" in printed and "--no_pictures" in printed
    assert run(images, tmp_path, "--overwrite")[0] == 0
    assert run(images, tmp_path, "--no_pictures")[0] == 0  # drawn ones are no obstacle


def test_a_run_without_pictures_that_goes_on_with_one_that_draws_leaves_no_gap(run, images, tmp_path, monkeypatch):
    write = PredictionShards.write

    def stopping(shards, name, predictions):
        if shards.names():
            raise KeyboardInterrupt
        write(shards, name, predictions)

    with monkeypatch.context() as patch:
        patch.setattr(PredictionShards, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(images, tmp_path)
    assert run(images, tmp_path, "--format", "coco")[0] == 0
    code, printed = run(images, tmp_path)
    assert code == 2 and "pictures was false and is now true" in printed and "--no_pictures" in printed
    assert run(images, tmp_path, "--overwrite")[0] == 0
    assert run(images, tmp_path, "--format", "coco")[0] == 0  # of a finished run nothing is missing
    assert run(images, tmp_path)[0] == 0 and len(list((tmp_path / "pictures").iterdir())) == 11


@pytest.mark.parametrize("name", ["coco.json", "predictions.json", "yolo/labels/1.txt", "shards/1.parquet"])
@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_what_others_wrote_is_left_alone(run, images, tmp_path, name, options):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("precious")
    code, printed = run(images, tmp_path, *options)
    assert code == 2 and f"holds {name.partition('/')[0]}, but no manifest.json" in printed
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize("manifest", ["{", "[]", "\udcff", '{"settings": 3}'])
def test_a_broken_manifest_is_refused(run, images, tmp_path, manifest):
    assert run(images, tmp_path, "--no_pictures")[0] == 0
    (tmp_path / "manifest.json").write_bytes(manifest.encode(errors="surrogateescape"))
    code, printed = run(images, tmp_path, "--no_pictures")
    assert code == 2 and "manifest.json" in printed
    assert run(images, tmp_path, "--no_pictures", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        (["nothing/at/all"], [], "no file or folder nothing/at/all"),
        (["photo.jpg"], [], "no file or folder photo.jpg"),
        (["empty"], [], "The folder empty holds no images"),
        (["images", "saved"], [], "name one data set, or image files and folders"),
        (["images"], ["--streaming"], "are for a data set"),
        (["images"], ["--batch_size", "0"], "--batch_size is 0"),
        (["images"], ["--threshold", "30"], "--threshold is 30.0; it must lie between 0 and 1"),
        (["images"], ["--threshold", "nan"], "--threshold is nan; it must lie between 0 and 1"),
        (["images"], ["--nms_threshold", "60"], "--nms_threshold is 60.0; it must lie between 0 and 1"),
        (["one.parquet"], [], "one.parquet is no image. Of a data set in files name the folder"),
        (["images"], ["--dataset_config_name", "mini"], "are for a data set"),
        (["saved"], ["--dataset_config_name", "mini"], "saved is one data set: it has no configuration 'mini'"),
        (["saved"], ["--revision", "main"], "saved is a folder: it has no revision 'main'"),
        (["saved"], [], "has the splits train, test. Name one with --split"),
        (["saved"], ["--split", "val"], "has no split 'val', but train, test"),
        (["texts"], [], 'needs a column "image", but has text'),
        (["someone/nothing"], [], "someone/nothing is no folder or file here"),
    ],
)
def test_sources_that_cannot_be_used(run, images, tmp_path, monkeypatch, sources, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").symlink_to(images)
    rows = Dataset.from_dict({"image": [str(images / "a.png")]}, features=Features({"image": ImageFeature()}))
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "texts")
    rows.to_parquet(tmp_path / "one.parquet")
    code, printed = run(sources, tmp_path / "out", *options)
    assert code == 2 and message in printed


def data_set(images):
    """The images of the folder, encoded, with ids that are not their places; one is missing, one damaged."""
    paths = sorted(path for path in images.rglob("*") if path.suffix != ".txt" and path.is_file())
    encoded = [{"bytes": path.read_bytes(), "path": f"../{path.name}"} for path in paths]
    encoded += [None, {"bytes": b"damaged", "path": None}]
    features = Features({"image": ImageFeature(decode=False), "image_id": Value("int64"), "more": Value("string")})
    columns = {"image": encoded, "image_id": [100 - index for index in range(13)], "more": ["x"] * 13}
    return Dataset.from_dict(columns, features=features).cast_column("image", ImageFeature())


@pytest.mark.parametrize("form", ["saved", "parquet", "streamed", "streamed in parts"])
def test_data_sets_give_what_the_folder_gives(run, images, tmp_path, monkeypatch, form):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert run(images, tmp_path / "folder", "--no_pictures")[0] == 0
    expected = [(found["width"], found["height"], found["detections"]) for found in read(tmp_path / "folder")]
    rows = data_set(images)
    if form == "saved":
        rows.save_to_disk(tmp_path / "set")
    else:
        parts = 3 if form == "streamed in parts" else 1
        (tmp_path / "set").mkdir()
        for part in range(parts):
            # Parts of 5, 4 and 4 rows: the last shard of each is short.
            rows.shard(parts, part).to_parquet(tmp_path / "set" / f"train-{part:05d}-of-{parts:05d}.parquet")
    options = ["--streaming"] if form.startswith("streamed") else []
    assert run(tmp_path / "set", tmp_path / "out", *options)[0] == 3
    predictions = read(tmp_path / "out")
    # A batch ends with its part, so that other images share it: equal but for the last digit.
    assert [found["image_id"] for found in predictions] == [100 - index for index in range(13)]
    for found, (width, height, detections) in zip(predictions, expected, strict=False):
        assert (found["width"], found["height"]) == (width, height)
        assert [item["label"] for item in found["detections"]] == [item["label"] for item in detections]
        for ours, theirs in zip(found["detections"], detections, strict=True):
            assert ours["box_xyxy"] == pytest.approx(theirs["box_xyxy"], abs=0.011)
            assert ours["score"] == pytest.approx(theirs["score"], abs=2e-6)
    assert [found["file"].removeprefix("../") for found in predictions[-3:]] == ["d5.png", "image 89", "image 88"]
    assert [found["error"] is None for found in predictions[-3:]] == [True, False, False]
    drawn = sorted((tmp_path / "out" / "pictures").iterdir())
    assert len(drawn) == 11 and len(list(tmp_path.rglob("*.jpg"))) == 11  # none has left the folder
    # Stopped and gone on with.
    shards = sorted((tmp_path / "out" / "shards").iterdir())
    shards[-1].unlink()
    shards[1].unlink()
    assert run(tmp_path / "set", tmp_path / "out", *options)[0] == 3
    assert read(tmp_path / "out") == predictions


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("stages", [[(2, (0, 1))], [(3, (1,)), (2, (0, 1))], [(2, (0,)), (5, range(5))]], ids=str)
def test_any_number_of_processes_gives_the_same(checkpoint, images, tmp_path, monkeypatch, streamed, stages):
    """Stages: the number of processes, and which of them came to write; the others were killed before."""
    model = AutoModelForObjectDetection.from_pretrained(checkpoint)
    image_processor = DiTDetectionImageProcessor.from_pretrained(checkpoint)
    rows = data_set(images).cast_column("image", ImageFeature(decode=False))
    rows = rows.to_iterable_dataset(num_shards=4) if streamed else rows
    write, names_of = PredictionShards.write, PredictionShards.names

    def work(folder, stages):
        shards, written = PredictionShards(folder), []
        shards.start({})
        for count, processes in stages:
            # All look at what is there before one of them writes.
            names = names_of(shards)
            monkeypatch.setattr(PredictionShards, "names", lambda self, names=names: names)
            monkeypatch.setattr(
                PredictionShards, "write", lambda self, name, found: (written.append(name), write(self, name, found))
            )
            for process in processes:
                state = SimpleNamespace(process_index=process, num_processes=count, is_local_main_process=False)
                state.wait_for_everyone = lambda: None
                monkeypatch.setattr(batch_inference, "PartialState", lambda state=state: state)
                batch_inference.predict_images(
                    model, image_processor, rows, shards, threshold=0.3, batch_size=2, shard_size=3
                )
            monkeypatch.setattr(PredictionShards, "names", names_of)
        return list(shards), written

    expected, _ = work(tmp_path / "one", [(1, (0,))])
    found, written = work(tmp_path / "several", stages)
    assert found == expected and len(found) == 13
    assert len(written) == len(set(written))  # no shard by two processes, or again


def test_workers_read_what_the_process_itself_reads(run, images, tmp_path):
    for workers in ("0", "2"):
        assert run(images, tmp_path / workers, "--num_workers", workers)[0] == 0
    assert read(tmp_path / "0") == read(tmp_path / "2")


# As a function of a batch


def test_arrays_that_are_no_images_say_so(checkpoint):
    predictor = BatchPredictor(str(checkpoint), device="cpu")
    image = np.full((20, 30, 3), 90, np.uint8)
    strange = [None, image.tolist(), image[:0], image[..., :1], image.astype(np.float32), image[..., 0].astype(int)]
    column = np.empty(len(strange) + 1, dtype=object)
    column[:] = [*strange, image]
    found = predictor({"image": column})
    for error in found["error"][:-1]:
        assert error.endswith("Give uint8 of shape (H, W, 3).")
    assert found["error"][-1] is None and len(found["boxes"][-1]) == len(predictor({"image": column[-1:]})["boxes"][0])
    assert all(len(boxes) == 0 for boxes in found["boxes"][:-1])


@pytest.fixture(scope="module")
def rows():
    pictures = [picture(seed, size) for seed, size in enumerate(SIZES)]
    encoded = []
    for image in pictures:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return pictures, encoded


def test_a_batch_of_encoded_images(checkpoint, rows):
    pictures, encoded = rows
    predictor = BatchPredictor(str(checkpoint), device="cpu")
    values = np.array([encoded[0], b"", encoded[1], b"none", None, *encoded[2:]], dtype=object)
    batch = {"path": np.arange(8), "bytes": values}
    found = pickle.loads(pickle.dumps(predictor))(batch)
    assert set(found) == {"path", "labels", "scores", "boxes", "error"}
    assert found["path"].tolist() == list(range(8))
    assert [error is None for error in found["error"]] == [True, False, True, False, False, True, True, True]
    detector = pipeline("object-detection", str(checkpoint))
    for index, image in zip((0, 2, 5, 6, 7), pictures, strict=True):
        expected = detector(image, threshold=0.3)
        assert found["labels"][index] == [item["label"] for item in expected]
        assert found["scores"][index] == pytest.approx([item["score"] for item in expected], abs=1e-5)
        for ours, theirs in zip(found["boxes"][index], expected, strict=True):
            assert ours == pytest.approx(list(theirs["box"].values()), abs=1)
    assert found["boxes"][1] == [] and "is empty" in found["error"][1]
    decoded = np.empty(5, dtype=object)
    decoded[:] = [np.asarray(image) for image in pictures]
    again = predictor({"image": decoded})
    assert [again["scores"][index] for index in range(5)] == [found["scores"][index] for index in (0, 2, 5, 6, 7)]
    assert predictor({"bytes": np.array([b"none"], dtype=object)})["scores"].tolist() == [[]]
    with pytest.raises(ValueError, match='"bytes" or "image", but has path'):
        predictor({"path": np.arange(2)})


def test_ray_data_maps_batches(checkpoint, rows, tmp_path):
    ray = pytest.importorskip("ray")
    for index, data in enumerate(rows[1]):
        (tmp_path / f"{index}.png").write_bytes(data)
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        found = (
            ray.data.read_binary_files(str(tmp_path), include_paths=True)
            .map_batches(
                BatchPredictor,
                fn_constructor_kwargs={"checkpoint": str(checkpoint), "device": "cpu"},
                batch_size=2,
                concurrency=1,
            )
            .take_all()
        )
    finally:
        ray.shutdown()
    found.sort(key=lambda row: row["path"])
    expected = BatchPredictor(str(checkpoint), device="cpu")({"bytes": np.array(rows[1], dtype=object)})
    assert [row["labels"] for row in found] == list(expected["labels"])
    assert np.concatenate([row["boxes"] for row in found]) == pytest.approx(
        np.concatenate(list(expected["boxes"])), abs=0.011
    )


# Killed


@pytest.mark.parametrize(
    "processes", [pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.slow)]
)
def test_killed_at_random_moments_every_image_is_there_once(checkpoint, tmp_path, processes):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(240):
        picture(index, (48, 40)).save(folder / f"{index}.png")
    (folder / "120.png").write_bytes(b"no image")

    def command(out):
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
            launch += ["--num_machines", "1", "--main_process_port", "0"]
            launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        arguments = [str(checkpoint), str(folder), "--output_dir", str(out), "--no_pictures", "--num_workers", "1"]
        return [*launch, str(ROOT / "scripts" / "predict.py"), *arguments, "--shard_size", "3", "--batch_size", "2"]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    generator = random.Random(processes)
    out = tmp_path / "out"
    kills = 0
    for _ in range(40):
        before = len(list((out / "shards").glob("*.parquet")))
        job = subprocess.Popen(command(out), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        # Some at once, most after it has begun to write.
        wanted, deadline = before + generator.choice([-1, 1, 1, 1]), time.monotonic() + 300
        while job.poll() is None and len(list((out / "shards").glob("*.parquet"))) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(generator.uniform(0, 0.3))
        if kills < 3 and job.poll() is None:
            for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()  # SIGKILL
            kills += 1
            job.communicate()
            continue
        printed, _ = job.communicate(timeout=300)
        assert b"1 of the images could not be read" in printed, printed[-2000:]
        assert job.returncode == (3 if processes == 1 else 1)  # that of the launcher
        assert (b", by 2 processes" in printed) == (processes == 2)
        break
    assert kills >= 2
    subprocess.run([*command(tmp_path / "whole")], env=environment, capture_output=True, timeout=300)
    assert read(out) == read(tmp_path / "whole") and len(read(out)) == 240
