"""
A detector → a file that runs without this package: `torch.export` (.pt2) or ONNX (.onnx).

Shape letters: B images, K candidates, C classes, M detections, H W pixels.
"""

import copy
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .model.boxes import box_cxcywh_to_xyxy, scale_boxes
from .model.image_processing_dit_detection import MAX_BEFORE_NMS

INPUT_AXES: dict[str, tuple[int | str, ...]] = {
    "pixel_values": ("batch", 3, "height", "width"),
    "pixel_mask": ("batch", "height", "width"),
    "target_sizes": ("batch", 2),
}

LEAST_OPSET = 18  # of torch's exporter

# Per-class NMS of a batch as one operator: as many boxes stay as the pixels decide, a size that no traced graph knows.
# Only ONNX implements it.
torch.library.define(
    "dit_detection::suppress", "(Tensor boxes, Tensor scores, float iou_threshold, int max_detections) -> Tensor"
)


@torch.library.register_fake("dit_detection::suppress")
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, max_detections: int) -> Tensor:
    return torch.empty_like(scores)


class ExportableDetector(nn.Module):
    """
    A detector whose outputs are a plain `dict` of tensors, with post-processing on request.

    Args:
        model ([`DiTForObjectDetection`]): In eval mode.
        nms_threshold (`float`), max_detections (`int`): As in [`DiTDetectionImageProcessor`].
    """

    def __init__(self, model: Any, nms_threshold: float = 0.6, max_detections: int = 100) -> None:
        super().__init__()
        self.model: Any = model
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor, target_sizes: Tensor | None = None
    ) -> dict[str, Tensor]:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`), pixel_mask (`torch.Tensor` of shape `(B, H, W)`): As
                the image processor makes them.
            target_sizes (`torch.Tensor` of shape `(B, 2)`, *optional*): (height, width) of each original image; 1 and
                1 leaves the boxes in [0, 1].

        Returns:
            `logits` `(B, K, C)` and `pred_boxes` `(B, K, 4)`; with `target_sizes` the result of `detections` too.
        """
        outputs = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask)
        result = {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}
        if target_sizes is not None:
            result |= self.detections(outputs.logits, outputs.pred_boxes, target_sizes)
        return result

    def detections(self, logits: Tensor, pred_boxes: Tensor, target_sizes: Tensor) -> dict[str, Tensor]:
        """
        What `post_process_object_detection` finds at threshold 0, padded to `max_detections`.

        NMS goes from the best score down, so what lies above a higher threshold is the same with or without the rest.

        Returns:
            `scores` `(B, M)` (falling), `labels` `(B, M)` and `boxes` `(B, M, 4)` (xyxy, original pixels); score 0,
            label -1 and box 0 where there is no further detection.
        """
        boxes = box_cxcywh_to_xyxy(pred_boxes)  # (B, K, 4)
        num_labels = logits.shape[2]
        scores = logits.sigmoid().flatten(1)  # (B, K · C)
        best, order = scores.topk(torch.sym_min(scores.shape[1], MAX_BEFORE_NMS))
        scores = torch.zeros_like(scores).scatter(1, order, best)
        scores = torch.ops.dit_detection.suppress(
            boxes, scores.unflatten(1, (-1, num_labels)).transpose(1, 2), self.nms_threshold, self.max_detections
        )  # (B, C, K), 0 for what is suppressed
        scores = F.pad(scores.transpose(1, 2).flatten(1), (0, self.max_detections))
        best, order = scores.topk(self.max_detections)  # (B, M)
        found = best > 0
        candidates = (order // num_labels).clamp(max=boxes.shape[1] - 1)
        boxes = boxes.gather(1, candidates[:, :, None].expand(-1, -1, 4)) * found[:, :, None]
        labels = (order % num_labels).masked_fill(~found, -1)
        return {"scores": best, "labels": labels, "boxes": scale_boxes(boxes, target_sizes)}


def export_torch(model: Any, path: str | Path, *, static_size: tuple[int, int] | None = None) -> None:
    """
    Write a detector as a `torch.export` program, in its own dtype; `torch.export.load(path).module()` runs it.

    Inputs `pixel_values` `(B, 3, H, W)` and `pixel_mask` `(B, H, W)`; output a `dict` with `logits` and `pred_boxes`.

    Args:
        model ([`DiTForObjectDetection`]): In eval mode.
        path (`str` or `Path`): A `.pt2` file.
        static_size (`tuple[int, int]`, *optional*): (height, width) in pixels, to fix the input to one image of this
            size. By default any batch, height and width will do; in a `.pt2` both sides must be longer than a token
            and than a cell of the coarsest feature map: `coarsest_of(config)` pixels.

    Raises:
        ValueError: If the model cannot be exported. OSError: If the file cannot be written.
    """
    check_target(path)
    _check_model(model)
    torch.export.save(_trace(ExportableDetector(model), static_size=static_size), path)


def export_onnx(
    model: Any,
    path: str | Path,
    *,
    image_processor: Any = None,
    with_post_processing: bool = False,
    static_size: tuple[int, int] | None = None,
    opset: int | None = None,
    external_data: bool = False,
) -> None:
    """
    Write a detector as ONNX, in float32: onnxruntime's CPU has few kernels for half precision.

    Inputs and outputs are those of [`ExportableDetector`]. The file's metadata holds, as JSON, `id2label`,
    `base_model` and `image_processor` (canvas, mean and standard deviation, NMS).

    Args:
        model ([`DiTForObjectDetection`]): In eval mode; it stays as it is, whatever its dtype and device.
        path (`str` or `Path`): An `.onnx` file.
        image_processor ([`DiTDetectionImageProcessor`], *optional*): For the metadata and for post-processing.
        with_post_processing (`bool`): Adds the input `target_sizes` and the outputs `scores`, `labels` and `boxes`.
        static_size (`tuple[int, int]`, *optional*): As in [`export_torch`].
        opset (`int`, *optional*): By default that of torch's exporter.
        external_data (`bool`): Whether the weights go to a file of their own, `<path>.data`, beside it. Above 2 GB,
            the limit of one ONNX file, they always do.

    Raises:
        ImportError: If onnx or onnxscript is missing. ValueError: If the model cannot be exported. OSError: If the
        file cannot be written.
    """
    require_onnx()
    check_target(path)
    if opset is not None and opset < LEAST_OPSET:
        raise ValueError(f"opset={opset}: torch's exporter writes {LEAST_OPSET} or later. Leave it out.")
    if with_post_processing and image_processor is None:
        raise ValueError("with_post_processing=True needs image_processor: it holds the threshold of the NMS.")
    _check_model(model)
    if model.dtype != torch.float32 or model.device.type != "cpu":
        model = copy.deepcopy(model).to("cpu", torch.float32)
    detector = ExportableDetector(model)
    if with_post_processing:
        detector = ExportableDetector(model, image_processor.nms_threshold, image_processor.max_detections)
    traced = _trace(detector, with_post_processing, static_size)
    program: Any = torch.onnx.export(
        traced,
        input_names=list(INPUT_AXES)[: 3 if with_post_processing else 2],
        output_names=["logits", "pred_boxes", *(["scores", "labels", "boxes"] if with_post_processing else [])],
        opset_version=opset,
        dynamo=True,
        custom_translation_table={torch.ops.dit_detection.suppress.default: _suppress_in_onnx},
        verbose=False,
    )
    written = program.model.opset_imports[""]
    if opset not in (None, written):
        raise ValueError(f"opset={opset}: torch's exporter wrote {written} all the same. Take that, or leave it out.")
    if static_size is None:
        _name_axes(program.model.graph)
    metadata = {"id2label": model.config.id2label, "base_model": model.config.base_model}
    if image_processor is not None:
        metadata["image_processor"] = json.loads(image_processor.to_json_string())
    program.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
    program.save(str(path), external_data=external_data)


def coarsest_of(config: Any) -> int:
    """Pixels per side of a token, or of a cell of the coarsest feature map where that is larger."""
    return max(config.token_stride, *config.strides)


def check_target(path: str | Path) -> None:
    """Raise OSError if a file cannot be written there, before the work starts."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: does the folder exist, and may you write there?")


def require_onnx(*more: str) -> None:
    """Raise ImportError, with its remedy, if what ONNX needs is not installed."""
    missing = [name for name in ("onnx", "onnxscript", *more) if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'ONNX export needs {", ".join(missing)}: pip install "dit_detection[onnx]"')


def _check_model(model: Any) -> None:
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "dit_detection":
        raise ValueError(f"Only a DiTForObjectDetection can be exported, not {type(model).__name__}.")
    if model.training:
        raise ValueError("The model is in training mode: call model.eval() before the export.")
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f'attn_implementation="{attention}" cannot be exported: call model.set_attn_implementation("sdpa").'
        )
    is_quantized = getattr(config, "quantization_config", None) is not None
    if is_quantized or not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise ValueError("Quantised weights cannot be exported: load the checkpoint without quantization_config.")


def _trace(
    detector: ExportableDetector, with_post_processing: bool = False, static_size: tuple[int, int] | None = None
) -> ExportedProgram:
    config, device = detector.model.config, detector.model.device
    if static_size is None:
        # Any sizes, but several tokens, and several cells on every feature map: torch.export takes a length of 1 for a
        # constant.
        side = coarsest_of(config)
        batch, height, width = 2, 2 * side, 3 * side
    else:
        batch, (height, width) = 1, static_size
    example = {
        "pixel_values": torch.zeros(batch, 3, height, width, device=device),
        "pixel_mask": torch.ones(batch, height, width, dtype=torch.int64, device=device),
    }
    if with_post_processing:
        example["target_sizes"] = torch.ones(batch, 2, dtype=torch.int64, device=device)
    dynamic_shapes = None
    if static_size is None:
        dynamic_shapes = {
            name: {axis: Dim.DYNAMIC for axis, size in enumerate(INPUT_AXES[name]) if isinstance(size, str)}
            for name in example
        }
    with torch.no_grad():
        return torch.export.export(detector, (), example, dynamic_shapes=dynamic_shapes, strict=False)


def _suppress_in_onnx(boxes: Any, scores: Any, iou_threshold: float, max_detections: int) -> Any:
    """The scores of what NMS keeps, `(B, C, K)`, 0 elsewhere."""
    from onnxscript import opset18

    op: Any = opset18  # its annotations know tensors of onnxscript alone

    kept = op.NonMaxSuppression(
        boxes,
        scores,
        op.Constant(value_ints=[max_detections]),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[0.0]),
    )  # (kept, 3): image, class, candidate
    return op.ScatterND(op.Mul(scores, op.Constant(value_float=0.0)), kept, op.GatherND(scores, kept))


def _name_axes(graph: Any) -> None:
    """Inputs and outputs of any size get axes with names, in the place of the tracer's expressions."""
    import onnx_ir

    for value in graph.inputs:
        value.shape = onnx_ir.Shape(INPUT_AXES[value.name])
    for value in graph.outputs:
        axes = ["batch", *value.shape[1:]]
        if value.name in ("logits", "pred_boxes"):
            axes[1] = "candidates"
        value.shape = onnx_ir.Shape(axes)
