import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiTTransformer2DModel, Transformer2DModel
from torch import nn

from dit_detection import DiTForObjectDetection
from dit_detection.model.backbone import DiTBackbone
from dit_detection.model.configuration_dit_detection import DiTDetectionConfig
from dit_detection.model.convert_dit import dit_config, fold_dit
from dit_detection.model.latent_encoder import LatentEncoder

NULL = 5  # num_embeds_ada_norm of the tiny DiT: classes 0 to 4, then the null class


def randomize(module, std=0.1):
    """Every weight random and none zero: a fresh DiT has zero gates, which would hide every fault."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.eval()


def tiny_dit(model_class=DiTTransformer2DModel, **overrides):
    fields = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "num_layers": 4,
        "sample_size": 16,
        "patch_size": 2,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": NULL,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    }
    return randomize(model_class(**(fields | overrides)))


def tiny_vae(**overrides):
    fields = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
    }
    return randomize(AutoencoderKL(**(fields | overrides)))


def folded_backbone(dit, dtype=None, **options):
    """A backbone with the folded weights of `dit`: missing, left-over or misshapen keys are errors."""
    vae = tiny_vae(latent_channels=dit.config.in_channels)
    config = dit_config(dit, vae, **options)
    config._attn_implementation = "sdpa"
    weights = fold_dit(dit, vae, config, dtype=dtype)
    backbone = DiTBackbone(config).to(next(iter(weights.values())).dtype)
    backbone.load_state_dict({k[len("backbone.") :]: w for k, w in weights.items() if k.startswith("backbone.")})
    encoder = LatentEncoder(config.latent_encoder)
    encoder.load_state_dict(
        {k[len("latent_encoder.") :]: w for k, w in weights.items() if k.startswith("latent_encoder.")}
    )
    assert all(key.startswith(("backbone.", "latent_encoder.")) for key in weights)
    return backbone


@torch.no_grad()
def states_of_diffusers(dit, latents, timestep, condition):
    """The embedding and the output of every block, by diffusers' own modules, on a grid of any shape."""
    conditioning = {"timestep": torch.tensor([timestep]), "class_labels": torch.tensor([condition])}
    states = [dit.pos_embed(latents)]
    for block in dit.transformer_blocks:
        states.append(block(states[-1], **conditioning))
    return states


@torch.no_grad()
def states_of_backbone(backbone, latents):
    states = []
    hooks = [layer.register_forward_hook(lambda m, args, output: states.append(output)) for layer in backbone.layers]
    _, feature_maps = backbone(latents)
    for hook in hooks:
        hook.remove()
    return [backbone.patch_embedding(latents).detach(), *states], feature_maps


def assert_states_equal(ours, theirs, dtype):
    assert len(ours) > 1
    for mine, reference in zip(ours, theirs, strict=False):  # diffusers' run on to the last block
        error = (mine - reference).abs().max()
        limit = 1e-9 if dtype == torch.float64 else 1e-4 * reference.abs().max()
        assert error <= limit


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("timestep", "condition"), [(0, None), (10, 0), (50, 3), (999, NULL)])
def test_every_hidden_state_equals_that_of_diffusers(dtype, timestep, condition):
    dit = tiny_dit().to(dtype)
    backbone = folded_backbone(dit, timestep=timestep, condition=condition, out_indices=[0, 3])
    latents = torch.randn(2, 4, 16, 16, dtype=dtype)
    ours, _ = states_of_backbone(backbone, latents)

    theirs = []
    hooks = [
        block.register_forward_hook(lambda m, args, output: theirs.append(output)) for block in dit.transformer_blocks
    ]
    label = NULL if condition is None else condition
    with torch.no_grad():
        dit(latents, timestep=torch.tensor([timestep] * 2), class_labels=torch.tensor([label] * 2))
    for hook in hooks:
        hook.remove()
    assert len(theirs) == len(ours) - 1 == 4
    assert_states_equal(ours, [dit.pos_embed(latents), *theirs], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 24), (40, 8)])
