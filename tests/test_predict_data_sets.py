import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from predicted_images import command_on, picture, read, write_eleven_images, write_finder_of_five
from transformers import AutoModelForObjectDetection

from dit_detection import DiTDetectionImageProcessor
from dit_detection.inference import batch_inference
from dit_detection.inference.prediction_shards import PredictionShards

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(finding_detector, tmp_path_factory):
    return write_finder_of_five(finding_detector, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_eleven_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def run(checkpoint, capsys):
    return command_on(checkpoint, capsys)


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
