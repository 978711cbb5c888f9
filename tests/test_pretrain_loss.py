"""The objectives of pretraining against diffusers' schedulers and torch's distributions."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from torch.distributions import Normal, kl_divergence

from dit_detection.pretraining.diffusion_loss import MAX_WEIGHT, DDPMLoss, FlowLoss
from dit_detection.pretraining.diffusion_model import DiffusionModel
from dit_detection.pretraining.new_dit import new_dit, new_scheduler
from dit_detection.pretraining.sampling import _ddim, sample_images

# First, last, and some between.
TIMESTEPS = torch.tensor([0, 1, 2, 17, 500, 998, 999, 999])


def batch(channels=3, count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(count, channels, 4, 4, generator=generator) * 2 - 1
    return clean, torch.randn(clean.shape, generator=generator)


def record(outputs):
    """A network that answers with `outputs`, and remembers what it was asked."""
    asked = {}

    def predict(noisy, timesteps):
        asked.update(noisy=noisy, timesteps=timesteps)
        return outputs

    return predict, asked


def time_of(timesteps):
    return (timesteps + 0.5) / 1000


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddpm_loss_is_the_error_of_what_the_scheduler_says_is_predicted(prediction_type, schedule):
    scheduler = DDPMScheduler(prediction_type=prediction_type, beta_schedule=schedule)
    clean, noise = batch()
    output = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    predict, asked = record(output)
    losses = DDPMLoss(dict(scheduler.config), learns_sigma=False)(predict, clean, noise, time_of(TIMESTEPS))

    assert asked["timesteps"].tolist() == TIMESTEPS.tolist()
    noisy = scheduler.add_noise(clean, noise, TIMESTEPS)
    torch.testing.assert_close(asked["noisy"], noisy, atol=1e-5, rtol=1e-4)
    velocity = scheduler.get_velocity(clean, noise, TIMESTEPS)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[prediction_type]
    expected = (output - target).square().flatten(1).mean(1)
    if prediction_type == "sample":
        alphas_bar = scheduler.alphas_cumprod[TIMESTEPS]
        # The squared error of the v that follows from the output, bounded
        implied = (alphas_bar.sqrt().view(-1, 1, 1, 1) * noisy - output) / (1 - alphas_bar).sqrt().view(-1, 1, 1, 1)
        of_v = (implied - velocity).square().flatten(1).mean(1)
        expected = torch.minimum(of_v, MAX_WEIGHT * expected)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=2e-3)


@pytest.mark.parametrize("time", [0.0, math.nextafter(1.0, 0.0), 1.0, 0.4999999])
def test_every_time_is_a_timestep(time):
    clean, noise = batch(count=1)
    predict, asked = record(clean)
    DDPMLoss(dict(DDPMScheduler().config), False)(predict, clean, noise, torch.tensor([time], dtype=torch.float64))
    assert asked["timesteps"].item() == min(999, int(time * 1000))


def reference_bound(clean, noisy, predicted_clean, fraction, timesteps):
    """The same from Bayes' rule for Gaussians and torch's distributions, in float64."""
    scheduler = DDPMScheduler()
    betas = torch.linspace(scheduler.config.beta_start, scheduler.config.beta_end, 1000).double()
    alphas_bar = (1 - betas).cumprod(0)
    results = []
    for index, t in enumerate(timesteps.tolist()):
        x, x_t, x_hat = clean[index].double(), noisy[index].double(), predicted_clean[index].double()
        share = (fraction[index].double() + 1) / 2

        def step_back(start, t=t, x_t=x_t):
            """q(x_{t-1} | x_t, start): the product of q(x_{t-1} | start) and q(x_t | x_{t-1})."""
            before = alphas_bar[t - 1]
            precision = 1 / (1 - before) + (1 - betas[t]) / betas[t]
            mean = (before.sqrt() * start / (1 - before) + (1 - betas[t]).sqrt() * x_t / betas[t]) / precision
            return mean, 1 / precision

        if t == 0:
            # x_{t-1} is the clean image itself; of the smallest variance there is that of step 1.
            smallest = 1 / (1 / (1 - alphas_bar[0]) + (1 - betas[1]) / betas[1])
            variance = torch.exp(share * betas[0].log() + (1 - share) * smallest.log())
            normal = Normal(x_hat, variance.sqrt())
            chance = normal.cdf(x + 1 / 255) - normal.cdf(x - 1 / 255)
            chance = torch.where(x > 0.999, 1 - normal.cdf(x - 1 / 255), chance)
            chance = torch.where(x < -0.999, normal.cdf(x + 1 / 255), chance)
            nats = -chance.clamp(min=1e-12).log()
        else:
            (true_mean, true_variance), (mean, _) = step_back(x), step_back(x_hat)
            variance = torch.exp(share * betas[t].log() + (1 - share) * true_variance.log())
            nats = kl_divergence(Normal(true_mean, true_variance.sqrt()), Normal(mean, variance.sqrt()))
        results.append(nats.mean() / math.log(2))
    return torch.stack(results).float()


@pytest.mark.parametrize("error", [0.0, 0.01, 0.5])
def test_variational_bound_equals_the_divergence_of_the_two_gaussians(error):
    clean, noise = batch(channels=4)
    clean[0, 0, 0, 0], clean[0, 0, 0, 1] = 1.0, -1.0  # the open bins
    noisy = DDPMScheduler().add_noise(clean, noise, TIMESTEPS)
    generator = torch.Generator().manual_seed(2)
    predicted = clean + error * torch.randn(clean.shape, generator=generator)
    fraction = torch.rand(clean.shape, generator=generator) * 2.4 - 1.2  # the network may leave [-1, 1]
    loss = DDPMLoss(dict(DDPMScheduler().config), learns_sigma=True)
    bound = loss.variational_bound(clean, noisy, predicted, fraction, TIMESTEPS)
    expected = reference_bound(clean, noisy, predicted, fraction, TIMESTEPS)
    torch.testing.assert_close(bound, expected, atol=2e-4, rtol=2e-3)


def test_learned_sigma_takes_no_gradient_to_the_mean():
    clean, noise = batch(channels=4)
    output = torch.randn(len(clean), 8, 4, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    config = dict(DDPMScheduler().config)
    DDPMLoss(config, True)(lambda *_: output, clean, noise, time_of(TIMESTEPS)).sum().backward()
    assert output.grad[:, 4:].abs().amin(dim=(1, 2, 3)).min() > 0
    mean = output.detach()[:, :4].requires_grad_()
    DDPMLoss(config, False)(lambda *_: mean, clean, noise, time_of(TIMESTEPS)).sum().backward()
    torch.testing.assert_close(output.grad[:, :4], mean.grad)


def test_learned_sigma_adds_the_bound():
    clean, noise = batch(channels=4)
    scheduler = DDPMScheduler()
    output = torch.randn(len(clean), 8, 4, 4, generator=torch.Generator().manual_seed(3)) * 0.1
    output[:, :4] += noise
    losses = DDPMLoss(dict(scheduler.config), True)(lambda *_: output, clean, noise, time_of(TIMESTEPS))
    noisy = scheduler.add_noise(clean, noise, TIMESTEPS).double()
    alphas_bar = (1 - torch.linspace(1e-4, 0.02, 1000).double()).cumprod(0)[TIMESTEPS].view(-1, 1, 1, 1)
    predicted = (noisy - (1 - alphas_bar).sqrt() * output[:, :4]) / alphas_bar.sqrt()
    expected = (output[:, :4] - noise).square().flatten(1).mean(1)
    expected += reference_bound(clean, noisy, predicted, output[:, 4:], TIMESTEPS)
    torch.testing.assert_close(losses, expected, atol=1e-3, rtol=1e-2)


def test_flow_loss_is_the_error_of_the_velocity():
    clean, noise = batch(count=4)
    time = torch.tensor([0.0, 0.25, 0.5, 0.999])
    output = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    predict, asked = record(output)
    losses = FlowLoss(1000)(predict, clean, noise, time)
    torch.testing.assert_close(asked["noisy"][0], clean[0])  # 0 is the clean end
    torch.testing.assert_close(asked["noisy"][2], (clean[2] + noise[2]) / 2)
    torch.testing.assert_close(asked["timesteps"], torch.tensor([0.0, 250, 500, 999]))
    torch.testing.assert_close(losses, (output - noise + clean).square().flatten(1).mean(1))


def test_of_a_shorter_flow_the_network_is_told_what_the_sampler_tells():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)
    model, told = DiffusionModel(new_dit("tiny", 16), scheduler), []
    model.predict = lambda noisy, timesteps: (told.append(timesteps.max().item()), torch.zeros_like(noisy))[1]
    model.loss_of(*torch.zeros(2, 1, 3, 16, 16), torch.tensor([0.999]))
    sample_images(model, None, 1, num_steps=2)
    assert told == [pytest.approx(499.5), 500, pytest.approx(1)]


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(num_train_timesteps=20),
        DDPMScheduler(beta_schedule="sigmoid"),
        DDPMScheduler(beta_schedule="laplace", prediction_type="v_prediction"),
        DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ],
)
def test_what_can_be_trained_can_be_sampled(scheduler):
    model = DiffusionModel(new_dit("tiny", 16), scheduler)
    before = dict(scheduler.config)
    assert len(sample_images(model, None, 2, num_steps=25)) == 2
    assert dict(scheduler.config) == before


def test_the_noise_schedule_of_samples_is_that_of_the_loss():
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"):
        scheduler = DDPMScheduler(beta_schedule=schedule)
        config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        sampler = _ddim(config, clip_sample=True)
        torch.testing.assert_close(sampler.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("objective", ["flow", "epsilon", "v_prediction", "sample"])
def test_a_network_without_loss_samples_the_clean_image(objective):
    # What the loss asks for and what diffusers' samplers take must be the same: then the loss of an oracle is 0, and
    # it leads any noise to the image that it has in mind.
    clean, noise = batch(count=1)
    scheduler = new_scheduler(objective, on_pixels=True)
    loss = FlowLoss(1000) if objective == "flow" else DDPMLoss(dict(scheduler.config), False)

    def oracle(noisy, timesteps):
        if objective == "flow":
            t = timesteps.view(-1, 1, 1, 1) / 1000
            return (noisy - clean) / t.clamp(min=1e-6)
        alphas_bar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        signal, sigma = alphas_bar.sqrt(), (1 - alphas_bar).sqrt()
        epsilon = (noisy - signal * clean) / sigma
        return {"sample": clean, "epsilon": epsilon, "v_prediction": signal * epsilon - sigma * clean}[objective]

    assert loss(oracle, clean, noise, torch.tensor([0.3])).item() < 1e-6
    scheduler.set_timesteps(10)
    x = torch.randn(clean.shape, generator=torch.Generator().manual_seed(9))
    for timestep in scheduler.timesteps:
        x = scheduler.step(oracle(x, timestep.view(1)), timestep, x).prev_sample
    torch.testing.assert_close(x, clean, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    dit = new_dit("tiny", 16)
    for parameter in dit.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return DiffusionModel(dit, new_scheduler("sample", on_pixels=True))


def test_the_loss_of_a_batch_is_the_mean_of_its_images(model):
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    time, seed = torch.linspace(0, 0.99, 5), torch.arange(5) + 2**61
    together = model(images, time, seed)["loss"]
    alone = [model(images[i : i + 1], time[i : i + 1], seed[i : i + 1])["loss"] for i in range(5)]
    torch.testing.assert_close(together, torch.stack(alone).mean())
    assert model(images, time, seed + 1)["loss"] != together


def test_the_loss_of_a_step_is_shared_out_over_its_batches(model):
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    time, seed = torch.linspace(0, 0.99, 5), torch.arange(5)
    parts = [slice(0, 3), slice(3, 5)]
    losses = [model(images[p], time[p], seed[p], num_items_in_batch=torch.tensor(5))["loss"] for p in parts]
    torch.testing.assert_close(sum(losses), model(images, time, seed)["loss"])
    is_counted = torch.tensor([True, True, True, False, False])
    first = model(images, time, seed, is_counted)["loss"]
    torch.testing.assert_close(first, model(images[:3], time[:3], seed[:3])["loss"])


def test_pixels_are_scaled_to_unit_size(model):
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    time, seed = torch.tensor([0.1, 0.9]), torch.tensor([1, 2])
    as_floats = images.float() / 127.5 - 1
    assert as_floats.unique().tolist() == [-1, 1]
    torch.testing.assert_close(model(images, time, seed)["loss"], model(as_floats, time, seed)["loss"])


def test_a_new_dit_begins_as_its_paper_says():
    torch.manual_seed(0)
    dit = new_dit("small", 32)
    x = torch.randn(2, 3, 32, 32)
    output = dit(x, timestep=torch.tensor([3, 999]), class_labels=torch.tensor([1, 1])).sample
    assert output.shape == x.shape and not output.any()
    hidden = dit.pos_embed(x)
    for block in dit.transformer_blocks:  # each is the identity
        after = block(hidden, timestep=torch.tensor([3, 999]), class_labels=torch.tensor([1, 1]))
        torch.testing.assert_close(after, hidden)
    width = dit.inner_dim
    fc1 = dit.transformer_blocks[0].ff.net[0].proj
    bound = math.sqrt(6 / (width + 4 * width))  # Xavier's
    assert 0.98 * bound < fc1.weight.abs().max() <= bound and not fc1.bias.any()
    patch_bound = math.sqrt(6 / (width + 3 * 16 * 16))
    assert 0.98 * patch_bound < dit.pos_embed.proj.weight.abs().max() <= patch_bound
    first, last = (dit.transformer_blocks[i].norm1.emb.timestep_embedder.linear_1.weight for i in (0, -1))
    assert torch.equal(first, last) and 0.019 < first.std() < 0.021


def test_a_token_is_as_wide_on_latents_as_on_pixels():
    assert new_dit("tiny", 64).config.patch_size == 8
    assert new_dit("tiny", 8, in_channels=4, downsampling=8).config.patch_size == 1
    assert new_dit("small", 8, in_channels=4, downsampling=8).config.patch_size == 2
    with pytest.raises(ValueError, match="image_size=72 must be a multiple of 16"):
        new_dit("small", 72)


@pytest.mark.parametrize(
    ("scheduler", "channels", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(), 6, "no outputs for a variance"),
        (DDIMScheduler(), 5, "makes 5 channels of 3"),
        (PNDMScheduler(prediction_type="epsilon"), 3, None),
        (DDIMScheduler(prediction_type="score"), 3, "'score'"),
    ],
)
def test_what_has_no_objective_is_refused(scheduler, channels, message):
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, in_channels=3, out_channels=channels
    )
    if message is None:
        assert DiffusionModel(dit, scheduler).objective.prediction_type == "epsilon"
    else:
        with pytest.raises(ValueError, match=message):
            DiffusionModel(dit, scheduler)
