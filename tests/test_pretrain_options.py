import pytest
import torch
from pretraining_runs import NEW, QUIET, latent_pipeline, write_ten_images

from dit_detection import InvalidDatasetError
from dit_detection.commands import pretrain
from dit_detection.commands.pretrain_options import parse_options
from dit_detection.pretraining.diffusion_model import DiffusionModel
from dit_detection.pretraining.new_dit import new_dit, new_scheduler
from dit_detection.pretraining.run_cost import measure_step, step_cost
from dit_detection.training.cost import PeakMemory


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_ten_images(tmp_path_factory.mktemp("images"))


def test_a_dry_run_tells_and_leaves_nothing(tmp_path, capsys):
    argv = [*NEW, "--num_shapes", "3", "--max_steps", "7", "--output_dir", str(tmp_path / "run")]
    assert pretrain.main([*argv, "--dry_run"]) == {}
    out = capsys.readouterr().out
    for text in (
        "images      3, 1 of them held out, the others seen 14.0 times each",
        "parameters  1.",
        "GFLOP, forward and backward",
        "MB for a step of 4 images",
        "for 7 steps",
    ):
        assert text in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "length"),
    [
        (["--num_train_epochs", "2"], (6, 2)),  # each 21 images in 6 batches in 3 steps
        (["--num-train-epochs=1.5"], (5, 1.5)),
        (["--max_steps", "-1"], (9, 3)),
        (["--num_train_epochs", "2", "--max_steps", "7"], (7, 7 * 8 / 21)),
    ],
)
def test_epochs_become_steps(tmp_path, argv, length):
    argv = [*NEW, "--num_shapes", "22", "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path), *argv]
    assert pretrain.length_of(parse_options(argv)[1], 21) == length


def test_a_dry_run_on_latents_tells_how_long_they_take(tmp_path, capsys, monkeypatch):
    latent_pipeline().save_pretrained(tmp_path / "source")
    argv = [*QUIET, "--model", str(tmp_path / "source"), "--num_shapes", "3", "--num_views", "2"]
    counted = []  # with checkpointing or without: of so small a model the rounded costs may be the same
    monkeypatch.setattr(pretrain, "step_cost", lambda *args, **kw: counted.append(args[3]) or step_cost(*args, **kw))
    for checkpointing in ("False", "True"):
        options = ["--gradient_checkpointing", checkpointing, "--output_dir", str(tmp_path / "run"), "--dry_run"]
        assert pretrain.main([*argv, *options]) == {}
        assert " more, once, for 6 views" in capsys.readouterr().out
    assert counted == [False, True]


@pytest.mark.slow
def test_gradient_checkpointing_costs_operations_and_saves_memory():
    torch.manual_seed(0)
    model = DiffusionModel(new_dit("small", 128), new_scheduler("sample", on_pixels=True))
    clean, noise = torch.randn(2, 16, 3, 128, 128)
    kept = 12 * sum(weight.numel() for weight in model.parameters())
    counted = [step_cost(model, 16, torch.float32, flag, has_averages=False) for flag in (False, True)]
    held = []
    for enable in (lambda: None, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        with PeakMemory() as memory:
            model.loss_of(clean, noise, torch.linspace(0, 0.99, 16)).backward()
        held.append(memory.peak)
    (plain_flops, plain), (checkpointed_flops, checkpointed) = counted
    # The blocks, nearly all of it, go forward twice: four thirds of the operations.
    assert checkpointed_flops == pytest.approx(4 / 3 * plain_flops, rel=0.05)
    # As if the step were made; but what a block had computed once more is let go a little later.
    assert plain - kept == held[0]
    assert held[1] <= checkpointed - kept < 1.25 * held[1] < 0.6 * held[0]


def test_costs_are_counted_without_touching_the_model():
    torch.manual_seed(0)
    model = DiffusionModel(new_dit("tiny", 32), new_scheduler("sample", on_pixels=True))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    flops, num_bytes = step_cost(model, 4, torch.float32)
    # Per token and block 12 D² in the linear layers and 2 N D in the attention; of an image 6 D² and the embedders; in
    # and out 2 * 192 D; a multiplication and addition are two, forward and backward three times as many.
    tokens, width = 16, 128
    per_block = tokens * (12 * width**2 + 2 * tokens * width) + 6 * width**2 + 256 * width + width**2
    ends = tokens * 2 * 192 * width + 2 * width**2 + 256 * width + width**2
    assert flops == pytest.approx(6 * (4 * per_block + ends), rel=0.03)
    num_parameters = sum(weight.numel() for weight in model.parameters())
    assert 20 * num_parameters < num_bytes < 60 * num_parameters
    assert step_cost(model, 4, torch.float32, has_averages=False)[1] == num_bytes - 4 * num_parameters
    assert measure_step(model, 2, torch.float32, num_steps=1) > 0
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_defaults_are_those_of_the_size_unless_the_user_says_otherwise():
    for argv, rate in {
        ("--images", "x"): 1e-3,
        ("--images", "x", "--size", "B"): 1e-4,
        ("--images", "x", "--model", "y"): 1e-4,
        ("--images", "x", "--learning-rate", "3e-4"): 3e-4,
        ("--images", "x", "--learning_rate=2e-4"): 2e-4,
    }.items():
        assert parse_options(list(argv))[1].learning_rate == rate, argv
    assert parse_options([])[0].num_shapes == 500
    assert parse_options(["--num-shapes", "9"])[0].size == "small"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "x", "--images", "y", "--image_size", "64"], "--image_size: of a new DiT"),
        (["--model=x", "--images", "y", "--image-size=64", "--size", "S"], "--image_size, --size: of a new DiT"),
        (["--model", "x"], "--model needs --images"),
        (["--crop_area", "0"], "--crop_area 0.0 must lie above 0"),
        (["--validation_fraction", "1"], "--validation_fraction 1.0 must lie between"),
        (["--ema_decay", "1"], "--ema_decay 1.0 must be below 1"),
        (["--images", "x", "--num_views", "0"], "--num_views must be 1 or more"),
        (["--bf16_full_eval", "True"], "--bf16_full_eval casts the weights"),
        (["--fp16_full_eval", "True"], "--fp16_full_eval casts the weights"),
        (["--batch_eval_metrics", "True"], "--batch_eval_metrics is for metrics"),
        (["--push_to_hub", "True", "--output_dir", "x"], "hf upload USER/NAME x"),
    ],
)
def test_options_that_make_no_sense_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(argv)
    assert message in capsys.readouterr().err


def test_bad_images_are_refused_before_training(images, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    run = tmp_path / "run"
    with pytest.raises(InvalidDatasetError, match=r"broken\.png"):
        pretrain.main([*NEW, "--images", str(images), str(tmp_path), "--output_dir", str(run)])
    with pytest.raises(InvalidDatasetError, match="one image, and one must be held out"):
        pretrain.main([*NEW, "--images", str(images / "0.png"), "--output_dir", str(run)])
    with pytest.raises(InvalidDatasetError, match="one image, and one must be held out"):
        pretrain.main([*NEW, "--images", *[str(images / "0.png")] * 2, "--output_dir", str(run)])
    assert not run.exists()


def test_one_image_at_least_is_trained_on(tmp_path, capsys):
    argv = [*NEW, "--num_shapes", "2", "--validation_fraction", "0.9", "--output_dir", str(tmp_path / "run")]
    pretrain.main([*argv, "--dry_run"])
    assert "images      2, 1 of them held out" in capsys.readouterr().out
