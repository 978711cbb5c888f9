# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""
An object detector on a Diffusion Transformer (DiT, Peebles & Xie), not Microsoft's *Document Image Transformer*.

Shape letters: B images, A anchors, K candidates, M objects, N tokens, D width, H W pixels.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .anchors import feature_shapes_of, make_anchors
from .backbone import DiTAttention, DiTBackbone, DiTLayer
from .box_coder import BoxCoder
from .boxes import box_xyxy_to_cxcywh, normalize_boxes
from .configuration_dit_detection import DiTDetectionConfig
from .convert_dit import check_overrides, dit_config, fold_dit
from .head import AnchorHead
from .labels import make_targets, pad_labels
from .latent_encoder import LatentEncoder
from .load_dit import default_timestep, load_dit, refuse_revision, source_name
from .load_original import load_original
from .losses import DetectionLoss
from .matcher import AnchorMatcher
from .neck import SimpleFeaturePyramid, SingleScaleNeck

# `pipeline("object-detection")` runs any registered model, but logs an error for a class that is not in this list.
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES["dit_detection"] = "DiTForObjectDetection"


@dataclass
class DiTDetectionModelOutput(ModelOutput):
    """
    Output of [`DiTDetectionModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, N, D)`): Output of the deepest tapped block.
        feature_maps (`torch.FloatTensor` of shape `(B, T, D, h, w)`): The T tapped maps, normalised, shallow to deep.
            One tensor, because pipelines take a batch of outputs apart along the first axis of every field.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): The embedding, then each block's output, `(B, N, D)`.
        attentions (`tuple[torch.FloatTensor]`, *optional*): Each block's weights `(B, heads, N, N)`; eager only.
    """

    last_hidden_state: Tensor | None = None
    feature_maps: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class DiTObjectDetectionOutput(ModelOutput):
    """
    Output of [`DiTForObjectDetection`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, with `labels`): The sum of `loss_dict`. In training per
            matched anchor of the whole batch, over all processes (with `num_items_in_batch`: this process's part of
            that); in eval mode the mean of `loss_per_image`.
        loss_dict (`dict[str, torch.FloatTensor]`, *optional*, with `labels`): `loss_class` and `loss_bbox`, weighted.
        logits (`torch.FloatTensor` of shape `(B, K, num_labels)`): One score per class, before the sigmoid, without a
            "no object" column. In training all anchors; in eval mode at most the best `config.max_candidates`,
            best first.
        pred_boxes (`torch.FloatTensor` of shape `(B, K, 4)`): cxcywh in [0, 1], relative to the image *without* its
            padding, float32.
        loss_per_image (`torch.FloatTensor` of shape `(B,)`, *optional*, in eval mode with `labels`): Each image's loss
            per matched anchor of its own: it does not depend on what the image is batched with.
        last_hidden_state, hidden_states, attentions: As in [`DiTDetectionModelOutput`].
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    loss_per_image: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class DiTDetectionPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the switches that transformers reads."""

    config: DiTDetectionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["DiTLayer", "PatchEmbedding", "LatentEncoder"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": DiTLayer, "attentions": DiTAttention}
    # The detector's loss takes `num_items_in_batch`: then Trainer does not divide it by the steps of accumulation.
    accepts_loss_kwargs = True

    def __init__(self, config: DiTDetectionConfig) -> None:
        config.prepare()
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "init_own_weights"):
            module.init_own_weights()  # type: ignore[operator]

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.base_model.backbone.patch_embedding


