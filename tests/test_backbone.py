import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from dit_detection.model.backbone import DiTBackbone, PatchEmbedding, make_positions
from dit_detection.model.configuration_dit_detection import DiTDetectionConfig


def tiny_config(attention="sdpa", **overrides):
    fields = {
        "in_channels": 3,
        "patch_size": 4,
        "pretrained_grid": 8,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "out_indices": [0, 2],
        "strides": [4, 8],
    }
    config = DiTDetectionConfig(**(fields | overrides))
    config._attn_implementation = attention
    return config


def random_backbone(config):
    torch.manual_seed(0)
    backbone = DiTBackbone(config)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return backbone.eval()


@pytest.mark.parametrize(("grid", "dim"), [(8, 64), (16, 1152), (14, 384)])
def test_positions_at_the_pretraining_grid_are_those_of_diffusers(grid, dim):
    theirs = get_2d_sincos_pos_embed(dim, grid, base_size=grid, output_type="pt").float()
    torch.testing.assert_close(make_positions(grid, grid, dim, grid), theirs, atol=1e-6, rtol=0)


def test_a_coarse_position_is_the_mean_of_the_four_fine_ones_it_covers():
    coarse = make_positions(16, 16, 1152, 16)
    fine = make_positions(32, 32, 1152, 16).view(16, 2, 16, 2, 1152).mean(dim=(1, 3)).flatten(0, 1)
    rms = (fine - coarse).square().mean().sqrt()
    assert rms < 0.005  # corner-aligned, as in diffusers: 0.042; without rescaling: 0.50


def test_positions_of_a_rectangle_are_isotropic_and_centred():
    # 8 x 16 tokens at pretraining grid 8: the long side gets pitch 1/2, so columns sit at -0.25, 0.25, ... 7.25 and
    # rows, with the same pitch and centre 3.5, at 1.75, 2.25, ... 5.25.
    # Width 4 has one frequency, 1: (sin x, cos x, sin y, cos y).
    positions = make_positions(8, 16, 4, 8).view(8, 16, 4).double()
    columns = torch.linspace(-0.25, 7.25, 16, dtype=torch.float64)
    rows = torch.linspace(1.75, 5.25, 8, dtype=torch.float64)
    torch.testing.assert_close(positions[3, :, 0], columns.sin(), atol=1e-6, rtol=0)
    torch.testing.assert_close(positions[5, :, 1], columns.cos(), atol=1e-6, rtol=0)
    torch.testing.assert_close(positions[:, 2, 2], rows.sin(), atol=1e-6, rtol=0)
    torch.testing.assert_close(positions[:, 9, 3], rows.cos(), atol=1e-6, rtol=0)


def test_position_tables_are_kept_per_grid_and_dtype_but_not_without_end():
    embedding = PatchEmbedding(tiny_config())
    first = embedding.positions(4, 6, like=torch.zeros(1))
    assert embedding.positions(4, 6, like=torch.zeros(1)) is first
    assert embedding.positions(4, 6, like=torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for height in range(1, 60):
        embedding.positions(height, 1, like=torch.zeros(1))
    assert len(embedding._positions) <= 16
    assert not embedding.state_dict().keys() - {"projection.weight", "projection.bias"}


def test_positions_first_made_in_inference_mode_can_be_trained_with():
    backbone = random_backbone(tiny_config())
    latents = torch.randn(1, 3, 16, 24)
    with torch.inference_mode():
        backbone(latents)
    backbone(latents)[0].sum().backward()
    assert backbone.patch_embedding.projection.weight.grad is not None


def test_the_maps_are_the_tapped_outputs_normalised():
    backbone = random_backbone(tiny_config())
    outputs = []
    for layer in backbone.layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    last, maps = backbone(torch.randn(2, 3, 16, 24))
    assert torch.equal(last, outputs[2])
    assert [tuple(feature_map.shape) for feature_map in maps] == [(2, 32, 4, 6)] * 2
    for feature_map, norm, block in zip(maps, backbone.tap_norms, [0, 2], strict=True):
        # Token (row 1, column 2) of a 4 x 6 grid is number 1 * 6 + 2.
        assert torch.equal(feature_map[:, :, 1, 2], norm(outputs[block])[:, 8])


def test_the_images_of_a_batch_do_not_mix():
    backbone = random_backbone(tiny_config()).double()
    latents = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    together = backbone(latents)[0]
    alone = torch.cat([backbone(latent[None])[0] for latent in latents])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)


def test_eager_attention_equals_sdpa():
    sdpa = random_backbone(tiny_config())
    eager = DiTBackbone(tiny_config("eager"))
    eager.load_state_dict(sdpa.state_dict())
    latents = torch.randn(1, 3, 16, 24)
    torch.testing.assert_close(eager(latents)[0], sdpa(latents)[0])
    _, weights = eager.layers[0].attention(torch.randn(1, 24, 32))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 4, 24))


def test_the_residual_stream_is_contiguous():
    # Every block keeps the strides of its input, and every norm would copy another order.
    backbone = random_backbone(tiny_config())
    for latents in (torch.randn(2, 3, 16, 24), torch.randn(2, 3, 16, 24).to(memory_format=torch.channels_last)):
        assert backbone.patch_embedding(latents).is_contiguous()
        assert backbone(latents)[0].is_contiguous()


@pytest.mark.parametrize(("dtype", "fused"), [(torch.bfloat16, 0), (torch.float32, 1)])
def test_bfloat16_on_a_cpu_does_without_the_fused_attention(monkeypatch, dtype, fused):
    backbone = random_backbone(tiny_config()).to(dtype)
    calls, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(a) or sdpa(*a, **k)
    )
    output, _ = backbone.layers[0].attention(torch.randn(1, 16, 32, dtype=dtype))
    assert len(calls) == fused
    long, _ = backbone.layers[0].attention(torch.randn(1, 600, 32, dtype=dtype))
    assert len(calls) == fused + 1
    assert output.dtype == long.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half(dtype):
    backbone = random_backbone(tiny_config()).to(dtype)
    last, maps = backbone(torch.randn(1, 3, 16, 24, dtype=dtype))
    assert {last.dtype, *(feature_map.dtype for feature_map in maps)} == {dtype}
    assert last.isfinite().all()


def test_trains_under_bfloat16_autocast():
    backbone = random_backbone(tiny_config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        last, _ = backbone(torch.randn(1, 3, 16, 24))
    assert last.dtype == torch.bfloat16  # no float32 between the blocks, which every product would cast back
    last.float().square().mean().backward()
    assert all(layer.scale1.weight.grad.isfinite().all() for layer in backbone.layers)
