"""A Diffusion Transformer with its objective: what the trainer trains."""

from typing import Any

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from .diffusion_loss import DDPMLoss, FlowLoss

FLOW_MATCHING = FlowMatchEulerDiscreteScheduler.__name__


class DiffusionModel(nn.Module):
    """
    A DiT on images without classes: all are given the null class of classifier-free guidance.

    Args:
        transformer (`DiTTransformer2DModel`): In float32.
        scheduler (`Any`): Of diffusers; its config says what the transformer predicts.

    Raises:
        ValueError: If there is no objective for this scheduler or this number of output channels.
    """

    # Trainer then divides no loss by the number of batches in a step, and hands over that of images.
    accepts_loss_kwargs = True

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: Any) -> None:
        super().__init__()
        self.transformer, self.scheduler = transformer, scheduler
        config: Any = transformer.config
        in_channels, out_channels = config.in_channels, transformer.out_channels
        self.null_class: int = config.num_embeds_ada_norm
        if out_channels not in (in_channels, 2 * in_channels):
            raise ValueError(
                f"The DiT makes {out_channels} channels of {in_channels}: neither a prediction alone nor one with a "
                "variance. Pretraining has no objective for that."
            )
        learns_sigma = out_channels == 2 * in_channels
        if is_flow(scheduler):
            if learns_sigma:
                raise ValueError("A DiT trained by flow matching has no outputs for a variance, but this one has.")
            self.objective: nn.Module = FlowLoss(scheduler.config.num_train_timesteps)
        else:
            _check_schedule(scheduler)
            self.objective = DDPMLoss(dict(scheduler.config), learns_sigma)

    def forward(
        self,
        images: Tensor,
        time: Tensor,
        seed: Tensor,
        is_counted: Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`): 8-bit pixels; or latents, shifted and scaled.
            time (`torch.Tensor` of shape `(B,)`): In [0, 1): how much noise each image gets.
            seed (`torch.Tensor` of shape `(B,)`): Of each image's noise; so the loss of an image depends neither on
                its batch nor on the number of processes.
            is_counted (`torch.Tensor` of shape `(B,)`, *optional*): Which images have a loss; by default all.
            num_items_in_batch (`torch.Tensor` of shape `()`, *optional*): Images of the whole step, over all processes
                and batches; by default those counted here.

        Returns:
            `dict`: `loss`, the sum over the images by their number; and `loss_per_image` `(B,)`, without gradient.
        """
        clean = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
        generators = [torch.Generator(clean.device).manual_seed(number) for number in seed.tolist()]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=g, device=clean.device) for g in generators])
        losses = self.objective(self.predict, clean, noise, time)
        if is_counted is not None:
            losses = losses * is_counted
        if num_items_in_batch is None:
            num_items_in_batch = losses.new_tensor(len(losses)) if is_counted is None else is_counted.sum()
        return {"loss": losses.sum() / num_items_in_batch, "loss_per_image": losses.detach()}

    def loss_of(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The mean loss of clean images with this noise, both `(B, C, H, W)`, at times `(B,)` in [0, 1)."""
        return self.objective(self.predict, clean, noise, time).mean()

    def predict(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """`(B, C, H, W)` at timesteps `(B,)`, 0 to those of the scheduler → `(B, out_channels, H, W)`."""
        classes = torch.full_like(timesteps, self.null_class, dtype=torch.int64)
        return self.transformer(noisy, timestep=timesteps, class_labels=classes).sample

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Called by the Trainer for `--gradient_checkpointing`."""
        self.transformer.enable_gradient_checkpointing()


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler of diffusers is one of flow matching."""
    return type(scheduler).__name__ == FLOW_MATCHING


def _check_schedule(scheduler: Any) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    prediction_type = config.get("prediction_type", "epsilon")
    if "num_train_timesteps" not in config or "beta_schedule" not in config:
        raise ValueError(
            f"Pretraining has no objective for the scheduler {name}. Known are those with betas, such as "
            f"{DDPMScheduler.__name__}, and {FLOW_MATCHING}."
        )
    if prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(f"The scheduler's prediction_type is {prediction_type!r}, for which there is no objective.")
