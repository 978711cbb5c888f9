import copy

import pytest
import torch
from tiny_inputs import labels_of, masks, pixels
from tiny_training import LATENTS
from transformers.image_processing_utils import BatchFeature

from dit_detection import (
    DiTForObjectDetection,
)

LABEL_CASES = {
    "objects": [labels_of([[0.5, 0.5, 0.4, 0.4], [0.2, 0.3, 0.1, 0.2]], [0, 2]), labels_of([[0.7, 0.7, 0.5, 0.5]])],
    "an image without objects": [labels_of([[0.5, 0.5, 0.4, 0.4]]), labels_of([])],
    "no objects at all": [labels_of([]), labels_of([])],
    "no anchor touched": [labels_of([[1.9, 1.9, 0.1, 0.1]]), labels_of([[-1.9, 0.5, 0.1, 0.1]])],
    "crowds only": [labels_of([[0.5, 0.5, 1, 1]], iscrowd=torch.tensor([1])), labels_of([], iscrowd=torch.tensor([]))],
    "out of the image": [labels_of([[0.5, 0.5, 1.9, 1.9], [1.0, 1, 0.5, 0.5]]), labels_of([[0.0, 0, 1, 1]])],
    "without area": [labels_of([[0.5, 0.5, 0, 0.1], [0.2, 0.2, 0, 0]]), labels_of([[1.0, 1, 0, 0]])],
    "2000 objects": [
        labels_of(torch.rand(2000, 4, generator=torch.Generator().manual_seed(0)).tolist()),
        labels_of([]),
    ],
}


@pytest.mark.parametrize("case", LABEL_CASES)
@pytest.mark.parametrize("box_loss", ["giou", "smooth_l1"])
def test_every_parameter_gets_a_finite_gradient_in_every_case(tiny_model, case, box_loss):
    model = tiny_model(box_loss=box_loss, matcher="max_iou" if case == "2000 objects" else "atss").train()
    images, labels = pixels(), LABEL_CASES[case]
    before = copy.deepcopy((images, labels))
    outputs = model(images, labels=labels, pixel_mask=masks((64, 64), (64, 50)))
    outputs.loss.backward()
    assert torch.isfinite(outputs.loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert torch.equal(images, before[0])
    for image_labels, old in zip(labels, before[1], strict=True):
        assert all(torch.equal(image_labels[key], old[key]) for key in old)


def test_labels_may_be_batch_features_with_all_their_keys(tiny_model, random_labels):
    model = tiny_model()
    plain = [random_labels(2), random_labels(1)]
    extra = {"image_id": torch.tensor([7]), "area": torch.ones(2), "orig_size": torch.tensor([9, 9])}
    full = [BatchFeature({**image_labels, **extra}) for image_labels in plain]
    assert torch.equal(model(pixels(), labels=full).loss, model(pixels(), labels=plain).loss)


def saved_tensors(module, *inputs):
    """How many tensors a forward pass keeps for the backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(1) or tensor, lambda tensor: tensor):
        module(*inputs)
    return len(saved)


def test_freezing_saves_what_the_backward_pass_would_need(tiny_model, random_labels):
    model = tiny_model(num_hidden_layers=3, out_indices=[2]).train()
    backbone = model.model.backbone
    layer_alone = saved_tensors(backbone.layers[2], torch.randn(2, 16, 32))
    norm_alone = saved_tensors(backbone.tap_norms[0], torch.randn(2, 16, 32))
    everything = saved_tensors(model.model, pixels())
    model.freeze_backbone(2)
    assert saved_tensors(model.model, pixels()) == pytest.approx(layer_alone + norm_alone, abs=3)
    assert everything > 2.5 * layer_alone
    model(pixels(), labels=[random_labels(2)] * 2).loss.backward()
    frozen = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    prefixes = ("model.backbone.patch_embedding.", "model.backbone.layers.0.", "model.backbone.layers.1.")
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    model.freeze_backbone()
    assert saved_tensors(model.model, pixels()) == norm_alone
    assert saved_tensors(backbone.layers[2], backbone.patch_embedding(pixels())) == 0
    model.unfreeze_backbone()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert saved_tensors(model.model, pixels()) == everything


def test_freezing_is_counted_from_the_first_block_and_checked(tiny_model):
    model = tiny_model()
    model.freeze_backbone()
    model.freeze_backbone(0)  # trains every block again; the embedding stays frozen
    assert all(parameter.requires_grad for parameter in model.model.backbone.layers.parameters())
    assert not any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters())
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=f"num_layers={wrong} must lie between 0 and 2"):
            model.freeze_backbone(wrong)


def test_the_latent_encoder_never_trains(tiny_model, random_labels, tmp_path):
    model = tiny_model(**LATENTS)
    model.save_pretrained(tmp_path)
    for candidate in (model, DiTForObjectDetection.from_pretrained(tmp_path), copy.deepcopy(model)):
        candidate.train()
        candidate.unfreeze_backbone()
        encoder = candidate.model.latent_encoder
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        assert not any(module.training for module in encoder.modules())
        candidate(pixels(), labels=[random_labels(2)] * 2).loss.backward()
        assert all(parameter.grad is None for parameter in encoder.parameters())
        assert all(p.grad is not None for name, p in candidate.named_parameters() if "latent_encoder" not in name)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its new name came after 5.0
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("num_frozen", [None, 0, 1])
@pytest.mark.parametrize("encoded", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(tiny_model, random_labels, use_reentrant, num_frozen, encoded):
    def gradients(model):
        inputs = {"pixel_values": pixels()}
        if num_frozen is not None:
            model.freeze_backbone(num_frozen)
        if encoded and num_frozen:
            inputs = model.model.encode_frozen(**inputs)
        model.train()
        model(**inputs, labels=[random_labels(3), random_labels(1)]).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

    expected = gradients(tiny_model())
    assert all(gradient is not None for gradient in expected.values())
    model = tiny_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert all(layer.gradient_checkpointing for layer in model.model.backbone.layers)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)
