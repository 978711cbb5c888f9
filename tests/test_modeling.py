import copy
import math

import numpy as np
import pytest
import torch
from tiny_inputs import assert_same_outputs, masks, pixels
from tiny_training import LATENTS
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForObjectDetection

from dit_detection import (
    DiTDetectionConfig,
    DiTDetectionImageProcessor,
    DiTDetectionModel,
    DiTForObjectDetection,
    DiTObjectDetectionOutput,
)
from dit_detection.model.anchors import make_anchors
from dit_detection.model.box_coder import BoxCoder
from dit_detection.model.labels import pad_labels

NUM_ANCHORS = 9 * (8 * 8 + 4 * 4 + 2 * 2)  # of 64 x 64 pixels


# the shape of a transformers model


def test_registered_with_the_auto_classes(tiny_config):
    config = tiny_config()
    assert type(AutoConfig.for_model("dit_detection")) is DiTDetectionConfig
    assert type(AutoModelForObjectDetection.from_config(config)) is DiTForObjectDetection
    assert type(AutoModel.from_config(config)) is DiTDetectionModel
    assert DiTForObjectDetection.config_class is DiTDetectionConfig
    names = {type(module).__name__ for module in AutoModelForObjectDetection.from_config(config).modules()}
    assert set(DiTForObjectDetection._no_split_modules) - names == {"LatentEncoder"}  # a DiT on pixels has none


def test_outputs_and_their_order(tiny_model, random_labels):
    model = tiny_model()
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    labels = [random_labels(3), random_labels(0)]
    outputs = model(pixels(), labels=labels)
    assert isinstance(outputs, DiTObjectDetectionOutput)
    # Trainer and the official scripts go by position.
    assert list(outputs)[:4] == ["loss", "loss_dict", "logits", "pred_boxes"]
    assert list(DiTObjectDetectionOutput.__dataclass_fields__)[:4] == ["loss", "loss_dict", "logits", "pred_boxes"]
    assert outputs.loss.shape == ()
    assert list(outputs.loss_dict) == ["loss_class", "loss_bbox"]
    assert outputs.logits.shape == (2, NUM_ANCHORS, 3)
    assert outputs.pred_boxes.shape == (2, NUM_ANCHORS, 4)
    assert outputs.last_hidden_state.shape == (2, 16, 32)
    assert outputs.hidden_states is None
    assert ((outputs.pred_boxes >= 0) & (outputs.pred_boxes <= 1)).all()
    without = model(pixels())
    assert list(without) == ["logits", "pred_boxes", "last_hidden_state"]
    assert_same_outputs(outputs, without)
    # As `pipeline` builds it anew.
    rebuilt = DiTObjectDetectionOutput({"target_size": torch.tensor([[1, 1]]), **without})
    assert torch.equal(rebuilt.logits, without.logits)


def test_loss_is_the_sum_of_its_parts_in_both_modes(tiny_model, random_labels):
    model = tiny_model()
    labels = [random_labels(3), random_labels(5, seed=1)]
    outputs = model(pixels(), labels=labels)
    torch.testing.assert_close(outputs.loss, sum(outputs.loss_dict.values()))
    torch.testing.assert_close(outputs.loss, outputs.loss_per_image.mean())
    for index in range(2):
        alone = model(pixels()[index : index + 1], labels=labels[index : index + 1])
        torch.testing.assert_close(alone.loss, outputs.loss_per_image[index], rtol=1e-5, atol=1e-6)
    trained = model.train()(pixels(), labels=labels)
    torch.testing.assert_close(trained.loss, sum(trained.loss_dict.values()))
    assert trained.loss_per_image is None
    assert not torch.equal(trained.loss, outputs.loss)  # per matched anchor of the batch, not of each image


def test_return_dict_false_by_argument_and_by_config(tiny_model):
    model = tiny_model()
    expected = model(pixels())
    results = [model(pixels(), return_dict=False)]
    model.config.return_dict = False
    results.append(model(pixels()))
    assert isinstance(model(pixels(), return_dict=True), DiTObjectDetectionOutput)
    for result in results:
        assert isinstance(result, tuple)
        assert torch.equal(result[0], expected.logits)
        assert torch.equal(result[1], expected.pred_boxes)


