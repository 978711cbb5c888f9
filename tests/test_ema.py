import os
import signal
import subprocess
import sys
import textwrap

import pytest
import tiny_training
import torch
from tiny_training import label_fields
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from dit_detection import (
    DiTForObjectDetection,
    add_lora,
    id2label_of,
)
from dit_detection.data import draw_shapes_dataset
from dit_detection.training.ema import EmaCallback

# Whole trainings: together they take longer than all the fast tests may.
pytestmark = pytest.mark.slow

# 8 images, 4 at a time: 2 steps in an epoch.
EPOCHS = 3


@pytest.fixture(scope="module")
def dataset():
    return draw_shapes_dataset(8, 3, 0, image_size=(48, 64))


@pytest.fixture
def make_trainer(tiny_model, dataset, tmp_path):
    def make(name="run", lora=False, freeze=0, callbacks=(), **arguments):
        model = tiny_model(**label_fields(dataset))
        if freeze:
            model.freeze_backbone(freeze)
        if lora:
            model = add_lora(model, 2)
        defaults = {
            "num_train_epochs": EPOCHS,
            "learning_rate": 1e-2,
            "load_best_model_at_end": False,
            "save_total_limit": None,
            "ema_decay": 0.5,
        }
        more = {"callbacks": list(callbacks)}
        return tiny_training.make_trainer(model, dataset, tmp_path / name, more, **(defaults | arguments))

    return make


