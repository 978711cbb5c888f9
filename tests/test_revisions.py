"""A checkpoint on the Hub, of which an earlier version is wanted: in Python and of every command that reads one."""

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file

from dit_detection import DiTForObjectDetection
from dit_detection.adapters import load_detector
from dit_detection.commands import check, convert, demo, evaluate, export, predict, pretrain, serve, train
from dit_detection.commands.starting_model import load_starting_model
from dit_detection.commands.train_options import parse_options
from dit_detection.data import draw_shapes_dataset
from dit_detection.data.shapes import SHAPES
from dit_detection.model.load_dit import default_timestep
from dit_detection.pretraining.new_dit import new_scheduler
from dit_detection.pretraining.pipeline_folder import load_pipeline, save_pipeline
from dit_detection.sharing.push import push_folder
from dit_detection.small_dit import SIZES, size_of

DIT, DETECTOR = "someone/dit", "someone/detector"
NAMES = list(SHAPES)


@pytest.fixture
def dit(hub, tmp_path):
    """Two versions of a DiT on the Hub: "v1" of flow matching, with no class of its own; the latest of noise."""
    for version, objective in ((1, "flow"), (2, "epsilon")):
        torch.manual_seed(version)
        size = SIZES["tiny"] | {"num_layers": 4 if version == 1 else 3}
        transformer = DiTTransformer2DModel(in_channels=3, sample_size=64, num_embeds_ada_norm=1, **size)
        save_pipeline(tmp_path / f"dit{version}", transformer, new_scheduler(objective, on_pixels=True), None)
        HfApi().create_repo(DIT, exist_ok=True)
        HfApi().upload_folder(folder_path=tmp_path / f"dit{version}", repo_id=DIT)
        if version == 1:
            HfApi().create_tag(DIT, tag="v1")
    return load_file(tmp_path / "dit1" / "transformer" / "diffusion_pytorch_model.safetensors")[
        "pos_embed.proj.weight"
    ]


@pytest.fixture
def detector(hub, tiny_model, tmp_path):
    """Two versions of a detector on the Hub, of other classes and canvases: "v1" and the latest."""
    from dit_detection import DiTDetectionImageProcessor

    for version, names in ((1, NAMES), (2, ["x", "y", "z"])):
        labels = dict(enumerate(names))
        folder = tmp_path / f"detector{version}"
        label2id = {name: label for label, name in labels.items()}
        tiny_model(num_labels=len(names), id2label=labels, label2id=label2id).save_pretrained(folder)
        DiTDetectionImageProcessor(size=32 + 32 * version).save_pretrained(folder)
        push_folder(folder, DETECTOR, git_tag=f"v{version}")
    return DETECTOR


def patch_of(model):
    return model.model.backbone.patch_embedding.projection.weight.detach()


def test_a_dit_of_an_earlier_version(dit):
    first = DiTForObjectDetection.from_diffusers(DIT, revision="v1")
    assert torch.equal(patch_of(first), dit) and first.config.timestep == 200  # its scheduler is of that version, too
    assert first.config.base_model == DIT
    latest = DiTForObjectDetection.from_diffusers(DIT)
    assert not torch.equal(patch_of(latest), dit) and latest.config.timestep == 50
    assert (size_of(DIT, revision="v1"), size_of(DIT)) == ("tiny", None)
    assert default_timestep(DIT, revision="v1") == 200
    transformer, scheduler, _ = load_pipeline(DIT, None, "v1")
    assert torch.equal(transformer.pos_embed.proj.weight, dit) and type(scheduler).__name__.startswith("FlowMatch")
    with pytest.raises(ValueError, match="v9"):
        DiTForObjectDetection.from_diffusers(DIT, revision="v9")


def test_training_and_conversion_begin_with_an_earlier_version(dit, tmp_path):
    convert.main([DIT, str(tmp_path / "converted"), "--revision", "v1"])
    assert torch.equal(patch_of(DiTForObjectDetection.from_pretrained(tmp_path / "converted")), dit)
    argv = ["--model", DIT, "--model_revision", "v1", "--output_dir", str(tmp_path / "out"), "--image_size", "64"]
    model_args, _, args = parse_options(argv)
    assert model_args.freeze_layers == 2  # half of that version's four blocks
    model, _ = load_starting_model(model_args, draw_shapes_dataset(4, 2, 2, image_size=64), args, {})
    assert torch.equal(patch_of(model), dit)


def test_training_goes_on_from_an_earlier_detector(detector, tmp_path):
    argv = ["--model", detector, "--model_revision", "v1", "--output_dir", str(tmp_path / "out")]
    model_args, _, args = parse_options(argv)
    shapes = draw_shapes_dataset(4, 2, 2, image_size=64)
    model, image_processor = load_starting_model(model_args, shapes, args, {})
    first = load_detector(detector, revision="v1")
    assert torch.equal(patch_of(model), patch_of(first)) and image_processor.size.max_height == 64
    model_args.model_revision = None
    assert load_starting_model(model_args, shapes, args, {})[1].size.max_height == 96