@pytest.mark.parametrize("how", ["argument", "config"])
def test_hidden_states_are_the_embedding_and_every_blocks_output(tiny_model, how):
    model = tiny_model(num_hidden_layers=3, attn_implementation="eager")
    flags = {"output_hidden_states": True, "output_attentions": True}
    if how == "config":
        for name, value in flags.items():
            setattr(model.config, name, value)
        flags = {}
    outputs = model(pixels(height=48), **flags)
    backbone = model.model.backbone
    expected = [backbone.patch_embedding(pixels(height=48))]
    for layer in backbone.layers:
        expected.append(layer(expected[-1]))
    assert len(outputs.hidden_states) == 4
    for ours, theirs in zip(outputs.hidden_states, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert len(outputs.attentions) == 3
    for weights in outputs.attentions:
        assert weights.shape == (2, 4, 12, 12)
        torch.testing.assert_close(weights.sum(dim=3), torch.ones(2, 4, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_is_sdpa(tiny_model, dtype):
    model = tiny_model(attn_implementation="eager").to(dtype)
    eager = model(pixels(width=96))
    model.set_attn_implementation("sdpa")
    assert model.model.backbone.layers[0].attention.config._attn_implementation == "sdpa"
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    sdpa = model(pixels(width=96))
    torch.testing.assert_close(sdpa.last_hidden_state, eager.last_hidden_state, rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:
        assert_same_outputs(sdpa, eager, rtol=1e-4, atol=1e-4)


def test_input_embeddings_and_deepcopy(tiny_model):
    model = tiny_model()
    assert model.get_input_embeddings() is model.model.backbone.patch_embedding
    assert model.model.get_input_embeddings() is model.model.backbone.patch_embedding
    expected = model(pixels())
    twin = copy.deepcopy(model)
    assert_same_outputs(twin(pixels()), expected)
    with torch.no_grad():
        twin.model.backbone.layers[0].scale1.weight.add_(1)
    assert_same_outputs(model(pixels()), expected)


# candidates, sizes, padding


def test_eval_keeps_the_best_candidates_and_training_all(tiny_model):
    model = tiny_model(max_candidates=10)
    outputs, everything = model(pixels()), model.train()(pixels())
    assert everything.logits.shape == (2, NUM_ANCHORS, 3)
    assert outputs.logits.shape == (2, 10, 3)
    for image in range(2):
        best = everything.logits[image].amax(dim=1).argsort(descending=True)[:10]
        assert torch.equal(outputs.logits[image], everything.logits[image, best])
        torch.testing.assert_close(outputs.pred_boxes[image], everything.pred_boxes[image, best])


@pytest.mark.parametrize(("height", "width"), [(64, 96), (50, 70), (33, 129), (16, 16), (7, 9)])
@pytest.mark.parametrize("overrides", [{}, LATENTS], ids=["pixels", "latents"])
def test_any_height_and_width(tiny_model, random_labels, height, width, overrides):
    model = tiny_model(**overrides).train()
    outputs = model(pixels(height=height, width=width), labels=[random_labels(2), random_labels(0)])
    tokens = math.ceil(height / 16) * math.ceil(width / 16)
    assert outputs.last_hidden_state.shape == (2, tokens, 32)
    outputs.loss.backward()
    assert torch.isfinite(outputs.loss)
    # What is missing to whole tokens is padding: the same image on a canvas of whole tokens gives the same.
    canvas = torch.zeros(2, 3, height + -height % 16, width + -width % 16)
    canvas[:, :, :height, :width] = pixels(height=height, width=width)
    mask = masks((height, width), (height, width), height=canvas.shape[2], width=canvas.shape[3])
    assert_same_outputs(model(canvas, pixel_mask=mask), outputs)


@pytest.mark.parametrize("overrides", [{}, {"max_candidates": 20}])
def test_padding_never_scores(tiny_model, overrides):
    model = tiny_model(**overrides)
    outputs = model(pixels(), pixel_mask=masks((64, 20), (13, 64)))
    scored = outputs.logits.sigmoid().amax(dim=2) > 0
    assert scored.any(dim=1).all()
    anchors = make_anchors([(8, 8), (4, 4), (2, 2)], [8, 16, 32], model.config.anchor_sizes, [0.5, 1.0, 2.0])
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    in_image = ((centers[:, 0] < 20).sum(), (centers[:, 1] < 13).sum())
    if overrides:
        assert scored.all()
    else:
        assert scored.sum(dim=1).tolist() == [int(count) for count in in_image]
    assert torch.isfinite(outputs.logits).all()
    # In training all anchors come, in their own order.
    outputs = model.train()(pixels(), pixel_mask=masks((64, 20), (13, 64)))
    scored = outputs.logits.sigmoid().amax(dim=2) > 0
    assert torch.equal(scored[0], centers[:, 0] < 20)
    assert torch.equal(scored[1], centers[:, 1] < 13)


@pytest.mark.parametrize("matcher", ["atss", "max_iou"])
def test_an_image_thinner_than_a_cell_is_learnt_and_detected(tiny_model, random_labels, matcher):
    model = tiny_model(matcher=matcher).train()
    mask, labels = masks((64, 64), (2, 64)), [random_labels(1), random_labels(1)]
    outputs = model(pixels(), pixel_mask=mask, labels=labels)
    assert torch.isfinite(outputs.loss)
    # The first row of the finest cells, 8 of them with 9 anchors each, and nothing else.
    assert ((outputs.logits[1].sigmoid() > 0).any(dim=1).nonzero() < 8 * 9).all()
    assert (outputs.logits[1].sigmoid() > 0).any(dim=1).sum() == 8 * 9
    matched = model.match_anchors(pad_labels(labels, 3), pixels(), mask)
    assert (matched >= 0).any(dim=1).all()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"labels": 2}, "labels of 2 images, but 1 images"),
        ({"pixel_mask": torch.ones(2, 64, 64)}, "pixel_masks of 2 images, but 1 images"),
        ({"pixel_mask": torch.ones(1, 32, 32)}, r"pixel_mask is 32 x 32, but the images' canvas 64 x 64"),
    ],
)
def test_what_belongs_to_other_images_is_refused(tiny_model, random_labels, inputs, message):
    if "labels" in inputs:
        inputs = {"labels": [random_labels(1, size=torch.tensor([64, 64]))] * inputs["labels"]}
    with pytest.raises(ValueError, match=message):
        tiny_model()(pixels(1), **inputs)


