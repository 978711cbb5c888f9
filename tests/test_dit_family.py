"""Files of the original DiT code, of SiT and of REPA, against the architecture as their papers describe it."""

import gc
import math
import pickle
import random
import re
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import nn
from torch.nn import functional as F

from dit_detection import DiTForObjectDetection
from dit_detection.model.load_original import load_original

# Time as each family counts it, of timesteps from 0, clean, to 1000, noise.
TIME = {"dit": lambda step: step, "sit": lambda step: 1 - step / 1000, "repa": lambda step: step / 1000}


class ReferenceBlock(nn.Module):
    """Figure 3 of the DiT paper (arXiv 2212.09748), "DiT block with adaLN-Zero"."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attention(modulate(x, shift1, scale1))
        return x + gate2 * self.mlp["fc2"](F.gelu(self.mlp["fc1"](modulate(x, shift2, scale2)), approximate="tanh"))

    def attention(self, x):
        heads = []
        for query, key, value in zip(
            *(part.chunk(self.num_heads, dim=2) for part in self.attn["qkv"](x).chunk(3, dim=2)), strict=True
        ):
            weights = (query @ key.mT / math.sqrt(query.shape[2])).softmax(dim=2)
            heads.append(weights @ value)
        return self.attn["proj"](torch.cat(heads, dim=2))


class ReferenceDiT(nn.Module):
    """The whole network; its state dict has the names and shapes of the original code's files."""

    def __init__(self, width, num_heads, depth, patch_size, channels, grid, num_classes, projectors=(), sigma=True):
        super().__init__()
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch_size, patch_size)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, width)})
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid, width), requires_grad=False)
        self.blocks = nn.ModuleList(ReferenceBlock(width, num_heads) for _ in range(depth))
        self.final_layer = nn.ModuleDict(
            {
                "linear": nn.Linear(width, patch_size**2 * channels * (1 + sigma)),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
            }
        )
        if projectors:
            self.projectors = nn.ModuleList(
                nn.Sequential(nn.Linear(width, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, size))
                for size in projectors
            )
        torch.manual_seed(0)
        for parameter in self.parameters():  # none zero: zero gates would hide every fault
            nn.init.normal_(parameter, std=0.1 if width < 1000 else 0.02)
        for row in range(grid):
            for column in range(grid):
                for axis, place in enumerate((column, row)):
                    for index in range(width // 4):
                        angle = place / 10000 ** (index / (width // 4))
                        at = axis * width // 2 + index
                        self.pos_embed.data[0, row * grid + column, at] = math.sin(angle)
                        self.pos_embed.data[0, row * grid + column, at + width // 4] = math.cos(angle)

    @torch.no_grad()
    def forward(self, latents, time, label):
        """All hidden states, the embedding first, and for each of them what reads it next: the norm of a block."""
        x = self.x_embedder["proj"](latents).flatten(2).mT + self.pos_embed
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = torch.tensor([time], dtype=torch.float32)[:, None] * frequencies
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=1).to(latents.dtype)
        c = self.t_embedder["mlp"](sinusoid) + self.y_embedder["embedding_table"](torch.tensor([label]))
        states, normed = [x], []
        for block in self.blocks:
            normed.append(modulate(x, *block.adaLN_modulation(c)[:, None].chunk(6, dim=2)[:2]))
            x = block(x, c)
            states.append(x)
        normed.append(modulate(x, *self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, dim=2)))
        return states, normed


def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale) + shift


SMALL = {"width": 32, "num_heads": 2, "depth": 4, "patch_size": 4, "channels": 3, "grid": 5, "num_classes": 7}
# DiT-S/2, its depth, image and classes cut.
S_2 = {"width": 384, "num_heads": 6, "depth": 2, "patch_size": 2, "channels": 4, "grid": 8, "num_classes": 10}


def reference(size=SMALL, family="dit", dtype=torch.float32, **overrides):
    if family == "repa":
        overrides = {"projectors": (12, 16), "sigma": False} | overrides
    return ReferenceDiT(**(size | overrides)).to(dtype).eval()


def save(content, path):
    torch.save(content.state_dict() if isinstance(content, nn.Module) else content, path)
    return path


def tiny_vae():
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )


