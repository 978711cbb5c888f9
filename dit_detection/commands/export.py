"""A detector → a file that runs without this package: ONNX (.onnx) or a `torch.export` program (.pt2)."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..adapters import load_detector, load_image_processor
from ..export import check_target, coarsest_of, export_onnx, export_torch, require_onnx
from .shared_options import add_checkpoint

# Largest difference from the model itself that still passes, in logits and in shares of the image. Rounding in float32
# stays below 1e-4, even through a deep backbone; a wrong operator is off by far more.
TOLERANCE = 1e-3
# Near ties go one way here and the other way there, and may then decide which box survives NMS.
ALLOWED_OTHER_DETECTIONS = 0.01


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job: writes the file, and compares what it computes with the model."""
    parser = argparse.ArgumentParser(prog="dit-detect export", description=__doc__)
    add_checkpoint(parser)
    parser.add_argument("output", help="file to write; its suffix, .onnx or .pt2, chooses the format")
    parser.add_argument("--post_processing", action="store_true", help="NMS in the file (ONNX only)")
    parser.add_argument(
        "--static_size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="fix the input to one image of this size; by default any batch and any size will do",
    )
    parser.add_argument("--opset", type=int, help="ONNX opset; default: that of torch's exporter")
    args = parser.parse_args(argv)

    output = Path(args.output)
    if output.suffix not in (".onnx", ".pt2"):
        parser.error(f"{output} must end in .onnx or .pt2: the suffix chooses the format.")
    if output.suffix == ".pt2" and (args.post_processing or args.opset):
        parser.error("--post_processing and --opset are for .onnx; beside a .pt2 runs the image processor.")
    static_size = tuple(args.static_size) if args.static_size else None
    if static_size and min(static_size) < 1:
        parser.error(f"--static_size {static_size[0]} {static_size[1]}: both sides must be at least 1 pixel.")
    data = output.with_name(f"{output.name}.data")  # of weights above 2 GB; or what an earlier export left there
    before = _stamp(data)
    try:
        check_target(output)
        if output.suffix == ".onnx":
            require_onnx("onnxruntime")
        # Flash and flex attention have no exportable operators, and half precision no kernels in onnxruntime.
        options: dict[str, Any] = {"attn_implementation": "sdpa", "dtype": torch.float32}
        model = load_detector(args.checkpoint, revision=args.revision, **options).eval()
        image_processor = load_image_processor(args.checkpoint, revision=args.revision)
        if output.suffix == ".pt2":
            export_torch(model, output, static_size=static_size)
        else:
            export_onnx(
                model,
                output,
                image_processor=image_processor,
                with_post_processing=args.post_processing,
                static_size=static_size,
                opset=args.opset,
            )
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"dit-detect export: {error}")

    files = [output] if _stamp(data) == before else [output, data]
    side = coarsest_of(model.config)
    # Two batches: of whole tokens, and of a size that has to be padded.
    shapes = [(1, *static_size)] if static_size else [(1, 2 * side, 3 * side), (2, 3 * side + 5, 2 * side - 3)]
    fault = ""
    try:
        run = load_torch(output) if output.suffix == ".pt2" else load_onnx(output)
        for batch, height, width in shapes:
            difference = compare(model, image_processor, run, batch, height, width)
            print(f"{batch} x 3 x {height} x {width}: largest difference from the model {difference:.1e}")
            if not difference <= TOLERANCE:  # NaN fails too
                fault = f"computed something else than the model (more than {TOLERANCE:g} apart)"
    except Exception as error:  # whatever onnxruntime and torch raise of a program that they cannot run
        fault = f"cannot be run ({type(error).__name__}: {error})"
    if fault:
        for path in files:
            path.unlink(missing_ok=True)
        sys.exit(
            f"dit-detect export: {output} {fault}, and is deleted. Other versions of torch, onnxscript and "
            "onnxruntime may do better; please report the case."
        )
    print(f"{output}: {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")


