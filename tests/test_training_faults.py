"""What breaks while a detector trains: each ends with a message that helps, and nothing that was reached is lost."""

import errno
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from test_processes import in_processes
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

from dit_detection import (
    DetectionAugmentation,
    DetectionDataset,
    DetectionTrainer,
    DetectionTrainingArguments,
    DiTDetectionImageProcessor,
    cli,
)
from dit_detection.data import draw_shapes_dataset
from dit_detection.training.checkpoint_files import checkpoints_of, damage_of, last_whole_checkpoint
from dit_detection.training.fault_tolerant_trainer import NonFiniteLossError, TrainingStoppedError

# Whole trainings: together they take longer than all the fast tests may.
pytestmark = pytest.mark.slow

STEPS = 8


class AtStep(TrainerCallback):
    """Does something once, when a step has been taken."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Twelve images in files."""
    folder = tmp_path_factory.mktemp("images")
    drawn = draw_shapes_dataset(12, 3, 0, image_size=(48, 64))["train"]
    for row in drawn:
        row["image"].save(folder / f"{row['image_id']}.png")
    table = drawn.remove_columns("image").to_dict()
    table["image"] = [str(folder / f"{image_id}.png") for image_id in table["image_id"]]
    return datasets.Dataset.from_dict(table, features=drawn.features)


@pytest.fixture(scope="module")
def build(tiny_model, rows):
    def build(output_dir, dataset_class=DetectionDataset, compute_metrics=None, **arguments):
        image_processor = DiTDetectionImageProcessor(size=64)
        arguments = {
            "output_dir": str(output_dir),
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "eval_strategy": "no",
            "save_strategy": "steps",
            "save_steps": 3,
            "save_total_limit": None,
            "load_best_model_at_end": False,
            **arguments,
        }
        return DetectionTrainer(
            tiny_model(num_labels=5),
            DetectionTrainingArguments(**arguments),
            processing_class=image_processor,
            train_dataset=dataset_class(rows, image_processor, DetectionAugmentation(), seed=1),
            eval_dataset=DetectionDataset(rows.select([0]), image_processor),
            **({} if compute_metrics is None else {"compute_metrics": compute_metrics}),
        )

    return build


@pytest.fixture
def make_trainer(build, tmp_path):
    return partial(build, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(build, tmp_path_factory):
    """Weights after each step of a training in which nothing happens, with and without averages."""
    weights = {}
    for ema_decay in (None, 0.9):
        folder = tmp_path_factory.mktemp("whole")
        build(folder, save_steps=1, ema_decay=ema_decay).train()
        weights[ema_decay] = {
            step: load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in range(1, STEPS + 1)
        }
    return weights


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def assert_kept(error, trainer, whole, make_trainer, ema_decay=None, **arguments):
    """The error names the checkpoint of the last good step; from there training ends as if nothing had happened."""
    step = trainer.state.global_step
    folder = Path(trainer.args.output_dir) / f"checkpoint-{step}"
    assert 0 < step < STEPS and str(folder) in str(error.value)
    assert damage_of(folder) is None
    assert_equal(load_file(folder / "model.safetensors"), whole[ema_decay][step])
    resumed = make_trainer(ema_decay=ema_decay, **arguments)
    resumed.train(resume_from_checkpoint="last")
    assert_equal(resumed.model.state_dict(), whole[ema_decay][STEPS])


# losses


class Poisoned(DetectionDataset):
    """One image has NaN pixels after the first epoch."""

    def get_view(self, index, view):
        entry = super().get_view(index, view)
        if view > 0 and index == 7:
            entry["pixel_values"] = entry["pixel_values"] * float("nan")
        return entry


@pytest.mark.parametrize(
    ("fault", "ema_decay"),
    [("loss", None), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("loss", 0.9), ("gradient", None)))],
)
def test_a_step_that_is_not_finite_is_not_taken(make_trainer, rows, whole, tmp_path, fault, ema_decay):
    trainer = make_trainer(dataset_class=Poisoned if fault == "loss" else DetectionDataset, ema_decay=ema_decay)
    if fault == "gradient":
        weight = trainer.model.head.class_predictor.weight
        trainer.add_callback(AtStep(5, lambda: weight.register_hook(lambda gradient: gradient * float("nan"))))
    with pytest.raises(NonFiniteLossError, match=r"is not finite.*learning_rate") as error:
        trainer.train()
    step = trainer.state.global_step + 1
    details = json.loads((tmp_path / "run" / f"not_finite_step_{step}.json").read_text())
    assert details["step"] == step and details["gradient_norm"] == "nan" and len(details["image_ids"][0]) == 2
    assert str(details["image_ids"][0])[1:-1] in str(error.value)
    if fault == "loss":
        assert rows[7]["image_id"] in details["image_ids"][0] and details["losses"] == ["nan"]
    else:
        assert step == 6 and isinstance(details["losses"][0], float)
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert_kept(error, trainer, whole, make_trainer, ema_decay)