def load(path, family="dit", size=SMALL, **options):
    options = {"vae": tiny_vae() if size["channels"] == 4 else None, "neck_channels": 8, "head_channels": []} | options
    heads = None if size["width"] in (384, 768, 1024, 1152) else size["num_heads"]
    return DiTForObjectDetection.from_diffusers(path, family=family, num_attention_heads=heads, **options)


@torch.no_grad()
def compare(model, expected, latents, dtype):
    """The largest error over all hidden states and tapped maps, relative to each one's size in float32."""
    model.model.config.output_hidden_states = True
    outputs = model.model(latents=latents)
    states, normed = expected
    taps = model.config.out_indices
    pairs = list(zip(outputs.hidden_states, states[: taps[-1] + 2], strict=True))
    maps = outputs.feature_maps.unbind(1)
    pairs += [(ours.flatten(2).mT, normed[tap + 1]) for ours, tap in zip(maps, taps, strict=True)]
    assert len(pairs) > 3
    return max(
        float((ours - theirs).abs().max() / (1 if dtype == torch.float64 else theirs.abs().max()))
        for ours, theirs in pairs
    )


ALL_TIMES = [(0, None), (50, 3), (613, None), (999, 0)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("size", "times"), [(SMALL, ALL_TIMES), (S_2, [(50, None)])], ids=["small", "S/2"])
@pytest.mark.parametrize("family", ["dit", "sit", "repa"])
def test_every_hidden_state_equals_the_papers_block(tmp_path, family, size, times, dtype):
    dit = reference(size, family, dtype)
    path = save(dit, tmp_path / "dit.pt")
    side = size["grid"] * size["patch_size"]
    latents = torch.randn(2, size["channels"], side, side, dtype=dtype)
    for timestep, condition in times:
        model = load(path, family, size, timestep=timestep, condition=condition, out_indices=[0, -1])
        assert model.dtype == dtype
        label = size["num_classes"] if condition is None else condition
        expected = dit(latents, TIME[family](timestep), label)
        assert compare(model, expected, latents, dtype) <= (1e-9 if dtype == torch.float64 else 1e-4)


def test_the_families_count_time_differently(tmp_path):
    path = save(reference(), tmp_path / "dit.pt")
    weights = {
        (family, step): load(path, family, timestep=step).model.backbone.layers[0].norm1.weight.detach()
        for family in TIME
        for step in (250, 750)
    }
    assert torch.equal(weights["sit", 250], weights["repa", 750])
    assert torch.equal(weights["sit", 750], weights["repa", 250])
    others = [weights["sit", 250], weights["sit", 750], weights["dit", 250], weights["dit", 750]]
    assert not any(torch.allclose(a, b, rtol=1e-3) for i, a in enumerate(others) for b in others[:i])


@pytest.mark.long
def test_the_largest_published_size(tmp_path):
    size = {**S_2, "width": 1152, "num_heads": 16, "depth": 28, "grid": 16, "num_classes": 1000}
    dit = reference(size)
    path = save(dit, tmp_path / "DiT-XL-2-256x256.pt")
    latents = torch.randn(1, 4, 32, 32)
    expected = dit(latents, 50, 1000)
    del dit
    gc.collect()
    model = load(path, size=size)
    path.unlink()
    assert (model.config.num_hidden_layers, model.config.num_attention_heads) == (18, 16)
    assert model.config.base_model == "DiT-XL-2-256x256.pt"
    assert compare(model, expected, latents, torch.float32) <= 1e-4


def test_sizes_follow_from_shapes(tmp_path):
    for sigma in (True, False):
        path = save(reference(S_2, sigma=sigma), tmp_path / "dit.pt")
        config = load_original(path, "sit").config
        assert (config.num_attention_heads, config.attention_head_dim, config.num_layers) == (6, 64, 2)
        assert (config.in_channels, config.out_channels) == (4, 8 if sigma else 4)
        assert (config.patch_size, config.sample_size, config.num_embeds_ada_norm) == (2, 16, 10)
    model = load(path, "sit", S_2)
    assert (model.config.pretrained_grid, model.config.attention_norm_eps, model.config.mlp_norm_eps) == (
        8,
        1e-6,
        1e-6,
    )