@pytest.mark.parametrize("box", [[320.0, 240.0, 64.0, 48.0], [0.5, float("nan"), 0.1, 0.1]])
def test_boxes_in_pixels_are_refused(tiny_model, random_labels, box):
    labels = [random_labels(1), random_labels(2)]
    labels[1]["boxes"][1] = torch.tensor(box)
    with pytest.raises(ValueError, match=r"labels\[1\]\['boxes'\] has .* divided by the width"):
        tiny_model()(pixels(), labels=labels)


def test_a_padded_batch_gives_each_image_its_own_result(tiny_model, random_labels):
    model = tiny_model(**LATENTS)
    sizes, labels = [(64, 40), (24, 64), (64, 64)], [random_labels(2), random_labels(0), random_labels(7)]
    images, mask = pixels(3), masks(*sizes)
    images = images * mask[:, None]
    together = model(images, pixel_mask=mask, labels=labels)
    for index in range(3):
        here = slice(index, index + 1)
        alone = model(images[here], pixel_mask=mask[here], labels=labels[here])
        torch.testing.assert_close(together.logits[here], alone.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.pred_boxes[here], alone.pred_boxes, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.loss_per_image[index], alone.loss, rtol=1e-5, atol=1e-5)


def test_sizes_come_from_the_mask_or_the_labels_or_the_canvas(tiny_model, random_labels):
    model = tiny_model()
    sizes = [(64, 40), (24, 64)]
    sized = [random_labels(3, size=torch.tensor(sizes[0])), random_labels(2, seed=1, size=torch.tensor(sizes[1]))]
    plain = [{key: image_labels[key] for key in ("boxes", "class_labels")} for image_labels in sized]
    by_mask = model(pixels(), pixel_mask=masks(*sizes), labels=plain)
    by_labels = model(pixels(), labels=sized)
    wrong = [{**image_labels, "size": torch.tensor([9, 9])} for image_labels in plain]
    by_both = model(pixels(), pixel_mask=masks(*sizes), labels=wrong)
    by_canvas, by_full_mask = model(pixels(), labels=plain), model(pixels(), pixel_mask=masks(*[(64, 64)] * 2))
    assert_same_outputs(by_mask, by_labels)
    assert torch.equal(by_mask.loss, by_labels.loss)
    assert torch.equal(by_mask.loss, by_both.loss)  # the mask counts first
    assert_same_outputs(by_canvas, by_full_mask)
    assert not torch.equal(by_mask.pred_boxes, by_canvas.pred_boxes)


