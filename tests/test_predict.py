import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from predicted_images import command_on, picture, read, write_eleven_images, write_finder_of_five
from transformers import pipeline

from dit_detection import DiTDetectionImageProcessor
from dit_detection.commands import predict
from dit_detection.inference import batch_inference
from dit_detection.inference.prediction_shards import PredictionShards


@pytest.fixture(scope="module")
def checkpoint(finding_detector, tmp_path_factory):
    return write_finder_of_five(finding_detector, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_eleven_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def run(checkpoint, capsys):
    return command_on(checkpoint, capsys)


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
            assert len(read(Path("out"))) == 11  # nor those of the other run


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
        (["saved"], ["--dataset_revision", "main"], "saved is a folder: it has no revision 'main'"),
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
