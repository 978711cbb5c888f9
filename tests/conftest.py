import os

# Before anything of Hugging Face is imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch

# Tiny tensors: handing them to several threads costs more than it gives, and other processes may share the cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Tests that fork come first: what other libraries' threads hold, once there are any, is locked in a fork."""
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)


@pytest.fixture(scope="session")
def tiny_config():
    """Makes configs for 64 x 64 pixels: 2 blocks, width 32, 16-pixel patches, levels 8 to 32, 3 classes."""
    from dit_detection import DiTDetectionConfig

    def make(**overrides):
        fields = {
            "in_channels": 3,
            "patch_size": 16,
            "pretrained_grid": 4,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "neck_channels": 16,
            "strides": [8, 16, 32],
            "head_channels": [16],
            "num_labels": 3,
        }
        return DiTDetectionConfig(**(fields | overrides))

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """Makes detectors with weights that are the same every time and large enough that no fault hides in zeros."""
    from dit_detection import DiTForObjectDetection

    def make(**overrides):
        attention = overrides.pop("attn_implementation", "sdpa")
        torch.manual_seed(0)
        config = tiny_config(**overrides)
        config._attn_implementation = attention
        model = DiTForObjectDetection(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "latent_encoder" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def saved_detector(tiny_model, tmp_path_factory):
    """A folder of a detector and its image processor; only to be read."""
    from dit_detection import DiTDetectionImageProcessor

    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    DiTDetectionImageProcessor(size=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finding_detector(tiny_model, tmp_path_factory):
    """The same of a detector that finds cats, dogs and owls everywhere."""
    from dit_detection import DiTDetectionImageProcessor

    folder = tmp_path_factory.mktemp("finding")
    model = tiny_model(id2label={0: "cat", 1: "dog", 2: "owl"}, label2id={"cat": 0, "dog": 1, "owl": 2})
    with torch.no_grad():
        model.head.class_predictor.bias.zero_()  # a fresh detector scores everything near 0.01
    model.save_pretrained(folder)
    DiTDetectionImageProcessor(size=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_labels():
    """Makes labels of one image: `count` random boxes that lie inside it."""

    def make(count, seed=0, num_labels=3, **extra):
        generator = torch.Generator().manual_seed(seed)
        sides = torch.rand(count, 2, generator=generator) * 0.4 + 0.05
        centers = sides / 2 + torch.rand(count, 2, generator=generator) * (1 - sides)
        return {
            "class_labels": torch.randint(num_labels, (count,), generator=generator),
            "boxes": torch.cat([centers, sides], dim=1),
            **extra,
        }

    return make


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of this test's own, which `huggingface_hub` in this process talks to, with a write token of "someone"."""
    import huggingface_hub
    import transformers.utils.hub
    from hub_server import HubServer
    from huggingface_hub import constants

    with HubServer() as server:
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub_cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        # Made on import and on first use, with the endpoint of that time.
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        monkeypatch.setenv("HF_TOKEN", server.WRITE)
        yield server
        huggingface_hub.close_session()
