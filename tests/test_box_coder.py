import math

import torch
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder

from dit_detection.model.box_coder import MAX_LOG_GROWTH, BoxCoder


def random_boxes(count, seed, scale=500.0):
    torch.manual_seed(seed)
    corners = (torch.rand(count, 2) - 0.3) * scale
    return torch.cat([corners, corners + torch.rand(count, 2) * scale + 0.01], dim=1)


def test_encode_by_hand():
    # Anchor 20 wide and 10 high, centred on (10, 5); box 40 wide and 5 high, centred on (20, 0).
    anchors, boxes = torch.tensor([[0.0, 0, 20, 10]]), torch.tensor([[0.0, -2.5, 40, 2.5]])
    expected = torch.tensor([[10 / 20, -5 / 10, math.log(2), math.log(0.5)]])
    torch.testing.assert_close(BoxCoder().encode(boxes, anchors), expected)
    torch.testing.assert_close(BoxCoder().decode(expected, anchors), boxes)


def test_encode_equals_torchvision():
    theirs = TorchvisionBoxCoder((1.0, 1.0, 1.0, 1.0))
    boxes, anchors = random_boxes(200, seed=0), random_boxes(200, seed=1)
    boxes[:3] = torch.tensor([[0.0, 0, 1e4, 1e-3], [-5e3, -5e3, 5e3, 5e3], [7.0, 7, 7.01, 7.01]])
    expected = theirs.encode_single(boxes.double(), anchors.double()).float()
    torch.testing.assert_close(BoxCoder().encode(boxes.double(), anchors.double()).float(), expected)
    torch.testing.assert_close(BoxCoder().encode(boxes, anchors), expected, atol=1e-4, rtol=1e-4)


def test_decode_equals_torchvision_on_wild_deltas():
    theirs = TorchvisionBoxCoder((1.0, 1.0, 1.0, 1.0))
    anchors = random_boxes(200, seed=2)
    deltas = torch.randn(200, 4) * 3
    deltas[:4] = torch.tensor([[0.0, 0, 100, 100], [0, 0, -100, -100], [1e3, -1e3, 0, 0], [0, 0, 4.2, 4.1]])
    expected = theirs.decode_single(deltas, anchors)
    assert theirs.bbox_xform_clip == MAX_LOG_GROWTH
    torch.testing.assert_close(BoxCoder().decode(deltas, anchors), expected, atol=1e-2, rtol=1e-5)
    torch.testing.assert_close(
        BoxCoder().decode(deltas.double(), anchors.double()), theirs.decode_single(deltas.double(), anchors.double())
    )


def test_decode_inverts_encode_and_takes_batches():
    boxes, anchors = random_boxes(100, seed=3).double(), random_boxes(100, seed=4).double()
    deltas = BoxCoder().encode(boxes, anchors)
    grows = (deltas[:, 2:] > MAX_LOG_GROWTH).any(dim=1)
    torch.testing.assert_close(BoxCoder().decode(deltas, anchors)[~grows], boxes[~grows])
    batch = BoxCoder().decode(deltas.expand(3, 100, 4), anchors)
    assert torch.equal(batch[2], BoxCoder().decode(deltas, anchors))


def test_no_box_outgrows_its_anchor_beyond_the_bound():
    # 62.5 times its 16 pixels: 1000, centred on 8.
    wild = BoxCoder().decode(torch.tensor([[0.0, 0, 1e6, float("inf")]]), torch.tensor([[0.0, 0, 16, 16]]))
    torch.testing.assert_close(wild, torch.tensor([[-492.0, -492, 508, 508]]))