def test_the_moving_average_of_a_training_checkpoint_is_taken(tmp_path):
    ema, trained = reference(family="repa"), reference(family="repa")
    with torch.no_grad():
        trained.blocks[0].mlp["fc1"].weight.add_(1)
    checkpoint = {
        "model": trained.state_dict(),
        "ema": OrderedDict(ema.state_dict()),
        "opt": torch.optim.AdamW(trained.parameters()).state_dict(),
        "args": Namespace(model="SiT-XL/2", encoder_depth=8, qk_norm=False, resolution=256),
        "steps": 400000,
    }
    path = save(checkpoint, tmp_path / "0400000.pt")
    weight = load(path, "repa").model.backbone.layers[0].mlp.fc1.weight
    assert torch.equal(weight, ema.blocks[0].mlp["fc1"].weight)
    del checkpoint["ema"]
    weight = load(save(checkpoint, path), "repa").model.backbone.layers[0].mlp.fc1.weight
    assert torch.equal(weight, trained.blocks[0].mlp["fc1"].weight)


def test_projectors_are_dropped_of_repa_alone(tmp_path):
    path = save(reference(family="repa"), tmp_path / "repa.pt")
    load(path, "repa")
    for family in ("dit", "sit"):
        with pytest.raises(ValueError, match=r"projectors\.0\.0\.bias.*and 2 more.*family='repa'"):
            load(path, family)
    load(save(reference(), path), "repa")  # they may have been taken off already


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_the_file_is_kept(tmp_path, dtype):
    dit = reference(dtype=dtype)
    assert load(save(dit, tmp_path / "half.pt")).dtype == dtype
    dit.final_layer.float()
    model = load(save(dit, tmp_path / "mixed.pt"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_old_format_of_torch_is_read(tmp_path):
    dit = reference()
    torch.save(dit.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    weight = load(tmp_path / "old.pt").model.backbone.layers[1].mlp.fc2.weight
    assert torch.equal(weight, dit.blocks[1].mlp["fc2"].weight)


@torch.no_grad()
def test_a_saved_detector_needs_its_source_no_more(tmp_path):
    path = save(reference(), tmp_path / "SiT-XL-2-256.pt")
    model = load(str(path), "sit", id2label={0: "cell"})
    pixel_values = torch.randn(1, 3, 32, 48)
    expected = model(pixel_values)
    model.save_pretrained(tmp_path / "detector")
    path.write_bytes(bytes(path.stat().st_size))  # nothing may still be mapped from it
    again = DiTForObjectDetection.from_pretrained(tmp_path / "detector")
    assert again.config.base_model == "SiT-XL-2-256.pt"
    for outputs in (model(pixel_values), again(pixel_values)):
        assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.pred_boxes, expected.pred_boxes)


class Trap:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("is_beside_weights", [True, False])
@pytest.mark.parametrize("writer", ["zip", "old", "pickle"])
def test_nothing_in_a_file_is_executed(tmp_path, writer, is_beside_weights):
    trap = Trap(tmp_path / "sprung")
    content = {"ema": reference().state_dict(), "args": trap} if is_beside_weights else trap
    path = tmp_path / "dit.pt"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    with pytest.raises(ValueError, match=r"dit\.pt' cannot be read as weights of PyTorch \(UnpicklingError") as error:
        load(path)
    assert "weights_only" not in str(error.value)  # no advice to switch the protection off
    assert not trap.path.exists()
    if writer == "zip":  # the trap itself works
        torch.load(path, weights_only=False)
        assert trap.path.exists()


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut", random.Random(0).randbytes(1000)])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "dit.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"dit\.pt' cannot be read as weights of PyTorch \(\w+Error"):
        load(tmp_path / "dit.pt")


@pytest.mark.parametrize(
    "content",
    [{}, [torch.zeros(2)], 3, {"ema": None}, {"x_embedder.proj.weight": torch.zeros(4, dtype=torch.int8)}],
)
def test_a_file_without_a_state_dict_is_named(tmp_path, content):
    with pytest.raises(ValueError, match="must hold a state dict of floating-point tensors"):
        load(save(content, tmp_path / "dit.pt"))


def drop(*keys):
    return lambda weights: [weights.pop(key) for key in keys]


def put(**shapes):
    return lambda weights: weights.update({key: torch.zeros(shape) for key, shape in shapes.items()})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("blocks.2.attn.qkv.bias", "pos_embed"), r"lacks the weights blocks\.2\.attn\.qkv\.bias, pos_embed\."),
        (drop("y_embedder.embedding_table.weight"), "lacks the weights y_embedder"),
        (put(**{"blocks.1.attn.q_norm.weight": 16}), r"no place for: blocks\.1\.attn\.q_norm\.weight"),
        (put(**{"blocks.9.attn.proj.bias": 32}), r"lacks the weights blocks\.4.* and \d+ more"),
        (put(**{"blocks.1.mlp.fc1.weight": (96, 32)}), r"transformer_blocks\.1\.ff\.net\.0\.proj\.weight.*\(96, 32\)"),
        (put(**{"blocks.0.attn.qkv.bias": 1}), r"attn1\.to_q\.bias.*\(1,\), but \(32,\)"),
        (put(**{"x_embedder.proj.weight": (32, 48)}), r"\(32, 48\)"),
        (put(**{"t_embedder.mlp.0.weight": (32, 128)}), r"\(32, 128\), but \(32, 256\)"),
        (put(pos_embed=(1, 25, 32)), "position table 'pos_embed'"),
        (put(pos_embed=(1, 24, 32)), "position table 'pos_embed'"),
        (put(pos_embed=(25, 32)), r"\(25, 32\)"),
    ],
)
def test_weights_of_another_design_are_named(tmp_path, edit, message):
    weights = reference().state_dict()
    edit(weights)
    with pytest.raises(ValueError, match=rf"dit\.pt' cannot be read with family='dit': .*{message}"):
        load(save(weights, tmp_path / "dit.pt"))


