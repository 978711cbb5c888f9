# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a Diffusion Transformer (DiT) object detector. Not Microsoft's *Document Image Transformer*."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class DiTDetectionConfig(PreTrainedConfig):
    r"""
    Every number a [`DiTForObjectDetection`] needs. The defaults are a DiT of XL size on pixels, cut after its deepest
    tap, with a RetinaNet-style head on a simple feature pyramid. Which of them were measured, and against what, is in
    `model_cards/evidence/README.md` of the library's repository.

    Args:
        in_channels (`int`): Channels the patch embedding reads: latent channels, or 3 for a DiT on pixels.
        patch_size (`int`): Side of a patch, in latent cells (pixels for a DiT on pixels).
        pretrained_grid (`int`): Tokens per image side at diffusion pretraining; sets the unit of the positions.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act, qkv_bias:
            As in a plain ViT. `num_hidden_layers` counts the blocks that are *kept*: up to the deepest tap.
        attention_norm_eps, mlp_norm_eps (`float`): The two norms of a diffusers DiT block have different epsilons.
        timestep (`int`), condition (`int`, *optional*): What the adaLN conditioning was folded at; for the record.
        base_model (`str`, *optional*): Hub id, or name, of the DiT whose weights were folded; for the model card.
        out_indices (`list[int]`, *optional*): 0-based blocks whose outputs are tapped, shallow to deep; the last one
            must be `num_hidden_layers - 1`. By default 10/18, 14/18 and 18/18 of the kept depth.
        latent_encoder (`dict`, *optional*): diffusers config of the autoencoder whose encoder turns pixels into
            latents, with its `_class_name`; `None` for a DiT on pixels.
        neck_channels (`int`, *optional*): Width of the feature pyramid. `None`: no pyramid, the head reads the mixed
            taps, `hidden_size` wide, at the DiT's own stride.
        strides (`list[int]`): Input pixels per cell of each feature map, finest first, doubling from level to level.
        head_channels (`list[int]`): Widths of the head's 3x3 convolutions.
        shared_head_tower (`bool`): Whether class and box layers read the same convolutions (the classic single-scale
            head) or a tower each (RetinaNet).
        predictor_kernel_size (`int`): Kernel of the last class and box layers: 3 (RetinaNet) or 1 (classic).
        anchor_sizes (`list[list[float]]`, *optional*): Per level, square roots of the anchors' areas, in input
            pixels. By default 4 · stride · {1, 2^⅓, 2^⅔} (RetinaNet).
        aspect_ratios (`list[float]`): Height / width of the anchors, the same on every level.
        matcher (`str`): `"atss"` or `"max_iou"`.
        foreground_iou, background_iou (`float`): `max_iou`: an anchor is matched from the first, background below the
            second, ignored between.
        allow_low_quality_matches (`bool`): `max_iou`: whether an object keeps its best anchors below `foreground_iou`.
        atss_candidates (`int`): `atss`: nearest cells per level that are looked at.
        class_loss (`str`): `"focal"` or `"cross_entropy"` (binary, one-against-rest).
        focal_alpha, focal_gamma (`float`): Balance and focus of the focal loss.
        class_weights (`list[float]`, *optional*): One factor per class on the class loss, against imbalance.
        box_loss (`str`): `"giou"` on boxes, or `"smooth_l1"` on deltas.
        smooth_l1_beta (`float`): Where smooth L1 turns from quadratic to linear; 0 is L1, which
            torchvision's RetinaNet takes.
        class_loss_weight, box_loss_weight (`float`): Their weights in the total.
        prior_probability (`float`): Score every class starts from, so that the many background anchors do not drown
            the first steps (RetinaNet, arXiv 1708.02002, section 4.1).
        max_candidates (`int`): In eval mode, the best-scored anchors per image that leave the model.
    """

    model_type = "dit_detection"
    # What Trainer would otherwise carry of every image that it evaluates.
    keys_to_ignore_at_inference = ["last_hidden_state", "hidden_states", "attentions"]

    in_channels: int = 3
    patch_size: int = 16
    pretrained_grid: int = 16
    hidden_size: int = 1152
    num_hidden_layers: int = 18
    num_attention_heads: int = 16
    intermediate_size: int = 4608
    hidden_act: str = "gelu_pytorch_tanh"
    qkv_bias: bool = True
    attention_norm_eps: float = 1e-6
    mlp_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    timestep: int = 50
    condition: int | None = None
    base_model: str | None = None
    out_indices: list[int] | tuple[int, ...] = ()

    latent_encoder: dict[str, Any] | None = None

    neck_channels: int | None = 256
    strides: list[int] | tuple[int, ...] = (8, 16, 32, 64, 128)
    head_channels: list[int] | tuple[int, ...] = (256, 256, 256, 256)
    shared_head_tower: bool = False
    predictor_kernel_size: int = 3

    anchor_sizes: list[list[float | int]] | tuple[list[float | int], ...] = ()
    aspect_ratios: list[float | int] | tuple[float | int, ...] = (0.5, 1.0, 2.0)

    matcher: Literal["atss", "max_iou"] = "atss"
    foreground_iou: float | int = 0.5
    background_iou: float | int = 0.4
    allow_low_quality_matches: bool = True
    atss_candidates: int = 9
    class_loss: Literal["focal", "cross_entropy"] = "focal"
    focal_alpha: float | int = 0.25
    focal_gamma: float | int = 2.0
    class_weights: list[float | int] | None = None
    box_loss: Literal["giou", "smooth_l1"] = "giou"
    smooth_l1_beta: float | int = 1.0 / 9.0
    class_loss_weight: float | int = 1.0
    box_loss_weight: float | int = 2.0
    prior_probability: float = 0.01
    max_candidates: int = 1000

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the derived defaults and refuse what could not run."""
        self._complete()
        super().__post_init__(**kwargs)
        self._check()

    def prepare(self) -> None:
        """
        As after its making, for a model that is built of it: `from_pretrained` sets fields afterwards.

        Raises:
            ValueError: If there could be no such model.
        """
        self._complete()
        self._check()
        # `from_pretrained(id2label=...)` takes them as they are, with the keys of JSON, and leaves the old `label2id`.
        names = self.id2label  # type: ignore[has-type]
        self.id2label = {int(key) if str(key).isdecimal() else key: name for key, name in names.items()}
        self._check_classes()
        self.label2id = {name: label for label, name in self.id2label.items()}

    def _complete(self) -> None:
        if not self.out_indices:
            depth = self.num_hidden_layers
            self.out_indices = sorted({max(1, round(depth * blocks / 18)) - 1 for blocks in (10, 14, 18)})
        # Lists, not tuples: what JSON gives back, so that a config equals its own reload.
        self.out_indices = list(self.out_indices)
        self.strides = list(self.strides)
        self.head_channels = list(self.head_channels)
        self.aspect_ratios = [float(ratio) for ratio in self.aspect_ratios]
        if not self.anchor_sizes:
            self.anchor_sizes = [[4 * stride * 2 ** (octave / 3) for octave in range(3)] for stride in self.strides]
        self.anchor_sizes = [[float(size) for size in sizes] for sizes in self.anchor_sizes]

    @property
    def token_stride(self) -> int:
        """Input pixels per side of a token: patch size times the downsampling of the latent encoder."""
        if self.latent_encoder is None:
            return self.patch_size
        is_tiny = self.latent_encoder["_class_name"] == "AutoencoderTiny"
        stages = self.latent_encoder["encoder_block_out_channels" if is_tiny else "block_out_channels"]
        return self.patch_size * 2 ** (len(stages) - 1)

    @property
    def num_anchors_per_cell(self) -> int:
        """Anchors at every cell of every feature map."""
        return len(self.anchor_sizes[0]) * len(self.aspect_ratios)

    def frozen_states_shape(self, num_frozen_layers: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(S, h, w, D) of what the first blocks pass on for a token grid: see `DiTDetectionModel.encode_frozen`."""
        num_taps = sum(index < num_frozen_layers for index in self.out_indices)
        num_states = num_taps + (num_frozen_layers - 1 not in self.out_indices)
        return num_states, height, width, self.hidden_size

    def _check(self) -> None:
        for name in ("patch_size", "hidden_size", "num_attention_heads", "atss_candidates", "max_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("class_loss_weight", "box_loss_weight", "focal_gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")
        if not 0 <= self.focal_alpha <= 1:
            raise ValueError(f"focal_alpha={self.focal_alpha} must lie between 0 and 1.")
        if self.class_weights is not None and min(self.class_weights, default=0) < 0:
            raise ValueError(f"class_weights={self.class_weights} must be at least 0.")
        if (self.neck_channels is not None and self.neck_channels < 1) or min(self.head_channels, default=1) < 1:
            raise ValueError(
                f"neck_channels={self.neck_channels} and head_channels={self.head_channels} must be at least 1; for "
                "no pyramid neck_channels=None, for no convolutions head_channels=[]."
            )
        if self.latent_encoder is not None and self.latent_encoder.get("_class_name") not in (
            "AutoencoderKL",
            "AutoencoderTiny",
        ):
            raise ValueError(
                f"latent_encoder['_class_name'] is {self.latent_encoder.get('_class_name')!r}; AutoencoderKL and "
                f"AutoencoderTiny are supported, or None for a DiT on pixels."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}."
            )
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of 4: the 2-D positions need it.")
        taps = self.out_indices
        if not taps or taps != sorted(set(taps)) or taps[0] < 0 or taps[-1] != self.num_hidden_layers - 1:
            raise ValueError(
                f"out_indices={taps} must rise from at least 0 to num_hidden_layers - 1 = "
                f"{self.num_hidden_layers - 1}: blocks after the deepest tap would never run. Lower num_hidden_layers "
                f"or tap the last block."
            )
        if (
            not self.strides
            or self.strides[0] < 1
            or any(fine * 2 != coarse for fine, coarse in zip(self.strides, self.strides[1:], strict=False))
        ):
            raise ValueError(f"strides={self.strides} must double from level to level, such as [8, 16, 32].")
        if self.neck_channels is None and self.strides != [self.token_stride]:
            raise ValueError(
                f"Without a neck (neck_channels=None) the only feature map has the DiT's own stride: set "
                f"strides=[{self.token_stride}] instead of {self.strides}."
            )
        octave = math.log2(self.strides[0] / self.token_stride)
        if octave != int(octave) or octave > 0:
            raise ValueError(
                f"strides={self.strides} must start at the token stride {self.token_stride} or at a half, a "
                f"quarter, … of it."
            )
        if len(self.anchor_sizes) != len(self.strides) or len({len(sizes) for sizes in self.anchor_sizes}) != 1:
            raise ValueError(
                f"anchor_sizes must give the same number of sizes for each of the {len(self.strides)} strides, got "
                f"{self.anchor_sizes}."
            )
        if not (self.anchor_sizes[0] and self.aspect_ratios):
            raise ValueError("anchor_sizes and aspect_ratios must each give at least one anchor per cell.")
        if not all(size > 0 for sizes in self.anchor_sizes for size in sizes) or not all(
            r > 0 for r in self.aspect_ratios
        ):
            raise ValueError(
                f"anchor_sizes={self.anchor_sizes} and aspect_ratios={self.aspect_ratios} must be positive."
            )
        if not 0 < self.background_iou <= self.foreground_iou <= 1:
            raise ValueError(
                f"0 < background_iou={self.background_iou} <= foreground_iou={self.foreground_iou} <= 1 must hold."
            )
        if not 0 < self.prior_probability < 1:
            raise ValueError(f"prior_probability={self.prior_probability} must lie between 0 and 1.")
        if self.smooth_l1_beta < 0:
            raise ValueError(f"smooth_l1_beta={self.smooth_l1_beta} must be at least 0, which is L1.")
        if self.predictor_kernel_size < 1 or self.predictor_kernel_size % 2 == 0:
            raise ValueError(
                f"predictor_kernel_size={self.predictor_kernel_size} must be odd: one prediction per cell."
            )

    def _check_classes(self) -> None:
        names = self.id2label
        if not names or sorted(names) != list(range(len(names))):
            raise ValueError(
                f"id2label has the classes {sorted(names)}: they must be numbered from 0 without a gap, and be at "
                "least one. Renumber them, as `id2label_of(dataset)` does."
            )
        if twice := sorted({name for name in names.values() if list(names.values()).count(name) > 1}):
            raise ValueError(f"id2label names several classes {', '.join(map(repr, twice))}. Give each its own name.")
        if self.class_weights is not None and len(self.class_weights) != self.num_labels:
            raise ValueError(
                f"class_weights has {len(self.class_weights)} entries for num_labels={self.num_labels}. Give those of "
                "these classes, or class_weights=None."
            )
