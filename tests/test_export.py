"""torch.export, ONNX and torch.compile against the model itself; ONNX runs in onnxruntime."""

import functools
import importlib.util
import json
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForObjectDetection

from dit_detection import DiTDetectionImageProcessor
from dit_detection.commands import export
from dit_detection.export import export_onnx, export_torch

# The pretraining grid is 64 x 64 pixels: below, at and above it, square and not, whole tokens and not.
SIZES = [(1, 64, 64), (3, 40, 96), (2, 130, 47), (1, 160, 224)]
# As few operators as show every way of the sizes through the model; tracing takes time per operator.
SMALL = {"num_hidden_layers": 1, "strides": [8, 16, 32], "head_channels": [], "max_candidates": 150}
SMALLEST = {**SMALL, "strides": [8, 16]}


@pytest.fixture(scope="module")
def autoencoders():
    """diffusers configs of small autoencoders that shrink by 2."""
    kl = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    return {
        name: {**json.loads(autoencoder.to_json_string()), "_class_name": type(autoencoder).__name__}
        for name, autoencoder in {"kl": kl, "tiny": tiny}.items()
    }


def variant(name, autoencoders):
    """Overrides of the tiny config."""
    if name in autoencoders:
        return {**SMALL, "latent_encoder": autoencoders[name], "in_channels": 4, "patch_size": 8}
    return SMALL | ({"neck_channels": None, "strides": [16]} if name == "single_scale" else {})


SLOW = pytest.mark.slow
# The large autoencoder takes a minute each time, and the tiny one is exported in the same way.
VARIANTS = [
    pytest.param("pixels", marks=SLOW),
    pytest.param("single_scale", marks=SLOW),
    pytest.param("tiny", marks=SLOW),
    pytest.param("kl", marks=pytest.mark.long),
]


