import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from dit_detection.model.anchors import make_anchors


def torchvision_anchors(shapes, strides, sizes, ratios):
    """torchvision's own, but not rounded, and centred on the cells instead of their corners."""
    generator = AnchorGenerator(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))
    base = []
    for level in sizes:  # as in `AnchorGenerator.generate_anchors`, without its `.round()`
        heights = torch.tensor(ratios).sqrt()
        sides = torch.tensor(level)
        widths, heights = ((1 / heights)[:, None] * sides).view(-1), (heights[:, None] * sides).view(-1)
        base.append(torch.stack([-widths, -heights, widths, heights], dim=1) / 2)
        # Ours differs from theirs by the rounding alone.
        theirs = generator.generate_anchors(tuple(level), tuple(ratios))
        assert torch.equal(base[-1].round(), theirs)
    generator.cell_anchors = base
    anchors = generator.grid_anchors(
        [list(shape) for shape in shapes], [[torch.tensor(stride)] * 2 for stride in strides]
    )
    return torch.cat([level + stride / 2 for level, stride in zip(anchors, strides, strict=True)])


@pytest.mark.parametrize(
    ("shapes", "strides"),
    [
        ([(8, 8), (4, 4), (2, 2)], [8, 16, 32]),
        ([(5, 11), (3, 6), (2, 3)], [8, 16, 32]),  # odd, rectangular
        ([(1, 1)], [128]),
        ([(3, 1)], [2]),
    ],
)
@pytest.mark.parametrize("ratios", [[0.5, 1.0, 2.0], [0.1, 7.3]])
def test_anchors_are_those_of_torchvision_unrounded_and_centred(shapes, strides, ratios):
    sizes = [[4.0 * stride * 2 ** (octave / 3) for octave in range(3)] for stride in strides]
    expected = torchvision_anchors(shapes, strides, sizes, ratios)
    torch.testing.assert_close(make_anchors(shapes, strides, sizes, ratios), expected, atol=1e-4, rtol=1e-6)


def test_order_is_that_of_the_whole_torchvision_generator():
    # Sizes and ratios that rounding leaves alone: 16 / sqrt(1/4) = 32 wide, 8 high.
    generator = AnchorGenerator(((16, 32), (64, 128)), ((0.25, 1.0, 4.0),) * 2)
    images = ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)])
    features = [torch.zeros(1, 1, 8, 12), torch.zeros(1, 1, 4, 6)]
    expected = generator(images, features)[0]
    expected += torch.cat([torch.full((8 * 12 * 6, 1), 4.0), torch.full((4 * 6 * 6, 1), 8.0)])
    anchors = make_anchors([(8, 12), (4, 6)], [8, 16], [[16, 32], [64, 128]], [0.25, 1.0, 4.0])
    assert torch.equal(anchors, expected)


def test_anchors_by_hand():
    # Two cells of 10 pixels side by side, centred on (5, 5) and (15, 5). Area 16 * 16, height / width 4: 8 x 32.
    anchors = make_anchors([(1, 2)], [10], [[16.0]], [4.0])
    assert torch.equal(anchors, torch.tensor([[1.0, -11, 9, 21], [11, -11, 19, 21]]))


def test_areas_and_ratios_are_exact():
    anchors = make_anchors([(2, 2)], [16], [[40.3175]], [0.5, 1.0, 2.0])
    sides = anchors[:, 2:] - anchors[:, :2]
    torch.testing.assert_close(sides.prod(dim=1).sqrt(), torch.full((12,), 40.3175))
    torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.tensor([0.5, 1, 2] * 4))
