import pytest
import torch

from dit_detection.model.neck import SimpleFeaturePyramid, SingleScaleNeck, TapMix, group_norm


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        # 6 x 9 tokens of 16 pixels: 96 x 144 pixels.
        ([16], [(6, 9)]),
        ([8, 16, 32, 64], [(12, 18), (6, 9), (3, 5), (2, 3)]),  # strided convolutions round up
        ([16, 32], [(6, 9), (3, 5)]),
        ([2, 4], [(48, 72), (24, 36)]),  # all finer than the tokens
        ([4], [(24, 36)]),
    ],
)
def test_one_map_per_stride_finest_first(tiny_config, strides, expected):
    neck = SimpleFeaturePyramid(tiny_config(strides=strides))
    maps = neck(tuple(torch.randn(2, 32, 6, 9) for _ in range(2)))
    assert [tuple(feature_map.shape) for feature_map in maps] == [(2, 16, *shape) for shape in expected]


def test_every_tap_and_every_parameter_counts(tiny_config):
    neck = SimpleFeaturePyramid(tiny_config())
    taps = tuple(torch.randn(1, 32, 4, 4, requires_grad=True) for _ in range(2))
    sum(feature_map.square().mean() for feature_map in neck(taps)).backward()
    for tensor in (*taps, *neck.parameters()):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


def test_tap_mix_starts_as_the_mean_and_learns_shares():
    mix = TapMix(3)
    maps = [torch.full((1, 2, 2, 2), value) for value in (1.0, 2.0, 6.0)]
    torch.testing.assert_close(mix(maps), torch.full((1, 2, 2, 2), 3.0))
    # softmax of log 1, log 1, log 2 is 1/4, 1/4, 1/2: 1/4 + 2/4 + 6/2.
    mix.weight.data = torch.tensor([1.0, 1.0, 2.0]).log()
    torch.testing.assert_close(mix(maps), torch.full((1, 2, 2, 2), 3.75))


def test_a_single_scale_is_the_mix_alone(tiny_config):
    neck = SingleScaleNeck(tiny_config(neck_channels=None, strides=[16]))
    assert sum(parameter.numel() for parameter in neck.parameters()) == 2
    taps = torch.randn(1, 32, 4, 4), torch.randn(1, 32, 4, 4)
    (feature_map,) = neck(taps)
    torch.testing.assert_close(feature_map, (taps[0] + taps[1]) / 2)


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (16, 2), (8, 1), (4, 1), (12, 3), (9, 9), (1, 1)])
def test_group_norm_takes_any_width(channels, groups):
    norm = group_norm(channels)
    assert norm.num_groups == groups
    assert torch.isfinite(norm(torch.randn(1, channels, 2, 2))).all()