class DiTDetectionModel(DiTDetectionPreTrainedModel):
    """Pixels → tapped feature maps: the latent encoder, if the DiT has one, and the folded DiT."""

    def __init__(self, config: DiTDetectionConfig) -> None:
        super().__init__(config)
        self.latent_encoder = LatentEncoder(config.latent_encoder) if config.latent_encoder is not None else None
        self.backbone = DiTBackbone(config)
        self.post_init()

    @torch.no_grad()
    def encode_frozen(self, pixel_values: Tensor) -> dict[str, Any]:
        """
        What the frozen part makes of images: keep it, and pass it to `forward` in the place of `pixel_values`.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): As in `forward`.

        Returns:
            `dict`: With the patch embedding and some blocks frozen, `frozen_states` `(B, S, h, w, D)` and
            `num_frozen_layers`; with the latent encoder alone, `latents` `(B, in_channels, H', W')`.

        Raises:
            ValueError: If nothing is frozen that takes time.
        """
        num_frozen_layers = self.backbone.num_frozen_layers()
        if num_frozen_layers == 0 and self.latent_encoder is None:
            raise ValueError(
                "Nothing of this model is frozen. Call `freeze_backbone` first; `None` freezes all blocks."
            )
        latents = self._encode_latents(pixel_values)
        if num_frozen_layers == 0:
            return {"latents": latents}
        states = self.backbone.encode_frozen(latents, num_frozen_layers)
        return {"frozen_states": states, "num_frozen_layers": num_frozen_layers}

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor | None = None,
        *,
        latents: Tensor | None = None,
        frozen_states: Tensor | None = None,
        num_frozen_layers: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DiTDetectionModelOutput:
        r"""
        Takes one of `pixel_values`, `latents` and `frozen_states`.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`, *optional*): In [-1, 1]. Any H and W: what is missing
                to a whole number of tokens is padded with 0, mid-grey.
            latents (`torch.Tensor` of shape `(B, in_channels, H', W')`, *optional*): As `encode_frozen` gives them.
            frozen_states (`torch.Tensor` of shape `(B, S, h, w, D)`, *optional*), num_frozen_layers (`int`): As
                `encode_frozen` gives them. `hidden_states` and `attentions` then begin after these blocks.
        """
        if (pixel_values is None) + (latents is None) + (frozen_states is None) != 2:
            raise ValueError("Pass exactly one of pixel_values, latents and frozen_states.")
        if (frozen_states is None) != (num_frozen_layers == 0):
            raise ValueError("Pass frozen_states and num_frozen_layers together, as `encode_frozen` gives them.")
        if pixel_values is not None:
            encoded = self._encode_latents(pixel_values)
        elif latents is not None:
            encoded = self._as_computed(latents)
        elif frozen_states is not None:
            self._check_frozen_states(frozen_states, num_frozen_layers)
            encoded = self._as_computed(frozen_states)
        last_hidden_state, feature_maps = self.backbone(encoded, num_frozen_layers, **kwargs)
        return DiTDetectionModelOutput(last_hidden_state=last_hidden_state, feature_maps=torch.stack(feature_maps, 1))

    def _encode_latents(self, pixel_values: Tensor) -> Tensor:
        """`(B, 3, H, W)` pixels → `(B, in_channels, H', W')`, a whole number of tokens."""
        stride = self.config.token_stride
        height, width = pixel_values.shape[-2:]
        pixel_values = pixel_values.to(self.dtype)
        # Compiled or exported, one graph serves every size, whether it needs padding or not.
        if torch.compiler.is_compiling() or height % stride or width % stride:
            # No negative modulo: inductor (torch 2.15) cannot compile one of a dynamic size.
            rows, columns = (height + stride - 1) // stride * stride, (width + stride - 1) // stride * stride
            pixel_values = F.pad(pixel_values, (0, columns - width, 0, rows - height))
        return pixel_values if self.latent_encoder is None else self.latent_encoder(pixel_values)

    def _as_computed(self, encoded: Tensor) -> Tensor:
        """In the model's type, or, under autocast, as the frozen part left it: float32 would cost twice the memory."""
        return encoded if torch.is_autocast_enabled(encoded.device.type) else encoded.to(self.dtype)

    def _check_frozen_states(self, frozen_states: Tensor, num_frozen_layers: int) -> None:
        """Raise ValueError if these cannot be the states after that many blocks of this model."""
        shape = self.config.frozen_states_shape(num_frozen_layers, *frozen_states.shape[2:4])
        if tuple(frozen_states.shape[1:]) != shape or num_frozen_layers > self.config.num_hidden_layers:
            raise ValueError(
                f"frozen_states of shape {tuple(frozen_states.shape)} do not belong to this model after "
                f"num_frozen_layers={num_frozen_layers} blocks: expected (B, {', '.join(map(str, shape))}). Compute "
                "them with `encode_frozen` of the model that reads them."
            )