@pytest.mark.forks
@pytest.mark.slow
def test_of_two_processes_one_has_a_loss_that_is_not_finite(build, tmp_path):
    def run():
        trainer = build(tmp_path / "run", dataset_class=Poisoned)
        with pytest.raises(NonFiniteLossError) as error:
            trainer.train()
        return str(error.value), trainer.state.global_step

    (said, step), (_, other_step) = in_processes(2, run)
    assert step == other_step and f"checkpoint-{step}" in said
    details = json.loads((tmp_path / "run" / f"not_finite_step_{step + 1}.json").read_text())
    assert len(details["image_ids"]) == len(details["losses"]) == 2 and "nan" in details["losses"]
    checkpoint = last_whole_checkpoint(tmp_path / "run")
    assert checkpoint.name == f"checkpoint-{step}" and (checkpoint / "rng_state_1.pth").is_file()
    assert all(value.isfinite().all() for value in load_file(checkpoint / "model.safetensors").values())


# images and the processes that read them


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_image_that_turns_unreadable(make_trainer, rows, whole, num_workers):
    files = [Path(row["image"]["path"]) for row in rows.cast_column("image", datasets.Image(decode=False))]
    contents = {path: path.read_bytes() for path in files}

    def ruin():
        for path in files:
            path.write_bytes(contents[path][:200])

    trainer = make_trainer(dataloader_num_workers=num_workers)
    trainer.add_callback(AtStep(2, ruin))
    try:
        with pytest.raises(TrainingStoppedError, match=r"Image '.*\.png' \(image_id \d+\) cannot be used") as error:
            trainer.train()
    finally:
        for path, content in contents.items():
            path.write_bytes(content)
    assert "Traceback" not in str(error.value) and isinstance(error.value.__cause__, ValueError)
    assert_kept(error, trainer, whole, make_trainer)


class Deadly(DetectionDataset):
    """Kills the worker that reads one image, after the first epoch."""

    def get_view(self, index, view):
        if view > 0 and index == 7 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().get_view(index, view)


@pytest.mark.slow
def test_a_worker_that_dies(make_trainer, whole):
    trainer = make_trainer(dataset_class=Deadly, dataloader_num_workers=1, dataloader_prefetch_factor=1)
    with pytest.raises(TrainingStoppedError, match=r"reads images died.*--dataloader_num_workers") as error:
        trainer.train()
    assert_kept(error, trainer, whole, make_trainer)


# memory


def cuda_is_full():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it.")


def python_is_full():
    raise MemoryError("no memory")


