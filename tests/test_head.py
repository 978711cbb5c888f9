import math

import pytest
import torch

from dit_detection.model.anchors import make_anchors
from dit_detection.model.head import AnchorHead


def test_predictions_are_in_the_order_of_the_anchors(tiny_config):
    # Without a tower and with a 1 x 1 kernel of known weights, the head copies what it sees: channel 0 of the map has
    # the cell's x, channel 1 its y; each anchor's first delta reads x, the second y, the third tells the anchor.
    config = tiny_config(
        strides=[8, 16], head_channels=[], predictor_kernel_size=1, neck_channels=2, shared_head_tower=True
    )
    head = AnchorHead(config)
    per_cell = config.num_anchors_per_cell
    with torch.no_grad():
        weight = head.box_predictor.weight.zero_().view(per_cell, 4, 2)
        weight[:, 0, 0] = weight[:, 1, 1] = 1.0
        head.box_predictor.bias.zero_().view(per_cell, 4)[:, 2] = torch.arange(per_cell).float()
        weight = head.class_predictor.weight.zero_().view(per_cell, 3, 2)
        weight[:, 1, 0] = 1.0
        head.class_predictor.bias.zero_().view(per_cell, 3)[:, 2] = torch.arange(per_cell).float()
    shapes = [(4, 6), (2, 3)]
    maps = []
    for (height, width), stride in zip(shapes, config.strides, strict=True):
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        maps.append(torch.stack([x, y])[None] * stride)
    logits, deltas = head(maps)
    anchors = make_anchors(shapes, config.strides, config.anchor_sizes, config.aspect_ratios)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert logits.shape == (1, len(anchors), 3)
    torch.testing.assert_close(deltas[0, :, :2], centers)
    torch.testing.assert_close(logits[0, :, 1], centers[:, 0])
    # Anchor a of a cell has ratio a // 3 and size a % 3.
    number = deltas[0, :, 2].long()
    assert torch.equal(logits[0, :, 2].long(), number)
    sides = anchors[:, 2:] - anchors[:, :2]
    ratios = torch.tensor(config.aspect_ratios)[number // 3]
    torch.testing.assert_close(sides[:, 1] / sides[:, 0], ratios)
    level = (torch.arange(len(anchors)) >= 4 * 6 * per_cell).long()
    sizes = torch.tensor(config.anchor_sizes)[level, number % 3]
    torch.testing.assert_close(sides.prod(dim=1).sqrt(), sizes)


@pytest.mark.parametrize("prior", [0.01, 0.2])
def test_starts_at_the_prior_and_at_the_anchors(tiny_model, prior):
    from dit_detection import DiTForObjectDetection

    head = DiTForObjectDetection(tiny_model(prior_probability=prior).config).head
    expected = torch.full_like(head.class_predictor.bias, -math.log((1 - prior) / prior))
    assert torch.equal(head.class_predictor.bias, expected)
    torch.testing.assert_close(head.class_predictor.bias.sigmoid(), torch.full_like(expected, prior))
    assert (head.box_predictor.bias == 0).all()
    for predictor in (head.class_predictor, head.box_predictor):
        assert 0.005 < predictor.weight.std() < 0.015


def test_a_shared_tower_or_one_each(tiny_config):
    shared, own = (AnchorHead(tiny_config(shared_head_tower=flag, head_channels=[8, 4])) for flag in (True, False))
    assert shared.box_tower is None
    assert own.box_tower is not own.class_tower
    maps = [torch.randn(2, 16, 4, 4, requires_grad=True)]
    for head in (shared, own):
        logits, deltas = head(maps)
        assert logits.shape == (2, 16 * 9, 3)
        assert deltas.shape == (2, 16 * 9, 4)
        (logits.sum() + deltas.sum()).backward()
        assert all(parameter.grad is not None for parameter in head.parameters())
    widths = [layer.out_channels for layer in own.class_tower if isinstance(layer, torch.nn.Conv2d)]
    assert widths == [8, 4]
