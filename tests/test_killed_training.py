"""Training that is killed, anywhere, and goes on: to the same weights as if nothing had happened."""

import gc
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file

from dit_detection import (
    DetectionAugmentation,
    DetectionDataset,
    DetectionTrainer,
    DetectionTrainingArguments,
    DiTDetectionImageProcessor,
)
from dit_detection.data import draw_shapes_dataset
from dit_detection.training import frozen_cache
from dit_detection.training.checkpoint_files import (
    checkpoints_of,
    damage_of,
    delete_checkpoint,
    last_whole_checkpoint,
    publish_checkpoint,
    rotate_checkpoints,
)

# Where a kill can hit, as what is called there.
pytestmark = pytest.mark.forks

PHASES = {
    "reading": (DetectionTrainer, "get_batch_samples"),
    "step": (DetectionTrainer, "training_step"),
    "evaluation": (DetectionTrainer, "evaluation_loop"),
    "checkpoint": (DetectionTrainer, "_save_checkpoint"),
    "cache": (frozen_cache, "_write_shard"),
}


@pytest.fixture(scope="module")
def dataset():
    return draw_shapes_dataset(12, 3, 0, image_size=(48, 64))


# how to kill


def watch(phase: str, occurrence: int, kill_at: int | None, counts: list[int]) -> None:
    """
    Count the calls and returns of functions, C's included, in one call of a phase; kill this process at one of them.
    """
    owner, name = PHASES[phase]
    original = getattr(owner, name)
    calls = count()

    def watched(*args: Any, **kwargs: Any) -> Any:
        if next(calls) != occurrence:
            return original(*args, **kwargs)
        events = 0

        def on_event(frame: Any, event: str, argument: Any) -> None:
            nonlocal events
            events += 1
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(on_event)
        try:
            result = original(*args, **kwargs)
        finally:
            sys.setprofile(None)
        counts.append(events)
        if kill_at is not None:  # it took a shorter way than when it was counted
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, watched)


