# Copyright 2026 The dit_detection authors. Licensed under the Apache License, Version 2.0.
"""
An object detector on a Diffusion Transformer (DiT, Peebles & Xie), not Microsoft's *Document Image Transformer*.

Shape letters: B images, A anchors, K candidates, M objects, N tokens, D width, H W pixels.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .anchors import make_anchors
from .backbone import DiTAttention, DiTBackbone, DiTLayer
from .box_coder import BoxCoder
from .boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, normalize_boxes, scale_boxes
from .configuration_dit_detection import DiTDetectionConfig
from .convert_dit import dit_config, fold_dit
from .head import AnchorHead
from .latent_encoder import LatentEncoder
from .load_dit import load_dit, source_name
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
            matched anchor of the whole batch, over all processes; in eval mode the mean of `loss_per_image`.
        loss_dict (`dict[str, torch.FloatTensor]`, *optional*, with `labels`): `loss_class` and `loss_bbox`, weighted.
        logits (`torch.FloatTensor` of shape `(B, K, num_labels)`): One score per class, before the sigmoid, without a
            "no object" column. In training all anchors; in eval mode at most the best `config.max_candidates`.
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
    # The loss divides by matched anchors itself; Trainer must not divide by a token count.
    accepts_loss_kwargs = False

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

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> DiTDetectionModelOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): In [-1, 1]. Any H and W: what is missing to a whole
                number of tokens is padded with 0, mid-grey.
        """
        stride = self.config.token_stride
        height, width = pixel_values.shape[-2:]
        pixel_values = pixel_values.to(self.dtype)
        if height % stride or width % stride:
            pixel_values = F.pad(pixel_values, (0, -width % stride, 0, -height % stride))
        latents = pixel_values if self.latent_encoder is None else self.latent_encoder(pixel_values)
        last_hidden_state, feature_maps = self.backbone(latents, **kwargs)
        return DiTDetectionModelOutput(last_hidden_state=last_hidden_state, feature_maps=torch.stack(feature_maps, 1))


