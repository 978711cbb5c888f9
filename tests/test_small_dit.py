"""The pretrained DiT that the package carries."""

import torch
from diffusers import DiTTransformer2DModel

from dit_detection import DiTForObjectDetection
from dit_detection.pretraining.diffusion_model import DiffusionModel
from dit_detection.pretraining.pipeline_folder import load_pipeline
from dit_detection.small_dit import DETECTORS, SIZES, SMALL_DIT, write_small_dit


def test_it_is_small_and_readable_by_everyone():
    files = [path for path in SMALL_DIT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_it_is_the_network_that_random_weights_are_given_for(tmp_path):
    write_small_dit(tmp_path, "small", 128)
    ours, random = (DiTTransformer2DModel.from_pretrained(folder) for folder in (SMALL_DIT / "transformer", tmp_path))
    assert {name: ours.config[name] for name in SIZES["small"]} == SIZES["small"]
    assert {name: p.shape for name, p in ours.named_parameters()} == {
        name: p.shape for name, p in random.named_parameters()
    }
    assert all(parameter.isfinite().all() for parameter in ours.parameters())


def test_a_detector_is_made_of_it_as_of_any_dit():
    model = DiTForObjectDetection.from_diffusers(
        SMALL_DIT, id2label={0: "cell"}, dtype=torch.float32, **DETECTORS["small"]
    )
    assert model.config.base_model == SMALL_DIT.name
    with torch.no_grad():
        outputs = model.eval()(torch.zeros(1, 3, 64, 96))
    assert outputs.logits.isfinite().all()


@torch.no_grad()
def test_it_removes_noise():
    # A disc on a ground, which no image of its training was.
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128), indexing="ij")
    disc = (x**2 + y**2 < 0.3).float()
    clean = torch.stack([disc, 1 - disc, 0.5 * disc])[None] * 1.4 - 0.7
    transformer, scheduler, _ = load_pipeline(str(SMALL_DIT))
    model = DiffusionModel(transformer, scheduler).eval()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for timestep in (100, 300):
        time = torch.tensor([timestep])
        noisy = scheduler.add_noise(clean, noise, time)
        restored = model.predict(noisy, time)
        # Shrinking all pixels to their mean would leave 1 of the image's variance.
        error = (restored - clean).square().mean() / clean.var()
        assert error < 0.3