def _stamp(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def load_torch(path: Path) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A function that runs the program; prints its inputs."""
    program = torch.export.load(path)
    print("inputs:  pixel_values (batch, 3, height, width) float32, pixel_mask (batch, height, width) int64")
    print("outputs: a dict of logits (batch, candidates, labels) and pred_boxes (batch, candidates, 4), float32")
    module = program.module()
    return lambda inputs: module(pixel_values=inputs["pixel_values"], pixel_mask=inputs["pixel_mask"])


def load_onnx(path: Path) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A function that runs the file in onnxruntime on the CPU; prints its inputs and outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for kind, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for value in values:
            print(f"{kind:>6}  {value.name:<12} {value.type:<14} ({', '.join(map(str, value.shape))})")
    inputs_of_file = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = session.run(names, {name: inputs[name].numpy() for name in inputs_of_file})
        return {name: torch.from_numpy(values) for name, values in zip(names, outputs, strict=True)}

    return run


@torch.no_grad()
def compare(model: Any, image_processor: Any, run: Callable, batch: int, height: int, width: int) -> float:
    """Largest difference between a model and its file on random images, half of them padding at the bottom."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "pixel_values": torch.rand(batch, 3, height, width, generator=generator) * 2 - 1,
        "pixel_mask": (torch.arange(height) < -(-height // 2))[None, :, None].expand(batch, -1, width).long(),
        "target_sizes": torch.tensor([[1, 1]]).expand(batch, 2),
    }
    expected = model(pixel_values=inputs["pixel_values"], pixel_mask=inputs["pixel_mask"])
    outputs = run(inputs)
    difference = max(
        candidates_difference(*image)
        for image in zip(expected.logits, expected.pred_boxes, outputs["logits"], outputs["pred_boxes"], strict=True)
    )
    if "scores" in outputs:
        # On the file's own candidates: the post-processing alone.
        raw = SimpleNamespace(logits=outputs["logits"], pred_boxes=outputs["pred_boxes"])
        results = image_processor.post_process_object_detection(raw, threshold=0.0)
        for index, result in enumerate(results):
            found = {name: outputs[name][index] for name in ("scores", "labels", "boxes")}
            difference = max(difference, detections_difference(result, found))
    return difference


def candidates_difference(logits: Tensor, boxes: Tensor, other_logits: Tensor, other_boxes: Tensor) -> float:
    """Largest difference of two sets of candidates in any order; near ties come in another order elsewhere."""
    if logits.shape != other_logits.shape or boxes.shape != other_boxes.shape:
        return float("inf")
    padding = torch.finfo(logits.dtype).min
    sets = []
    for values, corners in ((logits, boxes), (other_logits, other_boxes)):
        rows = torch.cat([values, corners], dim=1)
        sets.append(rows[values.amax(dim=1) > padding])
    if len(sets[0]) != len(sets[1]) or not all(rows.isfinite().all() for rows in sets):
        return float("inf")
    if not len(sets[0]):
        return 0.0
    distances = torch.cdist(sets[0], sets[1], p=float("inf"))
    # The last of the best candidates may be another one: those within rounding of the cut need no partner.
    furthest = 0.0
    for rows, nearest in zip(sets, (distances.amin(dim=1), distances.amin(dim=0)), strict=True):
        scores = rows[:, : logits.shape[1]].amax(dim=1)
        furthest = max([furthest, *nearest[scores > scores.min() + TOLERANCE].tolist()])
    return furthest


def detections_difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """Largest difference of one image's detections, but for the few that near ties decide."""
    count = int((found["scores"] > 0).sum())
    if count != len(expected["scores"]):
        return float("inf")
    if count == 0:
        return 0.0
    sets = [
        torch.cat([one["scores"][:count, None], one["labels"][:count, None].float(), one["boxes"][:count]], dim=1)
        for one in (expected, found)
    ]
    nearest = torch.cdist(sets[0], sets[1], p=float("inf")).amin(dim=1).sort().values
    return nearest[: count - int(count * ALLOWED_OTHER_DETECTIONS)].max().item()
