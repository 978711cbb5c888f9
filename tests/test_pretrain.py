"""`dit-detect pretrain` as a whole: from images to a folder that diffusers and the detector read."""

import errno
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.pipelines import pipeline_utils
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from test_processes import in_processes
from torch import nn

from dit_detection import DiTForObjectDetection, InvalidDatasetError
from dit_detection.commands import pretrain
from dit_detection.commands.pretrain_options import parse_options
from dit_detection.data import draw_shapes_dataset
from dit_detection.pretraining import latent_cache
from dit_detection.pretraining.diffusion_model import DiffusionModel, is_flow
from dit_detection.pretraining.diffusion_trainer import (
    BEGAN_WITH,
    FINGERPRINT,
    DiffusionTrainer,
    PretrainingArguments,
)
from dit_detection.pretraining.image_sources import list_training_images
from dit_detection.pretraining.image_views import CentreCrops, DecodedImages, FixedNoise, NoisedViews, RandomCrops
from dit_detection.pretraining.latent_cache import cache_latents
from dit_detection.pretraining.new_dit import new_dit, new_scheduler
from dit_detection.pretraining.pipeline_folder import load_pipeline, save_pipeline
from dit_detection.pretraining.run_cost import measure_step, step_cost
from dit_detection.pretraining.sampling import sample_images
from dit_detection.training.checkpoint_files import CHECKSUMS
from dit_detection.training.cost import PeakMemory
from dit_detection.training.fault_tolerant_trainer import NonFiniteLossError