@pytest.mark.parametrize("overrides", [{}, {"box_loss": "smooth_l1"}, {"matcher": "max_iou"}])
def test_a_perfect_head_gives_the_annotated_boxes_back(tiny_model, monkeypatch, overrides):
    # Four shapes of image on one canvas, from pixels to pixels: within 1 pixel of the annotation.
    model, processor = tiny_model(**overrides), DiTDetectionImageProcessor(size=64)
    rng = np.random.default_rng(0)
    shapes = [(480, 640), (640, 200), (100, 777), (64, 64)]
    images = [rng.integers(0, 255, (*shape, 3), dtype=np.uint8) for shape in shapes]
    annotations = []
    for index, (height, width) in enumerate(shapes):
        boxes = [[0.1, 0.1, 0.3, 0.4], [0.5, 0.2, 0.45, 0.7], [0.0, 0.6, 0.35, 0.4]]  # xywh, of the image's sides
        objects = [
            {"bbox": [x * width, y * height, w * width, h * height], "category_id": category}
            for category, (x, y, w, h) in enumerate(boxes)
        ]
        annotations.append({"image_id": index, "annotations": objects})
    inputs = processor(images, annotations=annotations, return_tensors="pt")

    anchors = make_anchors([(8, 8), (4, 4), (2, 2)], [8, 16, 32], model.config.anchor_sizes, [0.5, 1.0, 2.0])
    logits, deltas = torch.full((4, NUM_ANCHORS, 3), -20.0), torch.zeros(4, NUM_ANCHORS, 4)
    for image, image_labels in enumerate(inputs["labels"]):
        height, width = image_labels["size"].tolist()
        centers, sides = image_labels["boxes"][:, :2], image_labels["boxes"][:, 2:]
        boxes = torch.cat([centers - sides / 2, centers + sides / 2], dim=1)
        boxes *= torch.tensor([width, height, width, height])
        valid = ((anchors[:, :2] + anchors[:, 2:]).round() / 2 < torch.tensor([width, height])).all(dim=1)
        exists, iscrowd = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)
        level_sizes = [9 * 64, 9 * 16, 9 * 4]
        (matched,) = model.detection_loss.matcher(anchors, level_sizes, boxes[None], exists, iscrowd, valid[None])
        found = (matched >= 0).nonzero().squeeze(1)
        assert set(matched[found].tolist()) == {0, 1, 2}
        deltas[image, found] = BoxCoder().encode(boxes[matched[found]], anchors[found])
        logits[image, found, image_labels["class_labels"][matched[found]]] = 20.0
    monkeypatch.setattr(model.head, "forward", lambda maps: (logits, deltas))
    outputs = model(**inputs)
    assert outputs.loss < 1e-3
    results = processor.post_process_object_detection(outputs, 0.5, shapes)
    for result, annotation in zip(results, annotations, strict=True):
        assert sorted(result["labels"].tolist()) == [0, 1, 2]
        for label, box in zip(result["labels"].tolist(), result["boxes"], strict=True):
            x, y, w, h = annotation["annotations"][label]["bbox"]
            torch.testing.assert_close(box, torch.tensor([x, y, x + w, y + h]), atol=0.1, rtol=0)


# precision and compilation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("overrides", [{}, LATENTS], ids=["pixels", "latents"])
def test_half_precision(tiny_model, random_labels, dtype, overrides):
    model = tiny_model(**overrides)
    exact = model(pixels(), pixel_mask=masks((64, 40), (24, 64)))
    half = model.to(dtype)(pixels(), pixel_mask=masks((64, 40), (24, 64)))  # float32 pixels are cast
    assert half.logits.dtype == dtype
    assert half.pred_boxes.dtype == torch.float32
    assert torch.isfinite(half.logits).all()
    scores, expected = half.logits.float().sigmoid(), exact.logits.sigmoid()
    assert (scores - expected).abs().mean() < 0.02
    results = DiTDetectionImageProcessor(size=64).post_process_object_detection(half, 0.1)
    assert all(result["scores"].dtype == result["boxes"].dtype == torch.float32 for result in results)
    if dtype == torch.bfloat16:
        outputs = model.train()(pixels(), labels=[random_labels(3), random_labels(0)])
        outputs.loss.backward()
        assert outputs.loss.dtype == torch.float32
        assert torch.isfinite(outputs.loss)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_compiles_into_one_graph(tiny_model):
    model = tiny_model(max_candidates=50)
    with torch.no_grad():
        expected = model(pixels(), pixel_mask=masks((64, 40), (24, 64)))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_same_outputs(compiled(pixels(), pixel_mask=masks((64, 40), (24, 64))), expected, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


# by configuration alone


def test_the_config_reaches_the_matcher(tiny_model):
    settings = {
        "matcher": "max_iou",
        "foreground_iou": 0.7,
        "background_iou": 0.3,
        "allow_low_quality_matches": False,
        "atss_candidates": 5,
    }
    matcher = tiny_model(**settings).detection_loss.matcher
    assert vars(matcher) == {"method": settings.pop("matcher"), "num_anchors_per_cell": 9, **settings}


def test_the_classic_single_scale_head_by_config_alone(tiny_model, random_labels):
    model = tiny_model(
        neck_channels=None,
        strides=[16],
        head_channels=[16, 8],  # hidden_size / 2 and / 4
        shared_head_tower=True,
        predictor_kernel_size=1,
    ).train()
    convolutions = [
        (name, module.in_channels, module.out_channels, module.kernel_size[0])
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and name.startswith(("neck.", "head."))
    ]
    assert convolutions == [
        ("head.class_tower.0", 32, 16, 3),
        ("head.class_tower.3", 16, 8, 3),
        ("head.class_predictor", 8, 9 * 3, 1),
        ("head.box_predictor", 8, 9 * 4, 1),
    ]
    outputs = model(pixels(width=96), labels=[random_labels(2), random_labels(0)])
    assert outputs.logits.shape == (2, 4 * 6 * 9, 3)
    outputs.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