def random_inputs(batch, height, width):
    """Each image fills another part of the canvas."""
    generator = torch.Generator().manual_seed(height)
    mask = torch.zeros(batch, height, width, dtype=torch.int64)
    for index in range(batch):
        mask[index, : height - height * index // 4, : width - width * index // 3] = 1
    return {"pixel_values": torch.rand(batch, 3, height, width, generator=generator) * 2 - 1, "pixel_mask": mask}


def assert_close(outputs, expected, atol=1e-4):
    """Candidates may lie in another order where they tie."""
    for image in zip(expected.logits, expected.pred_boxes, outputs["logits"], outputs["pred_boxes"], strict=True):
        assert export.candidates_difference(*image) <= atol


def onnx_runner(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(**inputs):
        outputs = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return dict(zip(names, map(torch.from_numpy, outputs), strict=True))

    return run


# The command, and one ONNX file for all tests that read one


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    model = tiny_model(**SMALLEST, id2label={0: "cat", 1: "dog", 2: "owl"})
    model.save_pretrained(folder)
    DiTDetectionImageProcessor(size=64, nms_threshold=0.5, max_detections=20).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def onnx_file(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "detector.onnx"
    export.main([str(checkpoint), str(path), "--post_processing"])
    return path


@pytest.mark.slow
def test_onnx_equals_the_model_at_every_size(checkpoint, onnx_file):
    model = AutoModelForObjectDetection.from_pretrained(checkpoint)
    image_processor = DiTDetectionImageProcessor.from_pretrained(checkpoint)
    run = onnx_runner(onnx_file)
    for size in [*SIZES, (2, 9, 20)]:
        inputs = random_inputs(*size)
        sizes = torch.tensor([[480, 640], [33, 71], [100, 50]])[: size[0]]
        outputs = run(**inputs, target_sizes=sizes)
        with torch.no_grad():
            assert_close(outputs, model(**inputs))
        raw = SimpleNamespace(**outputs)
        for index, expected in enumerate(
            image_processor.post_process_object_detection(raw, threshold=0.3, target_sizes=sizes)
        ):
            found = outputs["scores"][index] > 0.3
            torch.testing.assert_close(outputs["scores"][index][found], expected["scores"])
            assert torch.equal(outputs["labels"][index][found], expected["labels"])
            torch.testing.assert_close(outputs["boxes"][index][found], expected["boxes"])


@pytest.mark.slow
def test_onnx_tells_how_it_is_used(checkpoint, onnx_file):
    session = onnxruntime.InferenceSession(str(onnx_file))
    metadata = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata["id2label"] == {"0": "cat", "1": "dog", "2": "owl"}
    processor = metadata["image_processor"]
    assert processor["size"] == {"max_height": 64, "max_width": 64}
    assert processor["image_mean"] == processor["image_std"] == [0.5, 0.5, 0.5]
    assert processor["nms_threshold"] == 0.5 and processor["max_detections"] == 20
    assert [value.shape for value in session.get_inputs()] == [
        ["batch", 3, "height", "width"],
        ["batch", "height", "width"],
        ["batch", 2],
    ]
    assert [value.shape for value in session.get_outputs()] == [
        ["batch", "candidates", 3],
        ["batch", "candidates", 4],
        ["batch", 20],
        ["batch", 20],
        ["batch", 20, 4],
    ]


@pytest.mark.slow
def test_post_processing_equals_that_of_the_image_processor(onnx_file, tmp_path):
    """The second half of the graph alone, on outputs that a detector seldom has."""
    half = tmp_path / "half.onnx"
    # The numbers of images and of candidates are read off the pixels' shape.
    inputs = ["logits", "pred_boxes", "target_sizes", "pixel_values", "pixel_mask"]
    onnx.utils.extract_model(onnx_file, half, inputs, ["scores", "labels", "boxes"], infer_shapes=False)
    run = functools.partial(onnx_runner(half), **random_inputs(2, 64, 64))
    image_processor = DiTDetectionImageProcessor(nms_threshold=0.5, max_detections=20)
    generator = torch.Generator().manual_seed(0)
    crowded = torch.cat([torch.rand(2, 150, 2, generator=generator) * 0.3 + 0.3, torch.full((2, 150, 2), 0.4)], dim=2)
    spread = torch.rand(2, 150, 4, generator=generator)
    logits = torch.randn(2, 150, 3, generator=generator) * 2
    ties = logits.round()
    padding = torch.full_like(logits, torch.finfo(torch.float32).min)
    one_left = padding.clone()
    one_left[1, 7, 2] = 0.5
    same = spread[:, :1].expand(-1, 150, -1).contiguous()
    degenerate = spread * torch.tensor([1.0, 1.0, 0.0, 1.0])
    target_sizes = torch.tensor([[480, 640], [1, 1]])
    most = 0
    for case_logits in (logits, ties, padding, one_left, logits - 8):
        for case_boxes in (crowded, spread, same, degenerate):
            outputs = run(logits=case_logits, pred_boxes=case_boxes, target_sizes=target_sizes)
            raw = SimpleNamespace(logits=case_logits, pred_boxes=case_boxes)
            for threshold in (0.0, 0.6):
                results = image_processor.post_process_object_detection(raw, threshold, target_sizes)
                for index, expected in enumerate(results):
                    found = {name: values[index] for name, values in outputs.items()}
                    above = found["scores"] > threshold
                    most = max(most, int(above.sum()))
                    torch.testing.assert_close(found["scores"][above], expected["scores"])
                    assert torch.equal(found["labels"][above], expected["labels"])
                    torch.testing.assert_close(found["boxes"][above], expected["boxes"])
                    empty = found["scores"] == 0
                    assert (found["labels"][empty] == -1).all() and (found["boxes"][empty] == 0).all()
    assert most == 20  # the cap was reached


@pytest.mark.slow
def test_the_command_writes_a_program_that_equals_the_model(checkpoint, tmp_path, capsys):
    export.main([str(checkpoint), str(tmp_path / "detector.pt2"), "--static_size", "40", "64"])
    assert "1 x 3 x 40 x 64: largest difference from the model" in capsys.readouterr().out
    inputs = random_inputs(1, 40, 64)
    outputs = torch.export.load(tmp_path / "detector.pt2").module()(**inputs)
    with torch.no_grad():
        assert_close(outputs, AutoModelForObjectDetection.from_pretrained(checkpoint)(**inputs))


@pytest.mark.slow
def test_the_command_fails_on_a_file_that_computes_something_else(tiny_model, onnx_file, tmp_path, monkeypatch):
    model = tiny_model(**SMALLEST)
    with torch.no_grad():
        model.head.box_predictor.bias[2] += 0.05
    model.save_pretrained(tmp_path)
    DiTDetectionImageProcessor(size=64, nms_threshold=0.5, max_detections=20).save_pretrained(tmp_path)
    target = tmp_path / "detector.onnx"
    monkeypatch.setattr(export, "export_onnx", lambda *_, **__: target.write_bytes(onnx_file.read_bytes()))
    with pytest.raises(SystemExit, match="computed something else than the model"):
        export.main([str(tmp_path), str(target)])


@pytest.mark.slow
def test_what_cannot_be_run_is_deleted_and_what_is_others_stays(checkpoint, tmp_path, monkeypatch):
    target, others = tmp_path / "detector.onnx", tmp_path / "detector.onnx.data"
    others.write_text("of an earlier export")
    monkeypatch.setattr(export, "export_onnx", lambda *_, **__: target.write_bytes(b"no ONNX"))
    with pytest.raises(SystemExit, match=r"detector.onnx cannot be run \(.*\), and is deleted"):
        export.main([str(checkpoint), str(target)])
    assert list(tmp_path.iterdir()) == [others]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_feature_maps_that_are_all_finer_than_the_tokens(tiny_model, tmp_path, suffix, capsys):
    model = tiny_model(**{**SMALL, "strides": [4, 8]})
    model.save_pretrained(tmp_path / "fine")
    DiTDetectionImageProcessor(size=64).save_pretrained(tmp_path / "fine")
    export.main([str(tmp_path / "fine"), str(tmp_path / f"detector.{suffix}")])  # compares at two sizes
    assert capsys.readouterr().out.count("largest difference from the model") == 2


def test_candidates_difference_sees_every_fault():
    torch.manual_seed(0)
    logits, boxes = torch.randn(50, 3), torch.rand(50, 4)
    logits[40:] = torch.finfo(torch.float32).min
    order = torch.randperm(50)
    assert export.candidates_difference(logits, boxes, logits[order], boxes[order]) == 0
    best = logits.amax(dim=1).argmax()
    moved = boxes.clone()
    moved[best] += 0.01
    assert export.candidates_difference(logits, boxes, logits, moved) == pytest.approx(0.01, rel=1e-3)
    missing, broken = logits.clone(), boxes.clone()
    missing[best] = torch.finfo(torch.float32).min
    broken[best] = float("nan")
    assert export.candidates_difference(logits, boxes, missing, boxes) == float("inf")
    assert export.candidates_difference(logits, boxes, logits, broken) == float("inf")
    assert export.candidates_difference(logits, boxes, logits[1:], boxes[1:]) == float("inf")


# What cannot be exported


def test_refuses_what_cannot_be_exported(tiny_model, tmp_path):
    target = tmp_path / "detector.onnx"
    model = tiny_model()
    quantised = tiny_model()
    quantised.config.quantization_config = {"quant_method": "bitsandbytes"}
    for broken, message in (
        (tiny_model().train(), r"model.eval\(\)"),
        (tiny_model(attn_implementation="flex_attention"), r'set_attn_implementation\("sdpa"\)'),
        (quantised, "Quantised weights"),
        (torch.nn.Linear(1, 1), "DiTForObjectDetection can be exported, not Linear"),
    ):
        with pytest.raises(ValueError, match=message):
            export_onnx(broken, target)
        with pytest.raises(ValueError, match=message):
            export_torch(broken, tmp_path / "detector.pt2")
    with pytest.raises(ValueError, match="needs image_processor"):
        export_onnx(model, target, with_post_processing=True)
    with pytest.raises(PermissionError, match="does the folder exist"):
        export_onnx(model, tmp_path / "nowhere" / "detector.onnx")
    with pytest.raises(IsADirectoryError):
        export_torch(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", [10, 17])
def test_an_old_opset_is_refused(tiny_model, tmp_path, opset):
    with pytest.raises(ValueError, match=f"opset={opset}: torch's exporter writes 18 or later"):
        export_onnx(tiny_model(**SMALLEST), tmp_path / "detector.onnx", opset=opset)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["detector.txt"], "must end in .onnx or .pt2"),
        (["detector.pt2", "--post_processing"], "are for .onnx"),
        (["detector.pt2", "--opset", "20"], "are for .onnx"),
        (["detector.onnx", "--static_size", "0", "64"], "at least 1 pixel"),
        (["nowhere/detector.onnx"], "does the folder exist"),
    ],
)
def test_the_command_refuses_before_it_loads(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        export.main(["no-such-checkpoint", *arguments])
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_missing_packages_are_named_with_their_remedy(tiny_model, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    with pytest.raises(SystemExit, match=r'needs onnxruntime: pip install "dit_detection\[onnx\]"'):
        export.main(["no-such-checkpoint", str(tmp_path / "detector.onnx")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs onnx, onnxscript"):
        export_onnx(tiny_model(), tmp_path / "detector.onnx")


# Every kind of model, in every way


@pytest.mark.parametrize("name", VARIANTS)
def test_programs_equal_the_model_at_every_size(tiny_model, autoencoders, tmp_path, name):
    model = tiny_model(**variant(name, autoencoders))
    export_torch(model, tmp_path / "detector.pt2")
    program = torch.export.load(tmp_path / "detector.pt2").module()
    with torch.no_grad():
        for size in SIZES:
            inputs = random_inputs(*size)
            assert_close(program(**inputs), model(**inputs))


@pytest.mark.parametrize("name", VARIANTS[1:])
def test_onnx_of_every_kind_of_model(tiny_model, autoencoders, tmp_path, name):
    model = tiny_model(**variant(name, autoencoders))
    export_onnx(model, tmp_path / "detector.onnx")
    run = onnx_runner(tmp_path / "detector.onnx")
    with torch.no_grad():
        for size in SIZES:
            inputs = random_inputs(*size)
            assert_close(run(**inputs), model(**inputs))


@pytest.mark.slow
def test_half_precision_static_size_opset_and_external_data(tiny_model, tmp_path):
    model = tiny_model(**SMALL).to(torch.bfloat16)
    path = tmp_path / "detector.onnx"
    export_onnx(model, path, static_size=(40, 64), opset=18, external_data=True)
    assert model.dtype == torch.bfloat16
    assert (tmp_path / "detector.onnx.data").stat().st_size > path.stat().st_size / 2
    written = onnx.load(path, load_external_data=False)
    assert written.opset_import[0].version == 18
    assert any(weight.data_location == onnx.TensorProto.EXTERNAL for weight in written.graph.initializer)
    inputs = random_inputs(1, 40, 64)
    with torch.no_grad():
        assert_close(onnx_runner(path)(**inputs), model.float()(**inputs))


# torch.compile


@pytest.fixture
def compiled():
    """Compiles a model without graph breaks and counts its graphs."""

    def make(model, backend):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        return torch.compile(model, fullgraph=True, dynamic=True, backend=counter), counter

    yield make
    torch._dynamo.reset()


SIZES_TO_COMPILE = [(2, 64, 96), (3, 64, 48), (2, 130, 47), (4, 160, 224), (1, 64, 64), (1, 33, 128)]


def assert_same_when_compiled(model, compiled, sizes):
    with torch.no_grad():
        for size in sizes:
            inputs = random_inputs(*size)
            assert_close(compiled(**inputs), model(**inputs))


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_whole_and_not_anew_for_each_size(tiny_model, autoencoders, compiled, name):
    model = tiny_model(**variant(name, autoencoders))
    compiled_model, counter = compiled(model, "eager")
    assert_same_when_compiled(model, compiled_model, SIZES_TO_COMPILE)
    # torch takes a length of 1 for a constant: batches of one image have a graph of their own, and so would an image
    # with a single cell on its coarsest map.
    assert counter.frame_count <= 3


@pytest.mark.long
def test_inductor_equals_the_model(tiny_model, autoencoders, compiled):
    model = tiny_model(**variant("tiny", autoencoders))
    assert_same_when_compiled(model, compiled(model, "inductor")[0], SIZES_TO_COMPILE[1:3])