def test_what_no_file_tells_is_asked_for(tmp_path):
    path = save(reference(), tmp_path / "dit.pt")
    with pytest.raises(ValueError, match=r"dit\.pt' is a file, and family=None.*family='dit', 'sit' or 'repa'"):
        load(path, None)
    with pytest.raises(ValueError, match="family='SiT'"):
        load(path, "SiT")
    for heads in (None, 3, 0, -2):
        with pytest.raises(ValueError, match=rf"32 wide, and num_attention_heads={heads} .*pass num_attention_heads="):
            DiTForObjectDetection.from_diffusers(path, family="dit", num_attention_heads=heads)
    path = save(reference(S_2), path)
    with pytest.raises(ValueError, match=r"no autoencoder: pass the one.*vae='stabilityai/sd-vae-ft-ema'"):
        DiTForObjectDetection.from_diffusers(path, family="dit")
    with pytest.raises(ValueError, match="vae=None is for a DiT on pixels"):
        DiTForObjectDetection.from_diffusers(path, family="dit", vae=None)


def test_family_and_heads_are_for_files_alone(tmp_path):
    dit = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=1)
    dit.save_pretrained(tmp_path / "dit")
    for source in (dit, tmp_path / "dit", tmp_path / "absent.pt"):
        for options in ({"family": "sit"}, {"num_attention_heads": 2}):
            with pytest.raises(ValueError, match=r"are for files of the original format.*is no file"):
                DiTForObjectDetection.from_diffusers(source, **options)


def test_commands_take_the_files(tmp_path, monkeypatch, capsys):
    from dit_detection.commands import convert, starting_model

    path = str(save(reference(), tmp_path / "SiT-tiny.pt"))
    overrides = '{"num_attention_heads": 2, "neck_channels": 8, "head_channels": [8]}'
    convert.main([path, str(tmp_path / "out"), "--family", "sit", "--vae", "none", "--config_overrides", overrides])
    assert "Blocks [0, 1, 2] are tapped" in capsys.readouterr().out
    model = DiTForObjectDetection.from_pretrained(tmp_path / "out")
    assert (model.config.base_model, model.config.num_attention_heads) == ("SiT-tiny.pt", 2)
    # A file of gigabytes must not be read as text to see that it is no configuration.
    monkeypatch.setattr(
        starting_model.AutoConfig, "from_pretrained", lambda source: pytest.fail("read as a configuration")
    )
    assert not starting_model._is_detector(path, None)


def test_the_names_of_the_published_files_have_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    save(reference(), Path("mine/DiT-XL-2-256x256.pt"))  # looks like a Hub id
    model = load("mine/DiT-XL-2-256x256.pt")
    assert model.config.base_model == "DiT-XL-2-256x256.pt"
    assert not re.search("mine", str(model.config))
