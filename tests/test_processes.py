"""One result, however many processes: losses, gradients and metrics of 1, 2 and 4 of them, and of accumulation."""

import gc
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader
from transformers.loss.loss_for_object_detection import ImageLoss

from dit_detection import (
    DetectionAugmentation,
    DetectionDataset,
    DetectionTrainer,
    DetectionTrainingArguments,
    DiTDetectionImageProcessor,
    id2label_of,
)
from dit_detection.data import RepeatFactorSampler, draw_shapes_dataset
from dit_detection.model.labels import pad_labels
from dit_detection.model.modeling_dit_detection import DiTObjectDetectionOutput
from dit_detection.training.global_batch import num_repeated

pytestmark = pytest.mark.forks

ROOT = Path(__file__).parents[1]
SPLITS = {"train": 21, "validation": 3, "test": 7}
TIMES = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time"}


def in_processes(number: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """
    What `function(*args)` returns in each of several processes that torch.distributed joins.

    Forked: a new interpreter would take longer to import than the tests take to run.
    """
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_run, args=(rank, number, port, queue, function, args)) for rank in range(number)
    ]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    failures = [result for result in results.values() if isinstance(result, str)]
    assert not failures, "\n".join(failures)
    return [results[rank] for rank in range(number)]


def _run(rank: int, number: int, port: int, queue: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    gc.freeze()  # Trainer collects garbage: among all that this process has of its parent that takes a second
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)  # whatever tests before this one made
    GradientState._reset_state()
    try:
        queue.put((rank, function(*args)))
    except BaseException:
        queue.put((rank, traceback.format_exc()))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# gradients


def gradients_of_part(model: Any, batches: list[dict[str, Any]], num_items_in_batch: int | None) -> dict[str, Any]:
    """Gradients of this process's batch, as DDP would average them."""
    state = PartialState(cpu=True)
    model.train()
    loss = model(**batches[state.process_index], num_items_in_batch=num_items_in_batch).loss
    if num_items_in_batch is not None:
        loss = loss * state.num_processes  # as `Trainer` does
    loss.backward()
    return {name: parameter.grad.numpy() / state.num_processes for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("is_counted", [False, True])
def test_two_processes_take_the_gradient_of_the_joined_batch(tiny_model, random_labels, is_counted) -> None:
    # One image with objects and two without: the second process has a batch without any object.
    model = tiny_model().train()
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = [random_labels(4), random_labels(0), random_labels(0)]
    model(pixel_values=pixels, labels=labels).loss.backward()
    matched = model.match_anchors(pad_labels(labels, 3), pixel_values=pixels)
    count = int((matched >= 0).sum())
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}

    model.zero_grad()
    batches = [{"pixel_values": pixels[:2], "labels": labels[:2]}, {"pixel_values": pixels[2:], "labels": labels[2:]}]
    one, two = in_processes(2, gradients_of_part, model, batches, count if is_counted else None)
    for name, gradient in expected.items():  # every parameter has one in both: DDP waits for nothing
        torch.testing.assert_close(torch.from_numpy(one[name] + two[name]), gradient, rtol=1e-4, atol=1e-6)


def detr_gradient(boxes: torch.Tensor, parts: list[slice], targets: list[dict[str, torch.Tensor]]) -> Any:
    """Of DETR's box loss in transformers, averaged over processes as DDP does."""
    state = PartialState(cpu=True)
    part = parts[state.process_index]
    boxes = boxes[part].clone().requires_grad_()

    def in_order(outputs: Any, targets: Any) -> Any:
        return [(torch.arange(len(target["boxes"])),) * 2 for target in targets]

    loss = ImageLoss(in_order, num_classes=3, eos_coef=0.1, losses=["boxes"])
    loss({"pred_boxes": boxes, "logits": torch.zeros(len(boxes), 5, 4)}, targets[part])["loss_bbox"].backward()
    return boxes.grad.numpy() / state.num_processes