QUIET = ["--bf16", "False", "--disable_tqdm", "True", "--report_to", "none", "--per_device_train_batch_size", "4"]
NEW = [*QUIET, "--size", "tiny", "--image_size", "16"]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of ten images."""
    folder = tmp_path_factory.mktemp("images")
    for index, row in enumerate(draw_shapes_dataset(10, 0, 0, image_size=(32, 48))["train"]):
        row["image"].save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def pretrained(images, tmp_path_factory):
    """A folder after four steps from random weights, and what `pretrain` returned."""
    folder = tmp_path_factory.mktemp("new") / "my-dit"
    argv = [*NEW, "--images", str(images), "--max_steps", "4", "--eval_steps", "2", "--save_strategy", "no"]
    return folder, pretrain.main([*argv, "--output_dir", str(folder)])


def test_pretrain_leaves_a_pipeline_of_diffusers(pretrained):
    folder, metrics = pretrained
    assert 0 < metrics["eval_loss"] < 10
    pipeline = DiTPipeline.from_pretrained(folder, vae=None)
    assert isinstance(pipeline.transformer, DiTTransformer2DModel) and pipeline.vae is None
    assert pipeline.scheduler.config.prediction_type == "sample"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline" and index["transformer"] == ["diffusers", "DiTTransformer2DModel"]


def test_a_pipeline_without_an_autoencoder_is_saved_without_a_warning(pretrained, tmp_path, monkeypatch):
    pipeline, said = DiTPipeline.from_pretrained(pretrained[0], vae=None), []
    monkeypatch.setattr(pipeline_utils.logger, "warning", said.append)
    save_pipeline(tmp_path, pipeline.transformer, pipeline.scheduler, None)
    assert said == []
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == [None, None]


def test_the_detector_takes_what_pretrain_leaves(pretrained):
    folder, _ = pretrained
    detector = DiTForObjectDetection.from_diffusers(folder, neck_channels=16, head_channels=[16], num_labels=2)
    weights = load_file(folder / WEIGHTS)
    projection = detector.model.backbone.patch_embedding.projection.weight
    torch.testing.assert_close(projection, weights["pos_embed.proj.weight"])
    assert detector.config.pretrained_grid == 2 and detector.config.base_model == "my-dit"
    with torch.no_grad():
        assert detector(torch.zeros(1, 3, 32, 16)).logits.isfinite().all()


def test_pretrain_shows_and_tells_what_it_did(pretrained):
    folder, metrics = pretrained
    assert [path.name for path in sorted((folder / "samples").iterdir())] == ["step-0000002.png", "step-0000004.png"]
    samples = Image.open(folder / "samples.png")
    assert samples.size == Image.open(folder / "samples" / "step-0000004.png").size and samples.width > 4 * 16
    card = ModelCard.load(folder / "README.md")
    assert card.data.license is None and card.data.library_name == "diffusers"
    for text in ("9 to train on, 1 held out", "began with random weights", "Steps: 4 of 4 images", "--max_steps 4"):
        assert text in card.text
    assert f"{metrics['eval_loss']:.4f} after step 4" in card.text
    assert (folder / "loss.png").is_file()


def test_what_was_trained_is_saved_before_the_last_evaluation(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("no room")

    monkeypatch.setattr(DiffusionTrainer, "evaluate", fail)
    argv = [*NEW, "--num_shapes", "3", "--max_steps", "1", "--save_strategy", "no", "--eval_strategy", "no"]
    with pytest.raises(RuntimeError, match="no room"):
        pretrain.main([*argv, "--output_dir", str(tmp_path)])
    assert DiTPipeline.from_pretrained(tmp_path, vae=None).transformer.config.sample_size == 16


@pytest.mark.slow
def test_a_compiled_model_is_saved_as_any_other(images, tmp_path):
    argv = [*NEW, "--images", str(images), "--max_steps", "1", "--save_strategy", "no", "--save_samples", "False"]
    argv += ["--torch_compile", "True", "--torch_compile_backend", "eager", "--output_dir", str(tmp_path)]
    pretrain.main(argv)
    DiTTransformer2DModel.from_pretrained(tmp_path / "transformer")
    assert not any("_orig_mod" in name for name in load_file(tmp_path / WEIGHTS))


@pytest.mark.slow
def test_a_run_neither_sees_its_own_pictures_nor_goes_on_with_other_images(images, tmp_path, monkeypatch):
    shutil.copytree(images, tmp_path / "images")
    monkeypatch.chdir(tmp_path / "images")
    argv = [*NEW, "--images", ".", "--eval_steps", "1", "--save_steps", "1", "--resume_from_checkpoint", "last"]
    pretrain.main([*argv, "--max_steps", "1"])
    assert len(list(Path("my-dit").rglob("*.png"))) == 3
    pretrain.main([*argv, "--max_steps", "2"])
    assert "9 to train on, 1 held out" in Path("my-dit/README.md").read_text()
    Path("9.png").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 .*other images.*another --output_dir"):
        pretrain.main([*argv, "--max_steps", "3"])
    with pytest.raises(InvalidDatasetError, match=r"--output_dir \. is a folder of images"):
        pretrain.main([*argv, "--output_dir", "."])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--seed", "1"], "another seed:"),
        (["--validation_fraction", "0.4"], "another number of held-out images:"),
        (["--objective", "epsilon"], "another objective:"),
        (["--image_size", "32", "--seed", "1"], "another seed, another image_size:"),
    ],
)
def test_a_run_goes_on_with_what_it_began_with(stopped, changed, named):
    with pytest.raises(ValueError, match=rf"checkpoint-1 .*{named}.*another --output_dir"):
        pretrain.main([*stopped, *changed])


@pytest.fixture(scope="module")
def stopped(images, tmp_path_factory):
    """The options of a run that has a checkpoint to go on from."""
    folder = tmp_path_factory.mktemp("stopped")
    argv = [*NEW, "--images", str(images), "--save_samples", "False", "--eval_strategy", "no", "--save_steps", "1"]
    argv += ["--resume_from_checkpoint", "last", "--output_dir", str(folder)]
    pretrain.main([*argv, "--max_steps", "1"])
    return [*argv, "--max_steps", "2"]


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


def test_a_folder_of_a_detector_is_not_written_into(tmp_path):
    for name in ("config.json", "checkpoint-7/config.json", "adapter_config.json"):
        run = tmp_path / name.replace("/", "-")
        (run / name).parent.mkdir(parents=True)
        (run / name).touch()
        with pytest.raises(ValueError, match=f"{run} holds a detector .*{name}.* another --output_dir"):
            pretrain.main([*NEW, "--num_shapes", "3", "--max_steps", "1", "--output_dir", str(run)])


def test_an_autoencoder_of_an_earlier_run_is_not_left_behind(tmp_path):
    (tmp_path / "vae").mkdir()  # nobody's
    dit, scheduler = new_dit("tiny", 16), new_scheduler("sample", on_pixels=True)
    for _ in range(2):
        save_pipeline(tmp_path, dit, scheduler, None)
        assert (tmp_path / "vae").is_dir()
    latent_pipeline().save_pretrained(tmp_path)
    save_pipeline(tmp_path, dit, scheduler, None)
    assert not (tmp_path / "vae").exists()
    detector = DiTForObjectDetection.from_diffusers(tmp_path, neck_channels=16, head_channels=[16])
    assert detector.config.in_channels == 3


def randomized(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.eval()


def latent_pipeline():
    """As the published DiT, but tiny: 4 channels in, 8 out, classes, and a scheduler that is not all defaults."""
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        sample_size=8,
        out_channels=8,
        num_embeds_ada_norm=5,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    scheduler = DDPMScheduler(beta_end=0.03, clip_sample=False, num_train_timesteps=500)
    return DiTPipeline(randomized(dit), randomized(vae), scheduler)


def test_going_on_from_a_checkpoint_keeps_what_it_is(images, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = latent_pipeline()
    source.save_pretrained(tmp_path / "DiT-XL-2-256")
    argv = [*QUIET, "--model", str(tmp_path / "DiT-XL-2-256"), "--images", str(images), "--num_views", "2"]
    argv += ["--max_steps", "3", "--save_strategy", "no", "--eval_steps", "3", "--learning_rate", "1e-2"]
    pretrain.main([*argv, "--save_samples", "False", "--output_dir", str(tmp_path / "run")])
    result = DiTPipeline.from_pretrained(tmp_path / "run")

    for part in ("transformer", "vae", "scheduler"):
        configs = (getattr(pipeline, part).config.items() for pipeline in (source, result))
        before, after = (json.dumps({k: v for k, v in c if not k.startswith("_")}) for c in configs)
        assert before == after, part
        config = next((tmp_path / "run" / part).glob("*config.json"))
        assert str(tmp_path) not in config.read_text(), "where files lie here is nobody else's business"
    for name, weight in source.vae.state_dict().items():
        assert torch.equal(weight, result.vae.state_dict()[name])
    weights, trained = source.transformer.state_dict(), result.transformer.state_dict()
    table = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    assert torch.equal(weights[table][:5], trained[table][:5])  # of the classes
    assert not torch.equal(weights[table][5], trained[table][5])  # the null class
    assert not torch.equal(weights["proj_out_2.weight"], trained["proj_out_2.weight"])
    images_drawn = result(class_labels=[5], guidance_scale=1.0, num_inference_steps=2, output_type="np").images
    assert images_drawn.shape == (1, 16, 16, 3)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.license == "cc-by-nc-4.0" and "no commercial use" in card.text
    assert str(tmp_path) not in card.text.replace(card.text[card.text.index("dit-detect pretrain") :], "")


def test_a_scheduler_is_found_or_missed_aloud_and_never_guessed(tmp_path, caplog):
    save_pipeline(tmp_path / "flow", new_dit("tiny", 16), new_scheduler("flow", on_pixels=True), None)
    folder = str(tmp_path / "flow")
    for source in (folder, f"{folder}/transformer", f"{folder}/transformer/"):
        assert is_flow(load_pipeline(source)[1]), source
    file = tmp_path / "flow" / "scheduler" / "scheduler_config.json"
    for damaged in ('{"_class_name": "FlowM', "[]"):
        file.write_text(damaged)
        with pytest.raises(ValueError, match=r"scheduler_config\.json .*JSON"):
            load_pipeline(f"{folder}/transformer")
    file.unlink()
    with pytest.raises(ValueError, match=r"flow.* is a pipeline without scheduler/scheduler_config\.json"):
        load_pipeline(folder)
    assert not caplog.text
    shutil.copytree(tmp_path / "flow" / "transformer", tmp_path / "bare")
    assert load_pipeline(str(tmp_path / "bare"))[1].config.prediction_type == "epsilon"
    assert "bare has no scheduler, and is taken for a DiT that predicts the noise" in caplog.text


def test_cached_latents_are_those_of_the_views(images, tmp_path):
    vae = latent_pipeline().vae
    pixels = DecodedImages(list_training_images([str(images)]), 32, 10**9)
    crops = RandomCrops(pixels, [3, 1, 4], 16, 0.5, seed=0)
    cached = cache_latents(
        crops, vae, num_views=2, key={}, device=torch.device("cpu"), batch_size=2, cache_dir=tmp_path
    )
    assert len(cached) == 3
    for epoch in range(4):
        for index in range(3):
            view = crops.get(index, epoch % 2)[None].float() / 127.5 - 1
            with torch.no_grad():
                expected = vae.encode(view).latent_dist.mode()[0] * 0.5
            torch.testing.assert_close(cached.get(index, epoch), expected, atol=2e-3, rtol=2e-3)
    (path,) = tmp_path.glob("*.npy")
    path.unlink()
    for name in (f"{path.stem}.00.unfinished", "other.00.unfinished"):  # of runs that were killed
        (tmp_path / name).touch()
    cache_latents(crops, vae, num_views=2, key={}, device=torch.device("cpu"), cache_dir=tmp_path)
    assert [file.name for file in tmp_path.glob("*.unfinished")] == ["other.00.unfinished"]
    (tmp_path / "other.00.unfinished").unlink()
    written = path.stat().st_mtime_ns
    vae.register_to_config(_use_default_values=["scaling_factor", "act_fn"])  # a set, in each process another order
    cache_latents(crops, vae, num_views=2, key={}, device=torch.device("cpu"), cache_dir=tmp_path)
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")] == [written]
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1.001)
    cache_latents(crops, vae, num_views=2, key={}, device=torch.device("cpu"), cache_dir=tmp_path)
    cache_latents(crops, vae, num_views=2, key={"crop_area": 1}, device=torch.device("cpu"), cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 3 and not list(tmp_path.glob("*.unfinished"))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="a file cannot be reserved here")
def test_the_disk_has_the_room_for_latents_before_they_are_made(tmp_path, monkeypatch):
    path = tmp_path / "latents.npy"
    latent_cache._reserve(path, (8, 100, 4, 32, 32))
    stat = path.stat()
    assert stat.st_blocks * 512 >= stat.st_size > 2 * 8 * 100 * 4 * 32 * 32
    assert np.load(path, mmap_mode="r").shape == (8, 100, 4, 32, 32)

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OSError, match=r"No space left.*--num_views"):
        latent_cache._reserve(path, (8, 100, 4, 32, 32))
    assert not path.exists()


def test_latents_are_of_images_as_large_as_they_are_kept(images, tmp_path, monkeypatch):
    rows, keys = list_training_images([str(images)]), []
    monkeypatch.setattr(pretrain, "cache_latents", lambda views, vae, key, **kwargs: keys.append(key) or views)
    options, args = parse_options([*NEW, "--images", str(images), "--output_dir", str(tmp_path)])
    model = DiffusionModel(new_dit("tiny", 16), new_scheduler("sample", on_pixels=True))
    for side in (16, 32):
        pretrain._datasets(DecodedImages(rows, side, 10**9), options, args, model, latent_pipeline().vae)
    assert len(set(map(str, keys))) == 4  # of the training images and those held out


@pytest.mark.slow
def test_a_new_dit_on_latents_learns_flow(images, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    latent_pipeline().save_pretrained(tmp_path / "source")
    argv = [*NEW, "--vae", str(tmp_path / "source"), "--images", str(images), "--max_steps", "1"]
    pretrain.main([*argv, "--save_strategy", "no", "--save_dtype", "float16", "--output_dir", str(tmp_path / "run")])
    index = json.loads((tmp_path / "run" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    detector = DiTForObjectDetection.from_diffusers(tmp_path / "run", neck_channels=16, head_channels=[16])
    assert detector.dtype == torch.float16
    assert (detector.config.in_channels, detector.config.patch_size, detector.config.token_stride) == (4, 4, 8)


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


@pytest.mark.slow
def test_pretrain_without_options_draws_what_it_trains_on(tmp_path):
    metrics = pretrain.main([*QUIET, "--max_steps", "40", "--output_dir", str(tmp_path)])
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-1] == metrics["eval_loss"] < 0.8 * losses[0]