class NoisyTrainer(DetectionTrainer):
    """Draws from all global generators in each step."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        name = next(name for name in ("pixel_values", "frozen_states", "latents") if name in inputs)
        noise = torch.randn_like(inputs[name]) + random.random() + float(np.random.rand())
        return super().compute_loss(model, {**inputs, name: inputs[name] + 0.05 * noise}, *args, **kwargs)


def train(model: Any, dataset: Any, output_dir: Path, **arguments: Any) -> None:
    image_processor = DiTDetectionImageProcessor(size=64)
    if arguments.get("cache_frozen"):
        model.freeze_backbone(1)
    trainer = NoisyTrainer(
        model,
        DetectionTrainingArguments(
            **{
                "output_dir": str(output_dir),
                "frozen_cache_dir": str(output_dir / "cache"),
                "use_cpu": True,
                "disable_tqdm": True,
                "report_to": "none",
                "num_train_epochs": 6,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-3,
                "eval_strategy": "steps",
                "save_strategy": "steps",
                "logging_strategy": "steps",
                "eval_steps": 4,
                "save_steps": 4,
                "logging_steps": 4,
                "metric_for_best_model": "loss",
                "greater_is_better": False,
                **arguments,
            }
        ),
        processing_class=image_processor,
        train_dataset=DetectionDataset(
            dataset["train"], image_processor, DetectionAugmentation(), seed=3, num_views=2
        ),
        eval_dataset=DetectionDataset(dataset["validation"], image_processor),
    )
    trainer.train(resume_from_checkpoint="last")
    if trainer.is_world_process_zero():
        save_file(trainer.model.state_dict(), output_dir / "final.safetensors")
        losses = [
            (name, entry[name])
            for entry in trainer.state.log_history
            for name in ("loss", "eval_loss")
            if name in entry
        ]
        (output_dir / "losses.json").write_text(json.dumps(losses))


def start(number: int, plan: Any, make_model: Any, *args: Any, **kwargs: Any) -> tuple[bool, dict[str, list[int]]]:
    """
    Train in forked processes.

    Args:
        number: Processes.
        plan: `None`: none is killed, and events are counted; or (phase, occurrence, event, rank).

    Returns:
        Whether one was killed, and the events of each phase.
    """
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        gc.freeze()  # Trainer collects garbage: among all that this process has of its parent that takes a second
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if number > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        counts: dict[str, list[int]] = {phase: [] for phase in PHASES}
        if plan is None:
            for phase in PHASES:
                watch(phase, 1, None, counts[phase])
        elif plan[3] == rank:
            watch(plan[0], plan[1], plan[2], counts[plan[0]])
        train(make_model(), *args, **kwargs)
        if rank == 0:
            queue.put(counts)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    processes = [context.Process(target=run, args=(rank,)) for rank in range(number)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        time.sleep(0.02)
        if any(process.exitcode not in (None, 0) for process in processes):
            for process in processes:  # as launchers do
                process.kill()
                process.join()
    codes = [process.exitcode for process in processes]
    if -signal.SIGKILL in codes:
        return True, {}
    assert codes == [0] * number, codes
    return False, queue.get()


def kill_until_done(
    phases: list[str], seed: int, number: int, make_model: Any, dataset: Any, tmp_path: Path, **arguments: Any
) -> None:
    """Train once without and once with a kill for each of `phases`; compare all that is left."""
    _, counts = start(number, None, make_model, dataset, tmp_path / "whole", **arguments)
    generator = random.Random(seed)
    folder = tmp_path / "killed"
    for phase in phases:
        [events] = counts[phase]
        occurrence = generator.randrange(6) if phase in ("reading", "step") else generator.randrange(2)
        plan = (phase, occurrence, generator.randint(1, events), generator.randrange(number))
        was_killed, _ = start(number, plan, make_model, dataset, folder, **arguments)
        assert was_killed, f"{plan} came too late"
        assert all(damage_of(checkpoint) is None for checkpoint in checkpoints_of(folder))
    was_killed, _ = start(number, (phases[0], -1, 0, 0), make_model, dataset, folder, **arguments)
    assert not was_killed

    whole = tmp_path / "whole"
    assert [path.name for path in checkpoints_of(folder)] == [path.name for path in checkpoints_of(whole)]
    last = checkpoints_of(whole)[-1].name
    for name in ("final.safetensors", f"{last}/model.safetensors"):
        ours, theirs = load_file(folder / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value), (name, key)
    ours, theirs = (torch.load(run / last / "optimizer.pt", weights_only=True)["state"] for run in (folder, whole))
    for index, values in theirs.items():
        for key, value in values.items():
            assert torch.equal(ours[index][key], value), (index, key)
    assert (folder / "losses.json").read_text() == (whole / "losses.json").read_text()
    assert not list(tmp_path.rglob("unfinished"))


@pytest.mark.slow
def test_one_process_killed_over_and_over(tiny_model, dataset, tmp_path):
    phases = ["step", "checkpoint", "reading", "evaluation", "checkpoint"] * 4 + ["checkpoint"] * 2
    kill_until_done(
        phases, 0, 1, lambda: tiny_model(num_labels=5), dataset, tmp_path, num_train_epochs=12, ema_decay=0.9
    )


@pytest.mark.slow
def test_killed_while_the_frozen_part_is_cached(tiny_model, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_cache, "SHARD_BYTES", 16 * 2**10)
    kill_until_done(
        ["cache", "cache", "cache", "step", "checkpoint"],
        1,
        1,
        lambda: tiny_model(num_labels=5),
        dataset,
        tmp_path,
        cache_frozen=True,
        num_train_epochs=3,
    )


@pytest.mark.slow
def test_one_of_two_processes_killed(tiny_model, dataset, tmp_path):
    phases = ["step", "checkpoint", "evaluation", "checkpoint", "reading"]
    kill_until_done(phases, 2, 2, lambda: tiny_model(num_labels=5), dataset, tmp_path, num_train_epochs=9)


# checkpoints alone, killed everywhere


def write(folder: Path, text: str) -> Path:
    (folder / "part").mkdir(parents=True)
    for name in ("optimizer.pt", "part/more"):
        (folder / name).write_text(f"{text} of {name}" * 1000)
    return folder


def save(run_dir: Path, step: int) -> None:
    """As the trainer does, with a limit of 1."""
    unfinished = write(run_dir / "unfinished" / f"checkpoint-{step}", f"step {step}")
    rotate_checkpoints(run_dir, 1, {publish_checkpoint(unfinished)})


class Killed(BaseException):
    pass


def save_until(run_dir: Path, step: int, stop_at: int) -> bool:
    """Save, but no further than to the call or return of a function with this number; whether it came to an end."""
    events, is_done = 0, False

    def on_event(frame: Any, event: str, argument: Any) -> None:
        nonlocal events
        events += 1
        if events == stop_at and not is_done:
            raise Killed

    sys.setprofile(on_event)
    try:
        save(run_dir, step)
        is_done = True
    except (Killed, OSError):  # the second is what `rmtree` makes of the first
        if events < stop_at:
            raise
    finally:
        sys.setprofile(None)
    return is_done


@pytest.mark.parametrize("step", [2, 1])  # 1: another in the place of what is there
def test_stopped_everywhere_while_a_checkpoint_is_written(tmp_path, monkeypatch, step):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    seen = set()
    for stop_at in count(1, 4):
        run_dir = tmp_path / str(stop_at)
        save(run_dir, 1)
        is_done = save_until(run_dir, step, stop_at)
        found = last_whole_checkpoint(run_dir)
        seen.add(found and found.name)
        # Where it takes the place of another there is an instant without both; where not, never.
        assert found is not None or step == 1
        for checkpoint in checkpoints_of(run_dir):
            assert damage_of(checkpoint) is None
            assert (checkpoint / "optimizer.pt").read_text().startswith(f"step {checkpoint.name[-1]} of optimizer.pt")
        if is_done:
            break
    assert seen >= ({"checkpoint-1", "checkpoint-2"} if step == 2 else {"checkpoint-1"})
    assert [path.name for path in checkpoints_of(run_dir)] == [f"checkpoint-{step}"]


def test_the_newest_and_the_best_stay(tmp_path):
    # A run that begins anew in the folder of one that went further: 900 is old, whatever its number.
    for age, step in [(50, 900), (40, 800), (30, 2), (20, 4), (10, 6)]:
        publish_checkpoint(write(tmp_path / "unfinished" / f"checkpoint-{step}", str(step)))
        os.utime(tmp_path / f"checkpoint-{step}", (time.time() - age,) * 2)
    rotate_checkpoints(tmp_path, None, {tmp_path / "checkpoint-6"})
    assert len(checkpoints_of(tmp_path)) == 5
    rotate_checkpoints(tmp_path, 3, {tmp_path / "checkpoint-6", tmp_path / "checkpoint-2"})
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    rotate_checkpoints(tmp_path, 1, {tmp_path / "checkpoint-6", tmp_path / "checkpoint-2"})
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-2", "checkpoint-6"]
    delete_checkpoint(tmp_path / "checkpoint-6")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
