"""The whole detector under `torch.compile`, in training and in eval mode, as one graph."""

import importlib.util
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dit_detection.model import matcher as matcher_module
from dit_detection.model.labels import pad_labels

DEFAULT = {}
OTHER = {"matcher": "max_iou", "box_loss": "smooth_l1", "class_loss": "cross_entropy", "class_weights": [0.5, 1, 2]}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batch(random_labels, counts, seed=0):
    torch.manual_seed(seed)
    labels = [random_labels(count, seed=seed + index) for index, count in enumerate(counts)]
    return torch.rand(len(counts), 3, 64, 64) * 2 - 1, labels


def loss_and_gradients(model, call, pixels, labels):
    model.zero_grad()
    loss = call(pixels, labels=labels).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_training(model, pixels, labels, backend):
    expected, gradients = loss_and_gradients(model, model, pixels, labels)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    loss, compiled_gradients = loss_and_gradients(model, compiled, pixels, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert compiled_gradients.keys() == gradients.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "frozen"), [(DEFAULT, False), (OTHER, True)])
def test_training_is_one_graph(tiny_model, random_labels, overrides, frozen):
    model = tiny_model(**overrides).train()
    if frozen:
        model.freeze_backbone()
    pixels, labels = batch(random_labels, [3, 0])
    check_training(model, pixels, labels, "eager")


@pytest.mark.long  # the compiler of C++ takes minutes
def test_training_is_one_graph_in_machine_code(tiny_model, random_labels):
    pixels, labels = batch(random_labels, [3, 0])
    check_training(tiny_model(**DEFAULT).train(), pixels, pad_labels(labels, 3), "inductor")


@pytest.mark.slow
def test_evaluation_with_labels_is_one_graph(tiny_model, random_labels):
    model = tiny_model(max_candidates=50)
    pixels, labels = batch(random_labels, [2, 1])
    with torch.no_grad():
        expected = model(pixels, labels=labels)
        outputs = torch.compile(model, fullgraph=True, backend="eager")(pixels, labels=labels)
    for key in ("loss", "loss_per_image", "logits", "pred_boxes"):
        torch.testing.assert_close(outputs[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_other_numbers_of_objects_hardly_compile_anew(tiny_model, random_labels):
    model, counter = tiny_model().train(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(7, (12, 2), generator=generator).tolist()
    for seed, of_images in enumerate([*counts, [0, 0], [1, 0], [1, 1], [40, 2]]):
        pixels, labels = batch(random_labels, of_images, seed)
        with torch.no_grad():
            compiled(pixels, labels=pad_labels(labels, 3))
    assert counter.frame_count <= 2


def test_two_copies_of_the_matcher_in_one_process():
    # A checkpoint's own code beside the package's: each copy registers its operation.
    spec = importlib.util.spec_from_file_location(
        "dit_detection.model.matcher-of-a-checkpoint", matcher_module.__file__
    )
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy
    try:
        spec.loader.exec_module(copy)
    finally:
        del sys.modules[spec.name]
    anchors = torch.tensor([[0.0, 0, 10, 10], [20.0, 0, 30, 10]])
    inputs = (anchors, [2], anchors[None, 1:], *[torch.tensor([[flag]]) for flag in (True, False)])
    for module in (matcher_module, copy, matcher_module):
        matched = module.AnchorMatcher("atss", 1)(*inputs, torch.ones(1, 2, dtype=torch.bool))
        assert matched.tolist() == [[-1, 0]]
