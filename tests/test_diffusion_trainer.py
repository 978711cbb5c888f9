from functools import partial

import numpy as np
import pytest
import torch
from pretraining_runs import write_ten_images
from test_processes import in_processes

from dit_detection.pretraining.diffusion_model import DiffusionModel
from dit_detection.pretraining.diffusion_trainer import (
    BEGAN_WITH,
    FINGERPRINT,
    DiffusionTrainer,
    PretrainingArguments,
)
from dit_detection.pretraining.image_sources import list_training_images
from dit_detection.pretraining.image_views import CentreCrops, DecodedImages, FixedNoise, NoisedViews, RandomCrops
from dit_detection.pretraining.new_dit import new_dit, new_scheduler
from dit_detection.pretraining.sampling import sample_images
from dit_detection.training.checkpoint_files import CHECKSUMS
from dit_detection.training.fault_tolerant_trainer import NonFiniteLossError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_ten_images(tmp_path_factory.mktemp("images"))


def trained_on(images, output_dir, batch_size, max_steps=3, resume_from=None, began_with=None, **arguments):
    """A tiny DiT trained on a folder, and the log."""
    torch.manual_seed(0)
    model = DiffusionModel(new_dit("tiny", 16), new_scheduler("sample", on_pixels=True))
    pixels = DecodedImages(list_training_images([str(images)]), 32, 10**9)
    fixed = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
    args = PretrainingArguments(
        str(output_dir), per_device_train_batch_size=batch_size, max_steps=max_steps, **(fixed | arguments)
    )
    trainer = DiffusionTrainer(
        model,
        args,
        vae=None,
        began_with=began_with,
        train_dataset=NoisedViews(RandomCrops(pixels, range(8), 16, 0.5, seed=0), seed=0),
        eval_dataset=FixedNoise(CentreCrops(pixels, range(8, 10), 16), seed=0),
    )
    trainer.train(resume_from)
    return model, trainer.state.log_history


def losses_in(log):
    return [entry[name] for entry in log for name in ("loss", "eval_loss") if name in entry]


def losses_of(*args, **kwargs):
    return losses_in(trained_on(*args, **kwargs)[1])


def test_samples_that_cannot_be_drawn_do_not_end_the_training(images, tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise ValueError("no such sampler")

    monkeypatch.setattr("dit_detection.pretraining.diffusion_trainer.sample_images", fail)
    assert len(losses_of(images, tmp_path, 8, max_steps=1, eval_steps=1)) == 2
    assert "No samples could be drawn after step 1: no such sampler" in caplog.text


def test_a_step_that_is_not_finite_ends_with_what_helps_in_pretraining(images, tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"Step 2 is not finite: loss inf, .*lower --learning_rate") as error:
        trained_on(images, tmp_path, 8, eval_strategy="no", learning_rate=1e30, max_grad_norm=1e30, warmup_steps=0)
    assert "dit-detect check" not in str(error.value) and "images []" not in str(error.value)
    assert (tmp_path / "not_finite_step_2.json").is_file()


def test_checkpoints_of_before_tell_the_images_alone(images, tmp_path):
    pretrained = partial(trained_on, images, tmp_path, 4, eval_strategy="no")
    pretrained(1, began_with={"images": "a", "seed": 0}, save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / BEGAN_WITH).unlink()
    (checkpoint / CHECKSUMS).unlink()
    (checkpoint / FINGERPRINT).write_text("a\n")
    with pytest.raises(ValueError, match=r"checkpoint-1 .*other images:"):
        pretrained(2, checkpoint, began_with={"images": "b", "seed": 1})
    pretrained(2, checkpoint, began_with={"images": "a", "seed": 1})


@pytest.mark.slow
def test_a_run_that_goes_on_ends_as_one_that_was_never_interrupted(images, tmp_path):
    # In mid-epoch, with moving averages, and with an evaluation in between.
    steps = {"max_steps": 5, "eval_steps": 2, "save_samples": False, "logging_steps": 1}
    expected, log = trained_on(
        images, tmp_path / "run", 3, save_strategy="steps", save_steps=4, save_total_limit=2, **steps
    )
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    resumed, resumed_log = trained_on(images, tmp_path / "other", 3, resume_from=checkpoint, **steps)
    weights = resumed.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in expected.state_dict().items())
    assert len(losses_in(log)) == 8 and losses_in(log) == losses_in(resumed_log)