@pytest.mark.parametrize("fault", [cuda_is_full, python_is_full, lambda: torch.empty(2**60)])
def test_out_of_memory_says_what_to_lower(make_trainer, whole, monkeypatch, fault):
    trainer = make_trainer()
    compute_loss = trainer.compute_loss

    def fails(*args, **kwargs):
        if trainer.state.global_step == 5:
            fault()
        return compute_loss(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", fails)
    with pytest.raises(TrainingStoppedError, match="Out of memory") as error:
        trainer.train()
    for remedy in ("batch_size", "image_size", "gradient_checkpointing", "freeze_layers"):
        assert f"{remedy}" in str(error.value)
    assert "More about it" not in str(error.value)
    if fault is cuda_is_full:
        assert_kept(error, trainer, whole, make_trainer)
    assert "checkpoint-5; --resume_from_checkpoint last" in str(error.value)


def test_other_errors_stay_what_they_are(make_trainer, whole, caplog):
    trainer = make_trainer()
    trainer.add_callback(AtStep(4, lambda: trainer.model.head.forward.nothing))
    with pytest.raises(AttributeError, match="nothing"):
        trainer.train()
    # In mid-step nobody knows what the state is: what is there is the last regular checkpoint.
    assert [path.name for path in checkpoints_of(Path(trainer.args.output_dir))] == ["checkpoint-3"]
    assert "--resume_from_checkpoint last" in caplog.text


# the disk


@pytest.mark.parametrize("limit", [20_000, 400_000], ids=["weights", "optimizer"])
def test_a_full_disk(make_trainer, whole, monkeypatch, limit):
    trainer = make_trainer()
    save = trainer._save_checkpoint

    def save_on_full_disk(*args):
        if trainer.state.global_step < 6:
            return save(*args)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            return save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    monkeypatch.setattr(trainer, "_save_checkpoint", save_on_full_disk)
    with pytest.raises(TrainingStoppedError, match=r"checkpoint-6 could not be written.*Make room") as error:
        trainer.train()
    assert "--resume_from_checkpoint last" in str(error.value)
    folder = Path(trainer.args.output_dir)
    assert not (folder / "unfinished").exists()  # which would keep the disk full
    assert last_whole_checkpoint(folder) == folder / "checkpoint-3"
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=True)
    assert_equal(resumed.model.state_dict(), whole[None][STEPS])


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_training(make_trainer, monkeypatch, strategy):
    trainer = make_trainer(save_strategy=strategy)
    monkeypatch.setattr(trainer, "training_step", lambda *args, **kwargs: pytest.fail("it trains"))
    folder = Path(trainer.args.output_dir)
    shutil.rmtree(folder, ignore_errors=True)
    folder.write_text("a file")
    with pytest.raises(OSError, match=r"run cannot be written to: .* Give another output_dir"):
        trainer.train()
    folder.unlink()

    mkdir = Path.mkdir

    def read_only(self, *args, **kwargs):  # root writes everywhere
        if self.name == "unfinished":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(PermissionError, match=r"run cannot be written to: .*Permission denied"):
        trainer.train()


def test_a_folder_that_turns_read_only(make_trainer, whole):
    trainer = make_trainer()
    unfinished = Path(trainer.args.output_dir) / "unfinished"
    trainer.add_callback(AtStep(5, lambda: unfinished.write_text("in the way")))
    with pytest.raises(TrainingStoppedError, match="checkpoint-6 could not be written"):
        trainer.train()
    assert last_whole_checkpoint(unfinished.parent) == unfinished.parent / "checkpoint-3"
    unfinished.unlink()


# checkpoints


