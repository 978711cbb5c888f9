"""`dit-detect pretrain` as a whole: from images to a folder that diffusers and the detector read."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.pipelines import pipeline_utils
from huggingface_hub import ModelCard
from PIL import Image
from pretraining_runs import NEW, QUIET, latent_pipeline, write_ten_images
from safetensors.torch import load_file

from dit_detection import DiTForObjectDetection, InvalidDatasetError
from dit_detection.commands import pretrain
from dit_detection.commands.pretrain_options import parse_options
from dit_detection.pretraining import latent_cache
from dit_detection.pretraining.diffusion_model import DiffusionModel, is_flow
from dit_detection.pretraining.diffusion_trainer import (
    DiffusionTrainer,
)
from dit_detection.pretraining.image_sources import list_training_images
from dit_detection.pretraining.image_views import DecodedImages, RandomCrops
from dit_detection.pretraining.latent_cache import cache_latents
from dit_detection.pretraining.new_dit import new_dit, new_scheduler
from dit_detection.pretraining.pipeline_folder import load_pipeline, save_pipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_ten_images(tmp_path_factory.mktemp("images"))


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


@pytest.mark.slow
def test_pretrain_without_options_draws_what_it_trains_on(tmp_path):
    metrics = pretrain.main([*QUIET, "--max_steps", "40", "--output_dir", str(tmp_path)])
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-1] == metrics["eval_loss"] < 0.8 * losses[0]