def test_the_loss_of_detr_is_off_by_the_number_of_processes(random_labels) -> None:
    # It divides by the processes' mean number of boxes, and that once more by the number of processes. The test above
    # asks the same of ours, and gets 1. Should this one fail, transformers has mended it.
    targets = [random_labels(3, 0), random_labels(5, 1), random_labels(4, 2)]
    boxes = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2
    (whole,) = in_processes(1, detr_gradient, boxes, [slice(3)], targets)
    parts = in_processes(2, detr_gradient, boxes, [slice(2), slice(2, 3)], targets)
    joined = torch.from_numpy(parts[0]), torch.from_numpy(parts[1])
    torch.testing.assert_close(torch.cat(joined), 2 * torch.from_numpy(whole))


@pytest.mark.parametrize("overrides", [{}, {"strides": [4, 8]}, {"neck_channels": None, "strides": [16]}])
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (50, 37)])
def test_anchors_matched_beforehand_are_those_of_the_forward_pass(tiny_model, random_labels, overrides, size) -> None:
    sizes = {"anchor_sizes": [[4.0 * stride] for stride in overrides.get("strides", [8, 16, 32])]}
    model = tiny_model(**overrides, **sizes).train()
    mask = torch.zeros(2, *size)
    mask[0], mask[1, :30, :20] = 1, 1
    batch = {"pixel_values": torch.randn(2, 3, *size), "pixel_mask": mask}
    labels = pad_labels([random_labels(6, 0), random_labels(3, 1)], 3)
    expected = model(**batch, labels=labels)
    matched = model.match_anchors(labels, **batch)
    assert matched.shape == expected.logits.shape[:2]
    outputs = model(**batch, labels=labels | {"matched_idxs": matched})
    assert torch.equal(outputs.loss, expected.loss)
    outputs = model(**batch, labels=labels, num_items_in_batch=2 * (matched >= 0).sum())
    torch.testing.assert_close(outputs.loss, expected.loss / 2)

    model.freeze_backbone(1)
    frozen = model.model.encode_frozen(batch["pixel_values"])
    labels["size"] = torch.tensor([size, (30, 20)], dtype=torch.float32)
    assert torch.equal(model.match_anchors(labels, frozen_states=frozen["frozen_states"]), matched)


# order of the images


class Indices(torch.utils.data.Dataset):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def global_batches(num_images: int, repeat: float, number: int, size: int, skip: int = 0, **options: Any) -> Any:
    """The images of each step of an epoch, without those that accelerate repeats, whichever process has them."""
    steps: list[list[int]] = []
    for process_index in range(number):
        torch.manual_seed(7)
        repeating = {"sampler": RepeatFactorSampler([repeat] * num_images, 5)} if repeat > 1 else {"shuffle": True}
        loader = prepare_data_loader(
            DataLoader(Indices(num_images), batch_size=size, **repeating, **options),
            num_processes=number,
            process_index=process_index,
            use_seedable_sampler=True,
        )
        if skip:
            loader = skip_first_batches(loader, skip)
        for step, batch in enumerate(loader):
            own = batch.tolist()
            if loader.end_of_dataloader:
                own = own[: len(own) - num_repeated(loader, len(own))]
            if process_index == 0:
                steps.append([])
            steps[step] += own
    return steps