class DiTForObjectDetection(DiTDetectionPreTrainedModel):
    """A Diffusion Transformer with an anchor-based detection head."""

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
        timestep: int = 50,
        condition: int | None = None,
        id2label: dict[int, str] | None = None,
        out_indices: list[int] | tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
        **config: Any,
    ) -> "DiTForObjectDetection":
        """
        A detector on a pretrained Diffusion Transformer; neck and head start from scratch.

        Args:
            source (`str` or a diffusers object): Hub id or folder of a DiT pipeline (`facebook/DiT-XL-2-256`) or of a
                bare `DiTTransformer2DModel`, or the loaded pipeline or model.
            vae (`str`, diffusers autoencoder or `None`): What turns pixels into latents. `"auto"`: the pipeline's own.
                A Hub id, folder or object otherwise; `None` for a DiT on pixels.
            timestep (`int`): Diffusion timestep whose features are used, 0 (clean) to 999.
            condition (`int`, *optional*): Class the features are conditioned on; by default none (the null class).
            id2label (`dict[int, str]`, *optional*): The classes to detect.
            out_indices (`list[int]`, *optional*): 0-based blocks to tap; by default 10/28, 14/28 and 18/28 of the
                depth. Blocks after the deepest one are not kept.
            dtype (`torch.dtype`, *optional*): By default that of the source.
            config: Anything else of [`DiTDetectionConfig`].

        Raises:
            ValueError: If the source is not a DiT that can be folded, or an argument does not fit it.
        """
        transformer, autoencoder = load_dit(source, vae=vae)
        if id2label is not None:
            id2label = {int(index): name for index, name in id2label.items()}
            config |= {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
        config.setdefault("base_model", source_name(source))
        detection_config = dit_config(
            transformer, autoencoder, timestep=timestep, condition=condition, out_indices=out_indices, **config
        )
        dtype = transformer.dtype if dtype is None else dtype
        model = cls(detection_config).to(dtype)
        model.model.load_state_dict(fold_dit(transformer, autoencoder, detection_config, dtype=dtype))
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

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DiTObjectDetectionOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): In [-1, 1], images at the top left of their canvas.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): 1 for pixels of the image, 0 for padding.
            labels (`list[dict]`, *optional*): Per image `class_labels` `(M,)` and `boxes` `(M, 4)`, cxcywh in [0, 1]
                relative to the image without padding; optionally `iscrowd` `(M,)`, and `size` `(2,)`, the image's
                (height, width) on the canvas, which counts where there is no `pixel_mask`.
        """
        features: DiTDetectionModelOutput = self.model(pixel_values, return_dict=True, **kwargs)
        feature_maps = self.neck(features.feature_maps.unbind(1))  # type: ignore[union-attr]
        logits, deltas = self.head(feature_maps)  # (B, A, num_labels), (B, A, 4)

        shapes = [feature_map.shape[-2:] for feature_map in feature_maps]
        anchors = make_anchors(
            shapes, self.config.strides, self.config.anchor_sizes, self.config.aspect_ratios, logits.device
        )  # (A, 4)
        sizes = _image_sizes(pixel_values, pixel_mask, labels)  # (B, 2)
        centers = (anchors[:, :2] + anchors[:, 2:]) / 2
        valid = (centers < sizes.flip(1)[:, None]).all(dim=2)  # (B, A)

        losses = None
        if labels is not None:
            level_sizes = [height * width * self.config.num_anchors_per_cell for height, width in shapes]
            targets = [_as_target(image_labels, size) for image_labels, size in zip(labels, sizes, strict=True)]
            losses = self.detection_loss(logits, deltas, anchors, level_sizes, valid, targets)

        # Anchors in the padding never score.
        logits = logits.masked_fill(~valid[:, :, None], torch.finfo(logits.dtype).min)
        if not self.training and logits.shape[1] > self.config.max_candidates:
            best = logits.amax(dim=2).topk(self.config.max_candidates).indices[:, :, None]  # (B, K, 1)
            logits = logits.gather(1, best.expand(-1, -1, logits.shape[2]))
            deltas = deltas.gather(1, best.expand(-1, -1, 4))
            anchors = anchors[best.squeeze(2)]
        boxes = self.box_coder.decode(deltas.float(), anchors)  # (B, K, 4), input pixels

        loss_dict = loss_per_image = None
        if losses is not None and self.training:
            loss_dict = losses.per_matched_anchor()
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


def _image_sizes(pixel_values: Tensor, pixel_mask: Tensor | None, labels: list[dict[str, Tensor]] | None) -> Tensor:
    """`(B, 2)` float32: (height, width) of each image on its canvas, without the padding."""
    if pixel_mask is not None:
        mask = pixel_mask.bool()
        sizes = torch.stack([mask.any(dim=2).sum(dim=1), mask.any(dim=1).sum(dim=1)], dim=1)
        return sizes.clamp(min=1).to(pixel_values.device, torch.float32)
    if labels and all("size" in image_labels for image_labels in labels):
        sizes = torch.stack([torch.as_tensor(image_labels["size"]) for image_labels in labels])
        return sizes.to(pixel_values.device, torch.float32)
    height, width = pixel_values.shape[-2:]
    sizes = torch.tensor([[height, width]], dtype=torch.float32, device=pixel_values.device)
    return sizes.expand(pixel_values.shape[0], 2)  # not `len`: it would fix the batch size of an exported graph


def _as_target(image_labels: dict[str, Tensor], size: Tensor) -> dict[str, Tensor]:
    """One image's labels as [`DetectionLoss`] wants them: boxes xyxy in input pixels, `iscrowd` always there."""
    boxes = scale_boxes(image_labels["boxes"].to(size.device, torch.float32).reshape(-1, 4), size)
    # A side of 0 has no logarithm. The image processor refuses such boxes; labels made by hand stay finite.
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:].clamp(min=0.01)], dim=1)
    class_labels = image_labels["class_labels"].to(size.device, torch.int64)
    iscrowd = image_labels.get("iscrowd")
    iscrowd = torch.zeros_like(class_labels) if iscrowd is None else iscrowd.to(size.device)
    return {"boxes": box_cxcywh_to_xyxy(boxes), "class_labels": class_labels, "iscrowd": iscrowd.bool()}
