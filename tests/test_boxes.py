import torch
from torchvision.ops import box_convert

from dit_detection.model.boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, normalize_boxes, scale_boxes


def test_formats_by_hand():
    # From (10, 20) to (40, 80): 30 wide, 60 high, centred on (25, 50).
    xyxy, cxcywh = torch.tensor([[10.0, 20, 40, 80]]), torch.tensor([[25.0, 50, 30, 60]])
    assert torch.equal(box_xyxy_to_cxcywh(xyxy), cxcywh)
    assert torch.equal(box_cxcywh_to_xyxy(cxcywh), xyxy)


def test_formats_are_those_of_torchvision_in_any_batch_shape():
    torch.manual_seed(0)
    boxes = torch.randn(3, 5, 4) * 100  # inverted, negative and degenerate ones too
    boxes[0, 0] = 0
    for ours, source, target in ((box_cxcywh_to_xyxy, "cxcywh", "xyxy"), (box_xyxy_to_cxcywh, "xyxy", "cxcywh")):
        torch.testing.assert_close(ours(boxes), box_convert(boxes, source, target), atol=1e-5, rtol=1e-6)
    assert box_cxcywh_to_xyxy(torch.zeros(0, 4)).shape == (0, 4)
    assert box_xyxy_to_cxcywh(torch.zeros(2, 0, 4)).shape == (2, 0, 4)


def test_scale_boxes_by_hand():
    # An image 100 high and 200 wide: x times 200, y times 100.
    boxes = torch.tensor([[0.1, 0.2, 0.5, 1.0]])
    pixels = torch.tensor([[20.0, 20, 100, 100]])
    torch.testing.assert_close(scale_boxes(boxes, torch.tensor([100, 200])), pixels)
    both = scale_boxes(boxes.expand(2, 1, 4), torch.tensor([[100, 200], [10, 10]]))
    torch.testing.assert_close(both, torch.stack([pixels, torch.tensor([[1.0, 2, 5, 10]])]))


def test_normalize_boxes_clips_to_the_image_and_is_inverted_by_scale_boxes():
    # Left and top reach out of the 100 x 200 image, right and bottom end at a half and beyond the edge.
    boxes = torch.tensor([[[-20.0, -1, 100, 140]], [[5.0, 5, 10, 10]]])
    sizes = torch.tensor([[100, 200], [20, 20]])
    normalized = normalize_boxes(boxes, sizes)
    torch.testing.assert_close(normalized, torch.tensor([[[0.0, 0, 0.5, 1]], [[0.25, 0.25, 0.5, 0.5]]]))
    torch.testing.assert_close(scale_boxes(normalized, sizes)[1], boxes[1])
    assert normalize_boxes(boxes[0].double(), sizes[0]).dtype == torch.float64