class Watch(TrainerCallback):
    """Keeps a copy of the weights after each step, before anything is averaged, and at each evaluation."""

    def __init__(self):
        self.steps, self.evaluated = [], []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(weights_of(model))

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.evaluated.append(weights_of(model))


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def averages(steps, decay):
    """The definition, in float64: the first step's weights, then a share of each further step's."""
    result = [{name: value.double() for name, value in steps[0].items()}]
    for number, weights in enumerate(steps[1:], start=2):
        kept = min(decay, (1 + number) / (10 + number))
        result.append({name: kept * result[-1][name] + (1 - kept) * weights[name].double() for name in weights})
    return result


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_averages_by_definition(make_trainer, decay):
    watch, plain = Watch(), Watch()
    make_trainer("averaged", ema_decay=decay, callbacks=[watch], save_strategy="no").train()
    make_trainer("plain", ema_decay=None, callbacks=[plain], save_strategy="no").train()
    # Averaging does not touch the training itself.
    for ours, theirs in zip(watch.steps, plain.steps, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    expected = averages(watch.steps, decay)
    assert len(watch.evaluated) == EPOCHS and len(expected) == 2 * EPOCHS
    for evaluated, average in zip(watch.evaluated, expected[1::2], strict=True):
        for name, value in evaluated.items():
            torch.testing.assert_close(value.double(), average[name], atol=1e-6, rtol=1e-5)
    first, weights = watch.evaluated[0], watch.steps[1]
    assert any((first[name] - weights[name]).abs().max() > 1e-3 for name in first)


@pytest.mark.parametrize("lora", [False, True])
def test_resumed_equals_uninterrupted(make_trainer, tmp_path, lora):
    whole, watch = make_trainer("whole", lora), Watch()
    whole.train()
    resumed = make_trainer("resumed", lora, callbacks=[watch])
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert len(watch.steps) == 2 * EPOCHS - 2
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    # The weights behind the averages, too.
    for ours, theirs in zip(whole.optimizer.state.values(), resumed.optimizer.state.values(), strict=True):
        assert torch.equal(ours["ema"], theirs["ema"])


class SaveAt(TrainerCallback):
    """Asks for an evaluation and a checkpoint after a step; nobody else does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_evaluate = control.should_save = True


class Terminated(TrainerCallback):
    """As if SIGTERM had come some seconds before a hook that `enable_jit_checkpoint` looks at."""

    def __init__(self, trainer, hook):
        self.trainer, self.step = trainer, 3 if hook == "on_step_end" else 2
        setattr(self, hook, self.request)

    def request(self, args, state, control, **kwargs):
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, JITCheckpointCallback) and state.global_step == self.step:
                callback.jit_manager.is_checkpoint_requested = True


SELDOM = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 100, "save_steps": 100}


def test_a_run_with_averages_does_not_go_on_without(make_trainer, tmp_path):
    # Its checkpoints have them in the place of the weights, beside the moments of these.
    make_trainer(ema_decay=0.9, max_steps=2, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match=r"checkpoint-2 averages its weights: go on with --ema_decay"):
        make_trainer(max_steps=3, ema_decay=None).train(resume_from_checkpoint=True)


def test_who_asks_late_gets_averages_too(make_trainer, tmp_path):
    watch = Watch()
    whole = make_trainer(callbacks=[watch], **SELDOM)
    whole.add_callback(SaveAt(3))
    whole.train()
    saved = DiTForObjectDetection.from_pretrained(tmp_path / "run" / "checkpoint-3")
    expected = averages(watch.steps, 0.5)[2]
    for name, value in weights_of(saved).items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-5)
        assert torch.equal(value, watch.evaluated[0][name]), name
    resumed = make_trainer("resumed", **SELDOM)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for name, value in weights_of(whole.model).items():
        assert torch.equal(weights_of(resumed.model)[name], value), name


@pytest.mark.parametrize("hook", ["on_step_begin", "on_substep_end", "on_step_end"])
def test_a_run_that_is_terminated_goes_on(make_trainer, tmp_path, monkeypatch, hook):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    accumulating = {**SELDOM, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = make_trainer("whole", **accumulating)
    whole.train()
    trainer = make_trainer(enable_jit_checkpoint=True, **accumulating)
    trainer.callback_handler.callbacks.insert(0, Terminated(trainer, hook))
    trainer.train()
    assert trainer.state.global_step in (2, 3)
    resumed = make_trainer(**accumulating)
    resumed.train(resume_from_checkpoint="last")
    assert resumed.state.global_step == whole.state.global_step == 2 * EPOCHS
    for name, value in weights_of(whole.model).items():
        assert torch.equal(weights_of(resumed.model)[name], value), name


def test_checkpoints_hold_what_was_evaluated(make_trainer, tmp_path):
    watch = Watch()
    trainer = make_trainer(callbacks=[watch], eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2)
    trainer.train()
    for step, evaluated in zip((2, 4, 6), watch.evaluated, strict=True):
        saved = DiTForObjectDetection.from_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        for name, value in weights_of(saved).items():
            assert torch.equal(value, evaluated[name]), name
    for name, value in weights_of(trainer.model).items():
        assert torch.equal(value, watch.evaluated[-1][name]), name


@pytest.mark.parametrize("eval_steps", [2, 4])  # at the end, or not
def test_the_best_averages_are_kept(make_trainer, eval_steps):
    watch = Watch()
    trainer = make_trainer(
        callbacks=[watch],
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=eval_steps,
        save_steps=eval_steps,
        learning_rate=3e-2,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = watch.evaluated[losses.index(min(losses))]
    for name, value in weights_of(trainer.model).items():
        assert torch.equal(value, best[name]), name


def test_without_evaluation_training_ends_with_averages(make_trainer):
    watch = Watch()
    trainer = make_trainer(callbacks=[watch], eval_strategy="no", save_strategy="no")
    trainer.train()
    expected = averages(watch.steps, 0.5)[-1]
    for name, value in weights_of(trainer.model).items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-5)
    # A second training begins with new averages.
    watch.steps.clear()
    trainer.train()
    expected = averages(watch.steps, 0.5)[-1]
    for name, value in weights_of(trainer.model).items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-5)


def test_what_is_frozen_has_no_average(make_trainer):
    trainer = make_trainer(freeze=1, save_strategy="no")
    trainer.train()
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    assert {names[parameter] for parameter, state in trainer.optimizer.state.items() if "ema" in state} == trained
    assert 0 < len(trained) < len(names)


def test_an_optimizer_without_state_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"needs an optimizer that keeps a state, .* optim='sgd' has none"):
        make_trainer(optim="sgd").train()


@pytest.mark.parametrize("decay", [0, 1, -0.5, 1.5, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        EmaCallback(decay)


TWO_PROCESSES = """
    import sys
    import torch
    from dit_detection import (DetectionDataset, DetectionTrainer, DetectionTrainingArguments,
        DiTDetectionImageProcessor, DiTForObjectDetection)
    from dit_detection.data import draw_shapes_dataset

    torch.set_num_threads(1)
    folder, output_dir, batch_size, resume = sys.argv[1:]
    processor = DiTDetectionImageProcessor(size=64)
    dataset = draw_shapes_dataset(8, 3, 0, image_size=(48, 64))
    trainer = DetectionTrainer(
        DiTForObjectDetection.from_pretrained(folder),
        DetectionTrainingArguments(output_dir, use_cpu=True, per_device_train_batch_size=int(batch_size),
            num_train_epochs=2, ema_decay=0.5, learning_rate=1e-2, disable_tqdm=True, report_to="none",
            load_best_model_at_end=False, save_total_limit=None),
        processing_class=processor,
        train_dataset=DetectionDataset(dataset["train"], processor),
        eval_dataset=DetectionDataset(dataset["validation"], processor),
    )
    trainer.train(resume_from_checkpoint=resume or None)
    torch.save(trainer.model.state_dict(), f"{output_dir}/rank{trainer.args.process_index}.pt")
    trainer.accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_have_the_same_averages(tiny_model, dataset, tmp_path):
    names = id2label_of(dataset)
    label2id = {name: label for label, name in names.items()}
    tiny_model(num_labels=5, id2label=names, label2id=label2id).save_pretrained(tmp_path / "model")
    script = tmp_path / "training.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES))

    def train(count, batch_size, resume=""):
        output_dir = tmp_path / f"{count}{bool(resume)}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "--standalone"]
        subprocess.run(
            [*launcher, str(script), str(tmp_path / "model"), str(output_dir), str(batch_size), resume],
            check=True,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return [torch.load(output_dir / f"rank{rank}.pt", weights_only=True) for rank in range(count)]

    (single,) = train(1, 4)
    first, second = train(2, 2)
    resumed, _ = train(2, 2, str(tmp_path / "2False" / "checkpoint-2"))
    for name, value in first.items():
        assert torch.equal(second[name], value) and torch.equal(resumed[name], value), name
        torch.testing.assert_close(value, single[name], atol=1e-3, rtol=0)