def test_accumulation_has_the_losses_of_one_batch(images, tmp_path):
    # Of 8 images: the last of three batches is a smaller one.
    options = {"max_steps": 2, "eval_strategy": "no", "logging_steps": 1}
    expected = losses_of(images, tmp_path, 8, **options)
    accumulated = losses_of(images, tmp_path, 3, gradient_accumulation_steps=3, **options)
    assert len(expected) == 2 and accumulated == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.forks
def test_two_processes_fill_up_the_last_batch_without_a_trace(images, tmp_path):
    # Of 8 images: 6, then 2, which one process has.
    options = {"max_steps": 4, "eval_steps": 4, "save_samples": False, "logging_steps": 1}
    expected = losses_of(images, tmp_path, 6, **options)
    for losses in in_processes(2, partial(losses_of, **options), images, tmp_path, 3):
        assert losses == pytest.approx(expected, rel=1e-5)


def held_out_loss(images, output_dir, batch_size, drop_last=False):
    """Of 128 held-out views, of which batches of 48 leave 32."""
    options = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_samples": False}
    options |= {"per_device_eval_batch_size": batch_size, "dataloader_drop_last": drop_last}
    return losses_of(images, output_dir, 4, **options)[-1]


@pytest.mark.slow
def test_no_view_is_left_out_of_the_held_out_loss_and_each_counts_as_much(images, tmp_path):
    expected = held_out_loss(images, tmp_path, 128)
    assert held_out_loss(images, tmp_path, 48) == pytest.approx(expected, rel=1e-6)
    assert held_out_loss(images, tmp_path, 48, drop_last=True) == pytest.approx(expected, rel=1e-6)
    assert held_out_loss(images, tmp_path, 200, drop_last=True) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.forks
def test_the_held_out_loss_of_two_processes_is_that_of_one(images, tmp_path):
    one, two = in_processes(2, held_out_loss, images, tmp_path, 48)
    # Steps of 4 and of 8 images differ: the same ones are taken.
    expected = losses_of(images, tmp_path, 8, max_steps=1, eval_strategy="steps", eval_steps=1, save_samples=False)[-1]
    assert one == two == pytest.approx(expected, rel=1e-6)


def test_an_epoch_without_a_batch_is_no_training(images, tmp_path):
    message = "8 images make no batch of 9, .*dataloader_drop_last"
    with pytest.raises(ValueError, match=message):
        trained_on(images, tmp_path, 9, dataloader_drop_last=True)
    trained_on(images, tmp_path, 8, max_steps=1, eval_strategy="no", dataloader_drop_last=True)


@pytest.mark.slow
@pytest.mark.forks
def test_two_processes_have_the_losses_of_one(images, tmp_path):
    expected = losses_of(images, tmp_path / "one", 4, eval_steps=1, save_samples=False)
    assert len(expected) == 6
    accumulated = losses_of(images, tmp_path / "two", 2, eval_steps=1, gradient_accumulation_steps=2)
    assert accumulated == pytest.approx(expected, rel=1e-4)
    for losses in in_processes(2, losses_of, images, tmp_path / "both", 2):
        assert losses[-1] == pytest.approx(expected[-1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sample", "flow"])
def test_what_is_learned_can_be_sampled(objective):
    # Two flat images: a network that learned anything draws these and nothing between.
    torch.manual_seed(0)
    model = DiffusionModel(new_dit("tiny", 8), new_scheduler(objective, on_pixels=True))
    images = torch.tensor([30, 220], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8).repeat(16, 1, 1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(400):
        time = torch.rand(32, generator=generator)
        loss = model(images, time, torch.arange(32) + 32 * step)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-50:]) < 0.5 * np.mean(losses[:3])
    means = np.array([np.asarray(image).mean() for image in sample_images(model, None, 16, seed=1)])
    assert np.minimum(abs(means - 30), abs(means - 220)).max() < 60
    assert means.min() < 90 and means.max() > 160