class DiTForObjectDetection(DiTDetectionPreTrainedModel):
    """A Diffusion Transformer with an anchor-based detection head. In eval mode, threads may share one."""

    def __init__(self, config: DiTDetectionConfig) -> None:
        super().__init__(config)
        self.model = DiTDetectionModel(config)
        self.neck = SingleScaleNeck(config) if config.neck_channels is None else SimpleFeaturePyramid(config)
        self.head = AnchorHead(config)
        self.box_coder = BoxCoder()
        matcher = AnchorMatcher(
            config.matcher,
            config.num_anchors_per_cell,
            config.foreground_iou,
            config.background_iou,
            config.allow_low_quality_matches,
            config.atss_candidates,
        )
        self.detection_loss = DetectionLoss(config, matcher)
        self.post_init()

    @classmethod
    def from_diffusers(
        cls,
        source: Any,
        *,
        vae: Any = "auto",
        timestep: int | None = None,
        condition: int | None = None,
        id2label: dict[int, str] | None = None,
        out_indices: list[int] | tuple[int, ...] | None = None,
        dtype: torch.dtype | str | None = None,
        family: Literal["dit", "sit", "repa"] | None = None,
        num_attention_heads: int | None = None,
        revision: str | None = None,
        **config: Any,
    ) -> "DiTForObjectDetection":
        """
        A detector on a pretrained Diffusion Transformer; neck and head start from scratch.

        Args:
            source (`str` or a diffusers object): Hub id or folder of a DiT pipeline (`facebook/DiT-XL-2-256`) or of a
                bare `DiTTransformer2DModel`, or the loaded pipeline or model. Or a file of the original format, with
                `family`, and `vae` for a DiT on latents: `stabilityai/sd-vae-ft-ema` for the published ones.
            vae (`str`, diffusers autoencoder or `None`): What turns pixels into latents. `"auto"`: the pipeline's own.
                A Hub id, folder or object otherwise; `None` for a DiT on pixels.
            timestep (`int`, *optional*): Diffusion timestep whose features are used, 0 (clean) to 999; of models of
                flow matching, thousandths of noise. By default 50, and 200 of flow matching, as the scheduler of a
                pipeline or `family` says.
            condition (`int`, *optional*): Class the features are conditioned on; by default none (the null class).
            id2label (`dict[int, str]`, *optional*): The classes to detect.
            out_indices (`list[int]`, *optional*): 0-based blocks to tap; by default 10/28, 14/28 and 18/28 of the
                depth. Blocks after the deepest one are not kept.
            dtype (`torch.dtype` or `str`, *optional*): By default, and with `"auto"`, that of the source.
            family (`str`, *optional*): Of a file of the original format, whose code saved it: `"dit"`, `"sit"` or
                `"repa"`. They count time differently, and the file does not tell.
            num_attention_heads (`int`, *optional*): Of such a file if its width is not that of a published size.
            revision (`str`, *optional*): Branch, tag or commit of a source on the Hub.
            config: Anything else of [`DiTDetectionConfig`], but for what the DiT itself decides.

        Raises:
            ValueError: If the source is not a DiT that can be folded, or an argument does not fit it.
        """
        check_overrides(config)
        refuse_revision(source, revision)
        dit, is_path = source, isinstance(source, str | os.PathLike)
        if is_path and os.path.isfile(source):
            dit = load_original(source, family, num_attention_heads)
        elif family is not None or num_attention_heads is not None:
            shown = os.fspath(source) if is_path else type(source).__name__
            raise ValueError(
                f"family={family!r} and num_attention_heads={num_attention_heads} are for files of the original "
                f"format, and source={shown!r} is no file. For diffusers leave them out: its configuration tells."
            )
        transformer, autoencoder = load_dit(dit, vae=vae, revision=revision)
        if timestep is None:
            timestep = default_timestep(source, family, revision)
        if id2label is not None:
            if not isinstance(id2label, Mapping):
                raise ValueError(f"id2label must be a dict of names by label, but is {id2label!r:.80}.")
            id2label = {int(index): name for index, name in id2label.items()}
            config |= {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
        config.setdefault("base_model", source_name(source))
        detection_config = dit_config(
            transformer, autoencoder, timestep=timestep, condition=condition, out_indices=out_indices, **config
        )
        if isinstance(dtype, str) and dtype != "auto":
            named = getattr(torch, dtype.removeprefix("torch."), None)
            if not isinstance(named, torch.dtype):
                raise ValueError(f'dtype={dtype!r} is no type of torch, such as "bfloat16", and not "auto".')
            dtype = named
        dtype = transformer.dtype if dtype is None or isinstance(dtype, str) else dtype
        model = cls(detection_config).to(dtype)
        model.model.load_state_dict(fold_dit(transformer, autoencoder, detection_config, dtype=dtype, family=family))
        return model.eval()

    def freeze_backbone(self, num_layers: int | None = None) -> None:
        """
        Stop training the patch embedding and the first blocks. (The latent encoder is always frozen.)

        What is frozen builds no autograd graph. The taps' norms stay trainable: they belong to the neck's side.

        Args:
            num_layers (`int`, *optional*): How many blocks, from the first; by default all.

        Raises:
            ValueError: If there are not that many blocks.
        """
        layers = self.model.backbone.layers
        if num_layers is None:
            num_layers = len(layers)
        if not 0 <= num_layers <= len(layers):
            raise ValueError(
                f"num_layers={num_layers} must lie between 0 and {len(layers)}, the blocks of this model."
            )
        # The embedding too: were it trainable, the backward pass would still run through every frozen block.
        self.model.backbone.patch_embedding.requires_grad_(False)
        for index, layer in enumerate(layers):
            layer.requires_grad_(index >= num_layers)

    def unfreeze_backbone(self) -> None:
        """Train the patch embedding and every block. The latent encoder stays frozen."""
        self.model.backbone.requires_grad_(True)

    @torch.no_grad()
    def match_anchors(
        self,
        labels: Mapping[str, Tensor],
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        *,
        latents: Tensor | None = None,
        frozen_states: Tensor | None = None,
    ) -> Tensor:
        """
        Which object each anchor answers for. It follows from labels and shapes: no weights are read.

        With the result as `matched_idxs` among the labels, `forward` does not match them again. So the matched anchors
        of all batches of an optimizer step can be counted before the first is computed.

        Args:
            labels: As [`pad_labels`] gives them.
            pixel_values, pixel_mask, latents, frozen_states: As in `forward`.

        Returns:
            `torch.Tensor` of shape `(B, A)`, int64: A row of the labels, `BACKGROUND` (-1) or `IGNORE` (-2).
        """
        stride, canvas = self.config.token_stride, self._canvas_of(pixel_values, latents, frozen_states)
        inputs = next(given for given in (pixel_values, latents, frozen_states) if given is not None)
        sizes = _image_sizes(canvas, inputs, pixel_mask, labels)
        shapes = feature_shapes_of([-(-side // stride) for side in canvas], stride, self.config.strides)
        anchors, level_sizes, valid = self._place_anchors(shapes, sizes)
        return self.detection_loss.match(anchors, level_sizes, valid, make_targets(labels, sizes))

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        labels: Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor] | None = None,
        *,
        latents: Tensor | None = None,
        frozen_states: Tensor | None = None,
        num_frozen_layers: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DiTObjectDetectionOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): In [-1, 1], images at the top left of their canvas.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): 1 for pixels of the image, 0 for padding.
            labels (`list[dict]`, *optional*): Per image `class_labels` `(M,)` and `boxes` `(M, 4)`, cxcywh in [0, 1]
                relative to the image without padding; optionally `iscrowd` `(M,)`, and `size` `(2,)`, the image's
                (height, width) on the canvas, which counts where there is no `pixel_mask`. Or the rectangles that
                [`pad_labels`] makes of them: better for a compiled model, which then does not see M change. These may
                have `matched_idxs`, of `match_anchors`.
            latents, frozen_states, num_frozen_layers: In the place of `pixel_values`, what
                [`DiTDetectionModel.encode_frozen`] made of them: the frozen part then costs nothing.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): In training, the matched anchors of all batches
                of the optimizer step, over all processes: see [`ImageLosses.per_matched_anchor`].
        """
        if labels is not None and not isinstance(labels, Mapping):
            labels = pad_labels(labels, self.config.num_labels)
        features: DiTDetectionModelOutput = self.model(
            pixel_values,
            latents=latents,
            frozen_states=frozen_states,
            num_frozen_layers=num_frozen_layers,
            return_dict=True,
            **kwargs,
        )
        feature_maps = self.neck(features.feature_maps.unbind(1))  # type: ignore[union-attr]
        logits, deltas = self.head(feature_maps)  # (B, A, num_labels), (B, A, 4)

        shapes = [feature_map.shape[-2:] for feature_map in feature_maps]
        canvas = self._canvas_of(pixel_values, latents, frozen_states)
        if pixel_values is not None and pixel_mask is not None and not torch.compiler.is_compiling():
            _check_mask(pixel_mask, canvas)
        sizes = _image_sizes(canvas, logits, pixel_mask, labels)  # (B, 2)
        anchors, level_sizes, valid = self._place_anchors(shapes, sizes)  # (A, 4), per level, (B, A)

        losses = None
        if labels is not None:
            losses = self.detection_loss(logits, deltas, anchors, level_sizes, valid, make_targets(labels, sizes))

        # Anchors in the padding never score.
        lowest = torch.finfo(logits.dtype).min
        if not self.training:
            scores = logits.amax(dim=2).masked_fill(~valid, lowest)
            # Best first, however few there are: a branch on their number would fix the sizes of an exported graph.
            best = scores.topk(torch.sym_min(logits.shape[1], self.config.max_candidates)).indices  # (B, K)
            logits = logits.gather(1, best[:, :, None].expand(-1, -1, logits.shape[2]))
            deltas = deltas.gather(1, best[:, :, None].expand(-1, -1, 4))
            anchors, valid = anchors[best], valid.gather(1, best)
        logits = logits.masked_fill(~valid[:, :, None], lowest)
        boxes = self.box_coder.decode(deltas.float(), anchors)  # (B, K, 4), input pixels

        loss_dict = loss_per_image = None
        if losses is not None and self.training:
            loss_dict = losses.per_matched_anchor(num_items_in_batch)
        elif losses is not None:
            per_image = losses.per_image()
            loss_dict = {name: values.mean() for name, values in per_image.items()}
            loss_per_image = torch.stack(list(per_image.values())).sum(dim=0)
        return DiTObjectDetectionOutput(
            loss=None if loss_dict is None else torch.stack(list(loss_dict.values())).sum(),
            loss_dict=loss_dict,
            logits=logits,
            pred_boxes=box_xyxy_to_cxcywh(normalize_boxes(boxes, sizes)),
            loss_per_image=loss_per_image,
            last_hidden_state=features.last_hidden_state,
            hidden_states=features.hidden_states,
            attentions=features.attentions,
        )

    def _canvas_of(
        self, pixel_values: Tensor | None, latents: Tensor | None, frozen_states: Tensor | None
    ) -> list[int]:
        """(height, width) of the inputs in pixels; encoded ones are of a canvas of whole tokens."""
        if pixel_values is not None:
            return list(pixel_values.shape[-2:])
        encoded, cell = (frozen_states, 1) if latents is None else (latents, self.config.patch_size)
        return [side // cell * self.config.token_stride for side in encoded.shape[2:4]]  # type: ignore[union-attr]

    def _place_anchors(self, shapes: list[tuple[int, int]], sizes: Tensor) -> tuple[Tensor, list[int], Tensor]:
        """Anchors `(A, 4)` of feature maps, how many a level has, and which lie in the images `(B, A)`, not beside."""
        config = self.config
        anchors = make_anchors(shapes, config.strides, config.anchor_sizes, config.aspect_ratios, sizes.device)
        # Rounded to what they are, multiples of half a pixel: all anchors of a cell are in the image, or none.
        centers = (anchors[:, :2] + anchors[:, 2:]).round() / 2
        # An image thinner than a cell has that row of the finest cells, or nothing could be found in it.
        sides = sizes.flip(1).clamp(min=config.strides[0])
        level_sizes = [height * width * config.num_anchors_per_cell for height, width in shapes]
        return anchors, level_sizes, (centers < sides[:, None]).all(dim=2)


def _check_mask(pixel_mask: Tensor, canvas: list[int]) -> None:
    if list(pixel_mask.shape[-2:]) != canvas:
        height, width = pixel_mask.shape[-2:]
        raise ValueError(f"pixel_mask is {height} x {width}, but the images' canvas {canvas[0]} x {canvas[1]}.")


def _image_sizes(
    canvas: Sequence[int], like: Tensor, pixel_mask: Tensor | None, labels: Mapping[str, Tensor] | None
) -> Tensor:
    """`(B, 2)` float32 on the device of `like`: (height, width) of each image on its canvas, without the padding."""
    if pixel_mask is not None:
        # (A comparison would fix sizes of an exported graph.)
        if not torch.compiler.is_compiling() and pixel_mask.shape[0] != like.shape[0]:
            raise ValueError(f"There are pixel_masks of {len(pixel_mask)} images, but {len(like)} images.")
        mask = pixel_mask.bool()
        sizes = torch.stack([mask.any(dim=2).sum(dim=1), mask.any(dim=1).sum(dim=1)], dim=1)
        return sizes.clamp(min=1).to(like.device, torch.float32)
    if labels is not None and "size" in labels:
        if not torch.compiler.is_compiling() and labels["size"].shape[0] != like.shape[0]:
            raise ValueError(f"There are labels of {len(labels['size'])} images, but {len(like)} images.")
        return labels["size"].to(like.device, torch.float32)
    sizes = torch.tensor([list(canvas)], dtype=torch.float32, device=like.device)
    return sizes.expand(like.shape[0], 2)  # not `len`: it would fix the batch size of an exported graph
