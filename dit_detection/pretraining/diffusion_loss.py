"""
The objectives of diffusion training: clean images and noise → a loss per image.

Shape letters: B images, C channels, H W pixels or latent cells, T timesteps.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

# (noisy images (B, C, H, W), timesteps (B,)) → output (B, C or 2C, H, W).
Predict = Callable[[Tensor, Tensor], Tensor]

# Of the loss on clean images. Without a bound of about this size a few nearly clean images would outweigh all others
# (Min-SNR, arXiv 2303.09556).
MAX_WEIGHT = 5.0


class DDPMLoss(nn.Module):
    """
    The objective of a checkpoint with a discrete noise schedule: what its scheduler says that it predicts, and the
    variance, if it has outputs for that.

    A prediction of the clean image counts as much as the v that follows from it, up to `MAX_WEIGHT`; a prediction of
    noise or v by its squared error. Outputs for the variance learn from the variational bound, into which the
    predicted mean enters without gradient.

    Args:
        scheduler_config (`dict`): Of any diffusers scheduler with betas.
        learns_sigma (`bool`): Whether the second half of the output interpolates the log-variance.

    Source: DDPM (arXiv 2006.11239), improved DDPM (arXiv 2102.09672), v: progressive distillation (arXiv 2202.00512).
    """

    alphas_bar: Tensor

    def __init__(self, scheduler_config: dict[str, Any], learns_sigma: bool) -> None:
        super().__init__()
        # Without what diffusers notes of defaults: it would put those of this class in their place.
        values = {name: value for name, value in scheduler_config.items() if not name.startswith("_")}
        scheduler: Any = DDPMScheduler.from_config(values)
        self.prediction_type: str = scheduler.config.prediction_type
        self.learns_sigma = learns_sigma
        # In float64: 1 - alphas_bar has few digits left in float32 at the first timesteps.
        betas = scheduler.betas.double()
        self.register_buffer("alphas_bar", (1 - betas).cumprod(0), persistent=False)

    def forward(self, predict: Predict, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """
        Args:
            predict (`Callable`): The network.
            clean (`torch.Tensor` of shape `(B, C, H, W)`): Images or latents, of about unit size.
            noise (`torch.Tensor` of shape `(B, C, H, W)`): Standard normal.
            time (`torch.Tensor` of shape `(B,)`): In [0, 1), uniform; the share of the schedule that is passed.

        Returns:
            `torch.Tensor` of shape `(B,)`: float32.
        """
        num_timesteps = len(self.alphas_bar)
        timesteps = (time.double() * num_timesteps).long().clamp(0, num_timesteps - 1)
        alpha_bar = self.alphas_bar[timesteps].view(-1, 1, 1, 1)
        signal, sigma = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
        noisy = signal * clean + sigma * noise
        output = predict(noisy, timesteps).float()
        prediction = output[:, : clean.shape[1]]
        weight: Tensor | float = 1.0
        if self.prediction_type == "sample":
            target = clean
            # For v is (signal * noisy - clean) / sigma.
            weight = (1 / sigma.flatten() ** 2).clamp(max=MAX_WEIGHT)
        elif self.prediction_type == "v_prediction":
            target = signal * noise - sigma * clean
        else:
            target = noise
        loss = weight * (prediction - target).square().mean(dim=(1, 2, 3))
        if self.learns_sigma:
            predicted_clean = _to_clean(prediction.detach(), noisy, signal, sigma, self.prediction_type)
            loss = loss + self.variational_bound(clean, noisy, predicted_clean, output[:, clean.shape[1] :], timesteps)
        return loss

    def variational_bound(
        self, clean: Tensor, noisy: Tensor, predicted_clean: Tensor, fraction: Tensor, timesteps: Tensor
    ) -> Tensor:
        """
        The term of the variational bound at these timesteps, in bits per number.

        The divergence between the true step back and the predicted one; at timestep 0 the surprise at the clean image,
        whose numbers are taken as rounded to 1/127.5 between -1 and 1, as the original does even for latents.

        Args:
            clean, noisy, predicted_clean (`torch.Tensor` of shape `(B, C, H, W)`): The last from the network.
            fraction (`torch.Tensor` of shape `(B, C, H, W)`): The network's, -1 for the smallest possible variance of
                the step back, 1 for the largest.
            timesteps (`torch.Tensor` of shape `(B,)`): Integers below T.

        Returns:
            `torch.Tensor` of shape `(B,)`.

        Source: improved DDPM, section 3; DiT's `_vb_terms_bpd`.
        """
        before = torch.cat([self.alphas_bar.new_ones(1), self.alphas_bar[:-1]])
        betas = 1 - self.alphas_bar / before
        variances = betas * (1 - before) / (1 - self.alphas_bar)
        variances[0] = variances[1]  # the true one is 0, whose logarithm nobody could reach

        def at(values: Tensor) -> Tensor:
            return values[timesteps].view(-1, 1, 1, 1).float()

        of_clean = at(betas * before.sqrt() / (1 - self.alphas_bar))
        of_noisy = at((1 - before) * (1 - betas).sqrt() / (1 - self.alphas_bar))
        true_mean = of_clean * clean + of_noisy * noisy
        mean = of_clean * predicted_clean + of_noisy * noisy
        true_log_variance = at(variances.log())
        share = (fraction + 1) / 2
        log_variance = share * at(betas.log()) + (1 - share) * true_log_variance

        difference = true_log_variance - log_variance
        divergence = 0.5 * (difference.exp() - 1 - difference + (true_mean - mean) ** 2 * torch.exp(-log_variance))
        surprise = _discretised_surprise(clean, mean, log_variance)
        is_first = (timesteps == 0).view(-1, 1, 1, 1)
        return torch.where(is_first, surprise, divergence).mean(dim=(1, 2, 3)) / math.log(2)


class FlowLoss(nn.Module):
    """
    Flow matching on the straight line `x_t = (1 - t) * clean + t * noise`: the velocity `noise - clean` is predicted.

    The network is told `num_timesteps * t`, as the scheduler tells it when it samples: 0 is the clean end.

    Args:
        num_timesteps (`int`): The scheduler's `num_train_timesteps`.

    Source: rectified flow (arXiv 2209.03003); diffusers' `FlowMatchEulerDiscreteScheduler` samples from it. SiT (arXiv
    2401.08740) counts time the other way round.
    """

    def __init__(self, num_timesteps: int) -> None:
        super().__init__()
        self.num_timesteps = num_timesteps

    def forward(self, predict: Predict, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """As [`DDPMLoss`]."""
        time = time.float()
        t = time.view(-1, 1, 1, 1)
        output = predict((1 - t) * clean + t * noise, self.num_timesteps * time).float()
        return (output - (noise - clean)).square().mean(dim=(1, 2, 3))


def _to_clean(prediction: Tensor, noisy: Tensor, signal: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The clean image that a prediction implies."""
    if prediction_type == "sample":
        return prediction
    if prediction_type == "v_prediction":
        return signal * noisy - sigma * prediction
    return (noisy - sigma * prediction) / signal


def _discretised_surprise(values: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Negative log-probability, in nats, of values rounded to 1/127.5; the outermost bins are open."""
    precision, offset = torch.exp(-0.5 * log_variance), values - mean
    # A bin is as probable as its mirror image; in the lower tail the difference of the two keeps its digits.
    mirrored = -offset.abs()
    inner = _normal_cdf((mirrored + 1 / 255) * precision) - _normal_cdf((mirrored - 1 / 255) * precision)
    lowest = _normal_cdf((offset + 1 / 255) * precision)
    highest = _normal_cdf((1 / 255 - offset) * precision)
    probability = torch.where(values < -0.999, lowest, torch.where(values > 0.999, highest, inner))
    return -probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    # `torch.special.ndtr` is 0 below -6 in float32.
    return 0.5 * torch.erfc(-x * math.sqrt(0.5))