@pytest.fixture(scope="module")
def finished(build, tmp_path_factory):
    """A run with the checkpoints 3, 6 and 8."""
    folder = tmp_path_factory.mktemp("finished")
    build(folder).train()
    assert [path.name for path in checkpoints_of(folder)] == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    return folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit of the weights": (lambda folder: flip(folder / "model.safetensors"), "model.safetensors is not as"),
    "a bit of the optimizer": (lambda folder: flip(folder / "optimizer.pt"), "optimizer.pt is not as"),
    "cut short": (lambda folder: os.truncate(folder / "optimizer.pt", 100), "optimizer.pt is not as"),
    "a file less": (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "no checksums": (lambda folder: (folder / "SHA256SUMS").unlink(), "no SHA256SUMS"),
    "empty checksums": (lambda folder: (folder / "SHA256SUMS").write_text(""), "SHA256SUMS is empty"),
    "checksums of bytes": (lambda folder: (folder / "SHA256SUMS").write_bytes(b"\xff\x00" * 40), "SHA256SUMS is dam"),
    "checksums cut short": (lambda folder: os.truncate(folder / "SHA256SUMS", 100), "is missing|SHA256SUMS is dam"),
    "a folder for a file": (
        lambda folder: ((folder / "scheduler.pt").unlink(), (folder / "scheduler.pt").mkdir()),
        "scheduler.pt is missing",
    ),
    "nothing in it": (lambda folder: [path.unlink() for path in folder.iterdir()], "no SHA256SUMS"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(finished, tmp_path, caplog, damage):
    run = shutil.copytree(finished, tmp_path / "run")
    damaging, said = DAMAGES[damage]
    damaging(run / "checkpoint-8")
    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(run) == run / "checkpoint-6"
    assert "checkpoint-8" in caplog.text and "goes on from" in caplog.text
    assert any(part in caplog.text for part in said.split("|"))


@pytest.mark.parametrize("wanted", [True, "last"])
def test_training_goes_on_from_the_one_before(finished, make_trainer, whole, tmp_path, wanted):
    run = shutil.copytree(finished, tmp_path / "run")
    flip(run / "checkpoint-8" / "optimizer.pt")
    trainer = make_trainer()
    steps = []
    for step in range(1, STEPS + 1):
        trainer.add_callback(AtStep(step, partial(steps.append, step)))
    trainer.train(resume_from_checkpoint=wanted)
    assert steps == [7, 8]
    assert_equal(trainer.model.state_dict(), whole[None][STEPS])
    assert damage_of(run / "checkpoint-8") is None  # written again


def test_a_run_that_is_done_takes_no_step(finished, make_trainer, whole, tmp_path):
    """Its 8 steps end within its second epoch, of 6."""
    shutil.copytree(finished, tmp_path / "run")
    trainer = make_trainer()
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == STEPS
    assert_equal(trainer.model.state_dict(), whole[None][STEPS])


def test_what_is_no_checkpoint_is_refused(finished, make_trainer, tmp_path):
    """With the weights and no optimizer training would begin anew, unnoticed."""
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("model.safetensors", "trainer_state.json"):  # as `save_model` and `save_state` leave them
        shutil.copy(run / "checkpoint-8" / name, run)
    trainer = make_trainer()
    with pytest.raises(ValueError, match=r"run is the folder of a run, .* takes 'last', .* such as .*checkpoint-8\."):
        trainer.train(resume_from_checkpoint=str(run))
    for checkpoint in checkpoints_of(run):
        shutil.rmtree(checkpoint)
    for wanted in (run, tmp_path / "nowhere", "True"):
        with pytest.raises(ValueError, match=r"is no checkpoint: .* takes a folder checkpoint-N, or 'last'"):
            trainer.train(resume_from_checkpoint=str(wanted))
    # One of another trainer has no checksums.
    other = shutil.copytree(finished / "checkpoint-6", tmp_path / "of-another")
    (other / "SHA256SUMS").unlink()
    trainer.train(resume_from_checkpoint=str(other))
    assert trainer.state.global_step == STEPS


def test_weights_without_an_optimizer_are_no_run_to_go_on_with(make_trainer, tmp_path):
    """As transformers' `save_only_model` leaves them: rates and moments would begin anew, unnoticed."""
    make_trainer(save_only_model=True).train()
    for wanted in ("last", str(tmp_path / "run" / "checkpoint-6")):
        with pytest.raises(ValueError, match=r"checkpoint-6 .*no optimizer, as with save_only_model; --model takes"):
            make_trainer().train(resume_from_checkpoint=wanted)


def test_a_damaged_checkpoint_is_not_taken_by_name(finished, make_trainer, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    flip(run / "checkpoint-6" / "model.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint-6 is not whole: model.safetensors .*'last'"):
        make_trainer().train(resume_from_checkpoint=str(run / "checkpoint-6"))


def test_if_none_is_whole_nothing_is_begun_anew(finished, make_trainer, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for checkpoint in checkpoints_of(run):
        flip(checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"No checkpoint in .* is whole: .*checkpoint-8 .*; .*checkpoint-6 "):
        make_trainer().train(resume_from_checkpoint="last")


def test_before_the_first_checkpoint(make_trainer, whole):
    with pytest.raises(ValueError, match=r"no checkpoint in .*run to resume from"):
        make_trainer().train(resume_from_checkpoint=True)
    trainer = make_trainer()
    trainer.train(resume_from_checkpoint="last")
    assert_equal(trainer.model.state_dict(), whole[None][STEPS])


def test_one_who_begins_anew_is_told_of_the_run_that_is_there(finished, make_trainer, tmp_path, caplog):
    shutil.copytree(finished, tmp_path / "run")
    make_trainer(max_steps=1, save_strategy="epoch").train()
    assert "checkpoint-8 is of an earlier run" in caplog.text


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_the_checksums_are_those_of_sha256sum(finished):
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=finished / "checkpoint-8", check=True)


def test_the_command_ends_with_the_message_alone(monkeypatch):
    def stops(argv):
        raise TrainingStoppedError("Out of memory.")

    monkeypatch.setattr(cli.COMMANDS["train"], "main", stops)
    monkeypatch.setattr(sys, "argv", ["dit-detect", "train"])
    with pytest.raises(SystemExit, match=r"^dit-detect train: Out of memory\.$"):
        cli.main()


def test_early_stopping_goes_on_counting(make_trainer, tmp_path):
    arguments = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "max_steps": 20,
        "load_best_model_at_end": True,
        "metric_for_best_model": "same",
    }

    def train(patience=3, **kwargs):
        trainer = make_trainer(
            compute_metrics=lambda predictions: {"same": 1.0}, early_stopping_patience=patience, **arguments
        )
        trainer.train(**kwargs)
        return trainer.state.global_step

    assert train() == 8  # the best, and three that are not better
    for checkpoint in checkpoints_of(tmp_path / "run")[2:]:
        shutil.rmtree(checkpoint)
    assert last_whole_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"
    assert train(resume_from_checkpoint="last") == 8
    assert train(resume_from_checkpoint="last") == 8  # it has stopped
    assert train(patience=5, resume_from_checkpoint="last") == 12  # what is asked for now, and not then


@pytest.mark.parametrize("left_by_another_run", [False, True])
def test_the_best_is_one_that_is_saved(make_trainer, tmp_path, left_by_another_run):
    """Evaluated more often than saved: what cannot be loaded at the end is not the best."""
    scores = iter([0.1, 0.5, 0.9, 0.6, 0.2, 0.3, 0.2, 0.2])
    trainer = make_trainer(
        compute_metrics=lambda predictions: {"score": next(scores, 0.0)},
        eval_strategy="steps",
        eval_steps=1,
        save_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    if left_by_another_run:
        shutil.copytree(Path(__file__).parent, tmp_path / "run" / "checkpoint-3")
    saved = {}
    trainer.add_callback(AtStep(5, lambda: saved.update(load_file(tmp_path / "run/checkpoint-4/model.safetensors"))))
    trainer.train()
    assert trainer.state.best_metric == 0.6 and trainer.state.best_global_step == 4
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-4")
    assert {"checkpoint-4", "checkpoint-8"} <= {path.name for path in checkpoints_of(tmp_path / "run")}
    assert_equal(trainer.model.state_dict(), saved)


def test_the_best_is_found_where_the_run_was_moved_to(build, tmp_path):
    scores = iter([0.5, 0.3, 0.2, 0.1])
    arguments = {
        "compute_metrics": lambda predictions: {"score": next(scores, 0.0)},
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
    }
    build(tmp_path / "run", **arguments, max_steps=4).train()
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    os.rename(tmp_path / "run", tmp_path / "elsewhere")
    trainer = build(tmp_path / "elsewhere", **arguments, max_steps=8)
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.best_global_step == 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / "elsewhere" / "checkpoint-2")
    assert_equal(trainer.model.state_dict(), saved)