def test_other_grids_equal_diffusers_with_its_position_table(monkeypatch, dtype, height, width):
    dit = tiny_dit().to(dtype)
    backbone = folded_backbone(dit, timestep=50, out_indices=[1, 2])
    latents = torch.randn(1, 4, height, width, dtype=dtype)
    # Here the two tables differ on purpose (half-pixel centres, no squeezing), so both get diffusers'.
    table = dit.pos_embed(latents) - dit.pos_embed.proj(latents).flatten(2).transpose(1, 2)
    monkeypatch.setattr(backbone.patch_embedding, "positions", lambda height, width, like: table)
    ours, feature_maps = states_of_backbone(backbone, latents)
    assert_states_equal(ours, states_of_diffusers(dit, latents, 50, NULL), dtype)
    assert feature_maps[0].shape == (1, 32, height // 2, width // 2)


@pytest.mark.parametrize(
    "overrides",
    [
        {"attention_bias": False, "activation_fn": "gelu", "norm_eps": 1e-3, "dropout": 0.3},
        {"norm_elementwise_affine": True, "upcast_attention": True},
        {"in_channels": 3, "patch_size": 4, "out_channels": 6, "num_layers": 1},
    ],
)
def test_the_variants_that_a_config_allows_fold_exactly(overrides):
    dit = tiny_dit(**overrides).double()
    backbone = folded_backbone(dit, timestep=7, condition=1, out_indices=[-1])
    latents = torch.randn(1, dit.config.in_channels, 16, 16, dtype=torch.float64)
    ours, _ = states_of_backbone(backbone, latents)
    # upcast_attention: diffusers computes attention scores in float32 only without sdpa, so float64 stays exact.
    assert_states_equal(ours, states_of_diffusers(dit, latents, 7, 1), torch.float64)


def test_a_legacy_transformer_object_folds_exactly():
    dit = tiny_dit(Transformer2DModel).double()
    backbone = folded_backbone(dit, timestep=50)
    latents = torch.randn(1, 4, 16, 16, dtype=torch.float64)
    ours, _ = states_of_backbone(backbone, latents)
    assert_states_equal(ours, states_of_diffusers(dit, latents, 50, NULL), torch.float64)


def test_a_tap_is_normalised_as_the_block_that_follows_it_does():
    dit = tiny_dit().double()
    backbone = folded_backbone(dit, timestep=50, condition=2, out_indices=[0, 1, 3])
    latents = torch.randn(1, 4, 16, 16, dtype=torch.float64)
    _, feature_maps = states_of_backbone(backbone, latents)
    conditioning = {"timestep": torch.tensor([50]), "class_labels": torch.tensor([2])}
    states = states_of_diffusers(dit, latents, 50, 2)
    with torch.no_grad():
        expected = [
            block.norm1(state, **conditioning, hidden_dtype=torch.float64)[0]
            for block, state in [(dit.transformer_blocks[1], states[1]), (dit.transformer_blocks[2], states[2])]
        ]
        # Nothing follows the last block but the output norm: what diffusers hands to its output projection.
        dit.proj_out_2.register_forward_pre_hook(lambda module, args: expected.append(args[0]))
        dit(latents, **conditioning)
    for ours, theirs in zip(feature_maps, expected, strict=True):
        assert (ours.flatten(2).transpose(1, 2) - theirs).abs().max() <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_of_the_source_is_kept(dtype):
    dit, vae = tiny_dit().to(dtype), tiny_vae()
    weights = fold_dit(dit, vae, dit_config(dit, vae, timestep=50))
    assert {weight.dtype for weight in weights.values()} == {dtype}


def test_folding_happens_in_float64_before_the_cast():
    dit = tiny_dit().double()
    config = dit_config(dit, None, timestep=50, strides=[2])
    exact = fold_dit(dit, None, config)
    for key, weight in fold_dit(dit, None, config, dtype=torch.bfloat16).items():
        assert torch.equal(weight, exact[key].bfloat16())


def test_folding_ignores_train_mode_and_leaves_the_source_alone():
    dit = tiny_dit()  # in train mode diffusers' label embedding drops labels at random
    before = {key: weight.clone() for key, weight in dit.state_dict().items()}
    config = dit_config(dit, None, timestep=50, condition=1)
    expected = fold_dit(dit, None, config)
    dit.train()
    weights = fold_dit(dit, None, config)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert dit.training and all(torch.equal(weight, before[key]) for key, weight in dit.state_dict().items())


def test_a_weight_without_a_place_is_named():
    dit = tiny_dit()
    config = dit_config(dit, None, timestep=50)
    dit.transformer_blocks[0].attn1.norm_q = nn.LayerNorm(16)
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn1\.norm_q\.weight"):
        fold_dit(dit, None, config)


def test_a_weight_that_is_absent_is_named():
    dit = tiny_dit()
    config = dit_config(dit, None, timestep=50)
    dit.transformer_blocks[1].attn1.to_q = nn.Sequential(
        dit.transformer_blocks[1].attn1.to_q
    )  # as an adapter wraps it
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn1\.to_q\.weight.*fused"):
        fold_dit(dit, None, config)


def test_blocks_after_the_deepest_tap_and_the_decoder_are_not_stored():
    dit, vae = tiny_dit(), tiny_vae()
    weights = fold_dit(dit, vae, dit_config(dit, vae, timestep=50, out_indices=[1]))
    assert {key.split(".")[2] for key in weights if key.startswith("backbone.layers.")} == {"0", "1"}
    assert not any("decoder" in key or "post_quant" in key or "emb" in key.split(".")[-2] for key in weights)


def test_config_of_a_latent_dit():
    dit = tiny_dit(norm_eps=1e-4, num_layers=28)
    config = dit_config(dit, tiny_vae(), timestep=50, num_labels=3)
    assert (config.in_channels, config.patch_size, config.pretrained_grid) == (4, 2, 8)
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (32, 2, 128)
    assert (config.attention_norm_eps, config.mlp_norm_eps, config.hidden_act) == (1e-6, 1e-4, "gelu_pytorch_tanh")
    assert (config.timestep, config.condition, config.num_labels) == (50, None, 3)
    assert (config.num_hidden_layers, config.out_indices) == (18, [9, 13, 17])
    # Patch 2 on latents at half the pixels' resolution: a token every 4 pixels.
    assert (config.token_stride, config.strides) == (4, [2, 4, 8, 16, 32])
    assert "decoder_block_out_channels" not in config.latent_encoder and "up_block_types" not in config.latent_encoder
    assert DiTDetectionConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("depth", "taps"),
    [(1, [0]), (2, [0]), (3, [0, 1]), (4, [0, 1, 2]), (12, [3, 5, 7]), (24, [8, 11, 14]), (28, [9, 13, 17])],
)
def test_default_taps_keep_their_share_of_the_depth(depth, taps):
    config = dit_config(tiny_dit(num_layers=depth), None, timestep=50)
    assert (config.out_indices, config.num_hidden_layers) == (taps, taps[-1] + 1)