def test_an_adapter_keeps_the_version_that_it_was_made_for(hub, tiny_model, tmp_path):
    from dit_detection import DiTDetectionImageProcessor

    names = dict(enumerate(NAMES))
    for version in (1, 2):
        model = tiny_model(num_labels=len(names), id2label=names, label2id={name: i for i, name in names.items()})
        with torch.no_grad():
            model.model.backbone.patch_embedding.projection.weight.fill_(version)
        model.save_pretrained(tmp_path / f"{version}")
        DiTDetectionImageProcessor(size=64).save_pretrained(tmp_path / f"{version}")
        push_folder(tmp_path / f"{version}", DETECTOR, git_tag=f"v{version}")
    argv = ["--model", DETECTOR, "--model_revision", "v1", "--output_dir", str(tmp_path / "out"), "--lora_r", "2"]
    model_args, _, args = parse_options([*argv, "--freeze_layers", "0"])
    adapter, _ = load_starting_model(model_args, draw_shapes_dataset(4, 2, 2, image_size=64), args, {})
    adapter.save_pretrained(tmp_path / "out")
    assert patch_of(load_detector(tmp_path / "out")).unique().tolist() == [1.0]


@pytest.mark.slow
def test_commands_read_an_earlier_detector(detector, tmp_path, capsys):
    model, image_processor = serve.load(detector, "v1")
    assert model.config.id2label[0] == NAMES[0] and image_processor.size.max_height == 64

    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    out = tmp_path / "out"
    predict.main(
        [detector, str(tmp_path / "red.png"), "--revision", "v1", "--output_dir", str(out), "--threshold", "0"]
    )
    (found,) = json.loads((out / "predictions.json").read_text())
    assert {detection["label"] for detection in found["detections"]} <= set(NAMES)
    assert found["detections"]

    draw_shapes_dataset(2, 2, 2, image_size=64).save_to_disk(tmp_path / "shapes")
    metrics = evaluate.main([detector, "--revision", "v1", "--dataset", str(tmp_path / "shapes")])
    assert f"test_map_{NAMES[0]}" in metrics
    report = check.main([str(tmp_path / "shapes"), "--model", detector, "--model_revision", "v1", "--fast"])
    assert report["canvas"] == [64, 64]

    export.main([detector, str(tmp_path / "v1.pt2"), "--revision", "v1", "--static_size", "32", "32"])
    assert "largest difference" in capsys.readouterr().out
    with pytest.raises(OSError, match="v9"):
        serve.load(detector, "v9")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (predict, ["{folder}", "{folder}", "--revision", "v1"]),
        (evaluate, ["{folder}", "--dataset", "nowhere", "--revision", "v1"]),
        (export, ["{folder}", "file.onnx", "--revision", "v1"]),
        (serve, ["{folder}", "--revision", "v1"]),
        (convert, ["{folder}", "out", "--revision", "v1"]),
        (train, ["--model", "{folder}", "--model_revision", "v1", "--dataset", "{shapes}"]),
        (pretrain, ["--model", "{folder}", "--model_revision", "v1", "--images", "{shapes}"]),
        (check, ["{shapes}", "--model", "{folder}", "--model_revision", "v1"]),
        (demo, ["{folder}", "--space", "space", "--revision", "v1"]),
    ],
)
def test_a_folder_has_no_revisions(saved_detector, tmp_path, monkeypatch, capsys, command, arguments):
    monkeypatch.chdir(tmp_path)
    draw_shapes_dataset(2, 2, 2, image_size=64).save_to_disk(tmp_path / "shapes")
    Image.new("RGB", (48, 32)).save(tmp_path / "image.png")
    arguments = [argument.format(folder=saved_detector, shapes=tmp_path / "shapes") for argument in arguments]
    if command is predict:
        arguments[1] = str(tmp_path / "image.png")
    with pytest.raises((ValueError, SystemExit)) as caught:
        command.main(arguments)
    assert f"revision='v1' is of a repository on the Hub, and {saved_detector} is none" in (
        capsys.readouterr().err + str(caught.value)
    )


@pytest.mark.parametrize(
    ("command", "arguments"),
    [(train, []), (pretrain, []), (check, ["shapes"]), (check, ["s", "--random_dit", "tiny"])],
)
def test_a_revision_is_of_the_model_that_is_named(command, arguments, capsys):
    with pytest.raises(SystemExit):
        command.main([*arguments, "--model_revision", "v1"])
    assert "--model_revision v1 is of --model, which is not given" in capsys.readouterr().err


def test_objects_have_no_revisions():
    dit = DiTTransformer2DModel(in_channels=3, sample_size=64, num_embeds_ada_norm=1, **SIZES["tiny"])
    with pytest.raises(ValueError, match="DiTTransformer2DModel is none"):
        DiTForObjectDetection.from_diffusers(dit, revision="v1")
