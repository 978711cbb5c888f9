"""The pretrained DiT that the package carries."""

import json
import shutil

import pytest
import torch
from diffusers import DiTTransformer2DModel

from dit_detection import DiTForObjectDetection
from dit_detection.model import load_dit
from dit_detection.pretraining.diffusion_model import DiffusionModel
from dit_detection.pretraining.pipeline_folder import load_pipeline
from dit_detection.small_dit import DETECTORS, SIZES, SMALL_DIT, detector_on, size_of, write_small_dit


def test_it_is_small_and_readable_by_everyone():
    files = [path for path in SMALL_DIT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_it_is_the_network_that_random_weights_are_given_for(tmp_path):
    write_small_dit(tmp_path, "small", 128)
    ours, random = (DiTTransformer2DModel.from_pretrained(folder) for folder in (SMALL_DIT / "transformer", tmp_path))
    size = SIZES["small"] | {"patch_size": SIZES["small"]["patch_size"] // 4}  # cells of 4 x 4 pixels
    assert {name: ours.config[name] for name in size} == size
    # Random weights are on pixels: what differs is the way in and out.
    assert {name: p.shape for name, p in ours.transformer_blocks.named_parameters()} == {
        name: p.shape for name, p in random.transformer_blocks.named_parameters()
    }
    assert all(parameter.isfinite().all() for parameter in ours.parameters())


def test_the_size_of_a_dit_is_told_from_its_files(tmp_path):
    assert size_of(SMALL_DIT) == "small"  # on latents
    write_small_dit(tmp_path / "pixels" / "transformer", "tiny", 64)
    assert size_of(tmp_path / "pixels") == size_of(str(tmp_path / "pixels" / "transformer")) == "tiny"
    alone = SMALL_DIT / "transformer"  # its pipeline lies around it
    assert size_of(alone) == size_of(alone, SMALL_DIT) == size_of(alone, SMALL_DIT / "vae") == "small"
    shutil.copytree(alone, tmp_path / "alone")
    assert size_of(tmp_path / "alone", SMALL_DIT / "vae") == "small"
    assert size_of(tmp_path / "alone") is size_of(SMALL_DIT, None) is None
    file = tmp_path / "pixels" / "transformer" / "config.json"
    config = json.loads(file.read_text())
    for other in (config | {"num_layers": 3}, {"model_type": "detr"}, [1]):
        file.write_text(json.dumps(other))
        assert size_of(tmp_path / "pixels") is None
    file.write_text("{")
    for none in (tmp_path / "pixels", file, tmp_path / "nowhere", "x/y/z", ""):
        assert size_of(none) is None


def test_a_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "dit.pt").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load_dit, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    assert size_of("weights/dit.pt") is None


def test_what_belongs_to_the_strides_goes_with_them():
    assert detector_on("small", {}) == DETECTORS["small"] and detector_on(None, {"strides": [8]}) == {"strides": [8]}
    same = {"strides": DETECTORS["small"]["strides"], "neck_channels": 64}
    assert detector_on("small", same) == DETECTORS["small"] | same
    assert "anchor_sizes" not in detector_on("small", {"strides": [8, 16]})
    assert detector_on("small", {"strides": [8], "anchor_sizes": [[9]]})["anchor_sizes"] == [[9]]
    single = DiTForObjectDetection.from_diffusers(SMALL_DIT, **detector_on("small", {"neck_channels": None})).config
    assert single.strides == [16] and len(single.anchor_sizes) == 1


def test_a_detector_is_made_of_it_as_of_any_dit():
    model = DiTForObjectDetection.from_diffusers(
        SMALL_DIT, id2label={0: "cell"}, dtype=torch.float32, **DETECTORS["small"]
    )
    assert model.config.base_model == SMALL_DIT.name
    assert model.config.token_stride == SIZES["small"]["patch_size"] and model.config.timestep == 200
    with torch.no_grad():
        outputs = model.eval()(torch.zeros(1, 3, 64, 96))
    assert outputs.logits.isfinite().all()


@torch.no_grad()
def test_it_removes_noise():
    # A disc on a ground, which no image of its training was.
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128), indexing="ij")
    disc = (x**2 + y**2 < 0.3).float()
    pixels = torch.stack([disc, 1 - disc, 0.5 * disc])[None] * 1.4 - 0.7
    transformer, scheduler, vae = load_pipeline(str(SMALL_DIT))
    latents = vae.encode(pixels).latents
    assert (vae.decode(latents).sample - pixels).square().mean() < 0.05 * pixels.var()
    clean = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    model = DiffusionModel(transformer, scheduler).eval()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for timestep in (300, 500):
        time = timestep / 1000
        noisy = (1 - time) * clean + time * noise
        restored = noisy - time * model.predict(noisy, torch.tensor([timestep]))
        error = (restored - clean).square().mean()
        assert error < 0.25 * (time * noise / (1 - time)).square().mean()  # what scaling alone would leave