@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"num_workers": 0, "skip": 1}])
@pytest.mark.parametrize("repeat", [1.0, 1.3])
@pytest.mark.parametrize("num_images", [1, 7, 16, 21, 24, 29])
def test_every_number_of_processes_sees_the_same_images_in_a_step(num_images, repeat, options) -> None:
    expected = global_batches(num_images, repeat, 1, 8, **options)
    for number in (2, 4):
        assert global_batches(num_images, repeat, number, 8 // number, **options) == expected
    length = num_images if repeat == 1 else len(RepeatFactorSampler([repeat] * num_images, 5))
    skipped = 8 * options.get("skip", 0)
    whole = length // 8 * 8 if "drop_last" in options else length
    assert sum(map(len, expected)) == max(0, whole - skipped)


# training


def sparse_rows(num_images: int, seed: int) -> Any:
    """Drawn shapes, two thirds of the images without any."""
    rows = draw_shapes_dataset(num_images, 0, 0, image_size=(48, 64), seed=seed)["train"]
    return datasets.Dataset.from_list(
        [
            row if index % 3 == 0 else {**row, "objects": {name: [] for name in row["objects"]}}
            for index, row in enumerate(rows.cast_column("image", datasets.Image(decode=False)))
        ],
        features=rows.features,
    )


def train(model: Any, folder: str, rows: Any, per_process: int, accumulation: int, options: dict[str, Any]) -> Any:
    """The entries that a training run logs, one per step."""
    image_processor = DiTDetectionImageProcessor(size=64)
    arguments = DetectionTrainingArguments(
        folder,
        use_cpu=True,
        disable_tqdm=True,
        max_steps=6,
        learning_rate=1e-3,
        warmup_steps=1,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="no",
        eval_strategy="no",
        load_best_model_at_end=False,
        per_device_train_batch_size=per_process,
        gradient_accumulation_steps=accumulation,
        **options,
    )
    dataset = DetectionDataset(rows, image_processor, DetectionAugmentation(), seed=2, num_views=2)
    trainer = DetectionTrainer(model, arguments, processing_class=image_processor, train_dataset=dataset)
    trainer.train()
    return trainer.state.log_history[:-1]


@pytest.mark.slow
@pytest.mark.parametrize("is_frozen", [False, True])
def test_losses_do_not_depend_on_processes_and_accumulation(tiny_model, tmp_path, is_frozen) -> None:
    # 21 images: the last step of an epoch has 5, with 4 processes of 2 images 2, 2, 1 and none. Seven have objects.
    rows = sparse_rows(21, seed=3)
    names = id2label_of(rows)
    model = tiny_model(num_labels=5, id2label=names, label2id={name: label for label, name in names.items()})
    options: dict[str, Any] = {}
    if is_frozen:
        model.freeze_backbone(1)
        options = {"cache_frozen": True, "frozen_cache_dir": str(tmp_path), "repeat_factor_threshold": 0.4}
    ways = [(1, 8, 1), (2, 4, 1), (4, 1, 2)] if is_frozen else [(1, 8, 1), (1, 4, 2), (4, 2, 1), (2, 1, 4)]
    runs = [
        in_processes(number, train, model, str(tmp_path), rows, size, steps, options)[0]
        for number, size, steps in ways
    ]
    for entries in runs[1:]:
        assert len(entries) == len(runs[0]) == 6
        for entry, expected in zip(entries, runs[0], strict=True):
            assert entry["loss"] == pytest.approx(expected["loss"], abs=1e-5)
            assert entry["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
            assert entry["learning_rate"] == expected["learning_rate"]


# evaluation


class NoisyTruth(nn.Module):
    """Detections of an image that follow from its labels and its number: some good, some bad."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, labels: list[dict[str, torch.Tensor]], **inputs: Any) -> DiTObjectDetectionOutput:
        logits, boxes = torch.full((len(labels), 12, 5), -9.0), torch.rand(1, 12, 4).expand(len(labels), 12, 4) * 0
        for image, image_labels in enumerate(labels):
            generator = torch.Generator().manual_seed(int(image_labels["image_id"]))
            boxes[image] = torch.rand(12, 4, generator=generator) * 0.3 + 0.1
            count = len(image_labels["boxes"])
            noise = torch.randn(count, 4, generator=generator) * 0.02
            boxes[image, :count] = (image_labels["boxes"] + noise).clamp(0.05, 0.95)
            columns = torch.randint(5, (12,), generator=generator)
            columns[:count] = image_labels["class_labels"]
            logits[image, torch.arange(12), columns] = torch.randn(12, generator=generator)
        return DiTObjectDetectionOutput(logits=logits, pred_boxes=boxes, loss_per_image=logits.mean(dim=(1, 2)))


def evaluate(config: Any, folder: str, sets: list[Any], batch_sizes: list[int]) -> list[dict[str, float]]:
    """The metrics of each set with each batch size."""
    image_processor = DiTDetectionImageProcessor(size=64)
    results = []
    for batch_size in batch_sizes:
        arguments = DetectionTrainingArguments(
            folder, use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=batch_size
        )
        trainer = DetectionTrainer(
            NoisyTruth(config), arguments, processing_class=image_processor, eval_dataset=sets[0]
        )
        for rows in sets:
            metrics = trainer.evaluate(DetectionDataset(rows, image_processor))
            results.append({name: value for name, value in metrics.items() if name not in TIMES})
    return results


@pytest.mark.slow
def test_metrics_do_not_depend_on_processes_and_batch_sizes(tiny_config, tmp_path) -> None:
    # One image for four processes; a part without any object for each but the first; nine images; no object at all.
    rows = draw_shapes_dataset(9, 0, 0, image_size=64, seed=5)["train"]
    names = id2label_of(rows)
    config = tiny_config(num_labels=5, id2label=names, label2id={name: label for label, name in names.items()})
    sets = [rows.select([1]), sparse_rows(5, seed=3), rows, sparse_rows(9, seed=6).select([1, 2, 4, 5, 7])]
    expected = in_processes(1, evaluate, config, str(tmp_path), sets, [1])[0]
    assert 0.1 < expected[2]["eval_map"] < 0.9
    for number, batch_sizes in ((1, [4, 16]), (2, [1, 3]), (4, [1, 2])):
        for found in in_processes(number, evaluate, config, str(tmp_path), sets, batch_sizes):  # the same everywhere
            assert len(found) == len(sets) * len(batch_sizes)
            for index, metrics in enumerate(found):
                assert metrics == pytest.approx(expected[index % len(sets)], abs=1e-6)


# the command


def launch(folder: Path, number: int) -> Path:
    """What `accelerate launch scripts/train.py` leaves: 20 steps of 8 images, by that many processes."""
    job = ["--random_dit", "tiny", "--image_size", "64", "--bf16", "False", "--disable_tqdm", "True", "--use_cpu"]
    job += ["--dataset", str(folder / "data"), "--max_steps", "20", "--logging_strategy", "steps"]
    job += ["--logging_steps", "1", "--learning_rate", "1e-3", "--eval_strategy", "no", "--save_strategy", "no"]
    job += ["--load_best_model_at_end", "False", "--output_dir", str(folder / str(number))]
    job += ["--per_device_train_batch_size", str(8 // number), "--per_device_eval_batch_size", str(number)]
    # With --cpu accelerate (1.15) starts one process, whatever --num_processes says, unless there is mpirun.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu" if number > 1 else "--cpu"]
    launcher += ["--num_processes", str(number), "--num_machines", "1", "--main_process_port", "0"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    run = subprocess.run(
        [*launcher, str(ROOT / "scripts" / "train.py"), *job],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return folder / str(number)


@pytest.mark.parametrize("number", [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.long)])
def test_accelerate_launch_gives_the_same_losses_and_metrics(tmp_path, number) -> None:
    rows = {split: sparse_rows(number, seed) for seed, (split, number) in enumerate(SPLITS.items())}
    datasets.DatasetDict(rows).save_to_disk(str(tmp_path / "data"))
    logs, metrics = {}, {}
    for count in (1, number):
        folder = launch(tmp_path, count)
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        logs[count] = [entry["loss"] for entry in history if "loss" in entry]
        assert history[0]["epoch"] == pytest.approx(1 / 3)  # 8 of 21 images a step: there were that many processes
        metrics[count] = json.loads((folder / "test_results.json").read_text())
    assert len(logs[1]) == 20 and metrics[1]["test_loss"] > 0
    assert logs[number] == pytest.approx(logs[1], abs=1e-4)
    for name in ("test_map", "test_map_50", "test_mar_100"):
        assert metrics[number][name] == pytest.approx(metrics[1][name], abs=1e-6)
