"""Training on streams, several passes of them: the steps, and what a run does that goes on."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import label_fields

from dit_detection import (
    DetectionAugmentation,
    DetectionIterableDataset,
    DetectionTrainer,
    DetectionTrainingArguments,
    DiTDetectionImageProcessor,
)
from dit_detection.data import draw_shapes_dataset

# Whole trainings: together they take longer than all the fast tests may.
pytestmark = pytest.mark.slow


class Watched(DetectionTrainer):
    """Remembers the images of each step, and whether its gradients began at zero."""

    def get_batch_samples(self, *args):
        if not hasattr(self, "seen"):
            self.seen, self.left = [], []
        samples = super().get_batch_samples(*args)
        self.seen.append([int(image_id) for batch in self._image_ids for image_id in batch])
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.left.append(bool(samples[0]) and any(bool(gradient.any()) for gradient in gradients))
        return samples


@pytest.fixture(scope="module")
def dataset():
    return draw_shapes_dataset(12, 3, 0, image_size=(48, 64))


@pytest.fixture
def run(dataset, tiny_model, tmp_path):
    def run(name, resume=None, **arguments):
        image_processor = DiTDetectionImageProcessor(size=64)
        rows = dataset["train"].to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=100)
        defaults = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 1, "max_steps": 8}
        trainer = Watched(
            tiny_model(**label_fields(dataset)),
            DetectionTrainingArguments(
                str(tmp_path / name),
                use_cpu=True,
                disable_tqdm=True,
                report_to="none",
                per_device_train_batch_size=4,
                load_best_model_at_end=False,
                save_total_limit=None,
                **(defaults | arguments),
            ),
            processing_class=image_processor,
            train_dataset=DetectionIterableDataset(rows, image_processor, DetectionAugmentation(), seed=1),
            eval_dataset=DetectionIterableDataset(rows, image_processor),
        )
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        return trainer

    return run


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({}, (1, 3, 5, 7)),  # three steps are a pass: within one, and where it ends
        ({"save_strategy": "epoch", "eval_strategy": "epoch"}, (3, 6)),
        ({"gradient_accumulation_steps": 2, "max_steps": 4}, (1, 2, 3)),  # a step and a half
    ],
)
def test_a_run_that_goes_on_sees_what_is_left(run, tmp_path, arguments, steps):
    whole = run("whole", **arguments)
    expected = weights(whole)
    for step in steps:
        resumed = run("resumed", f"whole/checkpoint-{step}", **arguments)
        seen = [images for images in resumed.seen if images]
        assert seen == [images for images in whole.seen if images][-len(seen) :]
        for name, value in weights(resumed).items():
            assert torch.equal(value, expected[name]), (step, name)
        history, again = (
            [entry for entry in one.state.log_history if "eval_loss" in entry] for one in (whole, resumed)
        )
        assert [entry["step"] for entry in again] == [entry["step"] for entry in history]


def test_a_run_that_is_done_takes_no_step(run, tmp_path):
    run("whole")
    done = run("whole", "whole/checkpoint-8")
    assert done.state.global_step == 8 and not hasattr(done, "seen")
    for name, value in load_file(tmp_path / "whole" / "checkpoint-8" / "model.safetensors").items():
        assert torch.equal(done.model.state_dict()[name], value)


def test_a_longer_run_goes_on_where_the_shorter_one_was(run):
    expected = run("whole", max_steps=8, lr_scheduler_type="constant", warmup_steps=0)
    run("short", max_steps=4, lr_scheduler_type="constant", warmup_steps=0)
    longer = run("longer", "short/checkpoint-4", max_steps=8, lr_scheduler_type="constant", warmup_steps=0)
    assert longer.seen == expected.seen[-len(longer.seen) :]
    for name, value in weights(longer).items():
        assert torch.equal(value, weights(expected)[name]), name


def test_what_a_pass_leaves_over_is_not_in_the_next_step(run):
    trainer = run("run", gradient_accumulation_steps=2, max_steps=3)
    assert not any(trainer.left)


def test_epochs_are_passes(run, tmp_path):
    trainer = run("run", logging_strategy="epoch")
    state = json.loads((tmp_path / "run" / "checkpoint-8" / "trainer_state.json").read_text())
    assert [entry["epoch"] for entry in trainer.state.log_history if "loss" in entry][:2] == [1, 2]
    assert 2 < state["epoch"] < 3