def test_strides_follow_the_tokens_unless_given():
    pixel_dit = tiny_dit(in_channels=3, patch_size=8)
    assert dit_config(pixel_dit, None, timestep=50).strides == [4, 8, 16, 32, 64]
    assert dit_config(pixel_dit, None, timestep=50, neck_channels=None).strides == [8]
    assert dit_config(pixel_dit, None, timestep=50, strides=[8, 16]).strides == [8, 16]
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    assert dit_config(tiny_dit(), tiny, timestep=50).strides == [4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep": -1}, "timestep=-1"),
        ({"timestep": 1000}, "timestep=1000"),
        ({"timestep": 50, "condition": NULL + 1}, r"condition=6.*5 classes"),
        ({"timestep": 50, "condition": -1}, "condition=-1"),
        ({"timestep": 50, "out_indices": [0, 4]}, r"out_indices=\[0, 4\].*-4 to 3"),
        ({"timestep": 50, "out_indices": [-5]}, r"out_indices=\[-5\]"),
        ({"timestep": 50, "out_indices": [2, 1]}, "out_indices"),
        ({"timestep": 50, "out_indices": []}, "out_indices"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        dit_config(tiny_dit(), None, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neck_channel": 64}, "no field 'neck_channel'. Is 'neck_channels' meant"),
        ({"timesteps": 200}, "no field 'timesteps'"),
        ({"anchor_size": [[8]]}, "Is 'anchor_sizes' meant"),
        ({"hidden_size": 64}, "hidden_size is that of the DiT"),
        ({"torch_dtype": torch.bfloat16}, "Is 'dtype' meant"),
    ],
)
def test_a_misspelt_option_is_not_swallowed(options, message):
    with pytest.raises(ValueError, match=message):
        DiTForObjectDetection.from_diffusers(tiny_dit(in_channels=3), vae=None, **options)


def test_options_of_any_configuration_are_taken():
    model = DiTForObjectDetection.from_diffusers(
        tiny_dit(in_channels=3),
        vae=None,
        dtype="bfloat16",
        num_labels=4,
        attn_implementation="eager",
        neck_channels=16,
    )
    assert model.dtype == torch.bfloat16 and model.config.num_labels == 4
    assert model.config._attn_implementation == "eager"


def test_a_dit_that_cannot_be_folded_exactly_is_refused():
    with pytest.raises(ValueError, match="activation_fn='geglu'"):
        dit_config(tiny_dit(activation_fn="geglu"), None, timestep=50)
    with pytest.raises(ValueError, match="interpolation_scale=2"):
        dit_config(tiny_dit(Transformer2DModel, sample_size=128), None, timestep=50)
