import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from dit_detection.sharing.push import AUTO_MAPS, CODE_FOLDER
from dit_detection.sharing.shared_files import card_files, files_left_behind, files_to_share

CODE = {path.name for path in CODE_FOLDER.glob("*.py")} - {"__init__.py"}
INDEX = "model.safetensors.index.json"
DETECTOR = {"config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.fixture
def folder(saved_detector, tmp_path):
    """A detector in a folder whose name is no easy one."""
    return shutil.copytree(saved_detector, tmp_path / "my détecteur (1)")


def names(folder, **options):
    return {path.relative_to(folder).as_posix() for path in files_to_share(folder, **options)}


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def split_weights(folder):
    """The same detector in two shards."""
    from transformers import AutoModelForObjectDetection

    model = AutoModelForObjectDetection.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink()
    return sorted(folder.glob("model-*.safetensors"))


def test_what_save_pretrained_leaves_is_shared_whole(folder):
    assert names(folder) == DETECTOR | CODE
    assert names(folder, code=False) == DETECTOR
    assert files_left_behind(folder) == {}
    assert set(files_left_behind(folder, code=False).values()) == {"code"}


def test_the_auto_maps_are_those_that_transformers_writes(folder):
    for name, auto_map in AUTO_MAPS.items():
        assert json.loads((folder / name).read_text())["auto_map"] == auto_map


def test_what_the_training_leaves_stays(folder, tmp_path):
    (folder / "README.md").write_text("![a](predictions.jpg)")
    for name in ("predictions.jpg", "model_card.json", "test_results.json", "all_results.json"):
        (folder / name).write_text("{}")
    outside = tmp_path / "secret.txt"
    outside.write_text("secret")
    files = {
        **dict.fromkeys(["training_args.bin", "optimizer.pt", "rng_state.pth", "old.pkl"], "pickled"),
        **dict.fromkeys(["events.log", "notes.py", "ema.safetensors", "unshown.png"], "not part"),
        **{"trainer_state.json": "not part", ".env": "hidden"},
    }
    folders = {"checkpoint-7": "a checkpoint", "random-dit": "not part", "__pycache__": "not part", ".cache": "hidden"}
    links = {"secret_results.json": outside, "dangling": tmp_path / "nothing"}
    for name in files:
        (folder / name).write_text("HF_TOKEN=secret")
    for name in folders:
        shutil.copytree(CODE_FOLDER, folder / name)
        (folder / name / "model.safetensors").write_text("")
    for name, target in links.items():
        (folder / name).symlink_to(target)
    with open(folder / "junk.safetensors", "wb") as junk:
        junk.truncate(1024**4)  # 1 TB, of which the disk holds nothing
    behind = files | folders | dict.fromkeys(links, "a link that leads out") | {"junk.safetensors": "not part"}
    expected = {"README.md", "predictions.jpg", "model_card.json", "test_results.json", "all_results.json"}
    assert names(folder) == DETECTOR | CODE | expected
    told = files_left_behind(folder)
    assert told.keys() == behind.keys()
    for name, reason in behind.items():
        assert told[name].startswith(reason), name


def test_links_within_the_folder_are_followed(folder):
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert "model.safetensors" in names(folder) and "weights" not in names(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "neck.py", "README.md"])
def test_a_needed_file_that_leads_out_is_refused(folder, tmp_path, name):
    (folder / "README.md").write_text("A card.")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a link that leads out"):
        files_to_share(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_folder_that_lacks_what_a_detector_needs(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no .*{name}"):
        files_to_share(folder)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        files_to_share(tmp_path / "nothing")


def test_pickled_weights_come_with_the_command_that_converts_them(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled \(pytorch_model.bin\).*save_pretrained"):
        files_to_share(folder)


@pytest.mark.parametrize("damage", [lambda data: data[:-10], lambda data: b"", lambda data: b"\xff" * 100])
def test_damaged_weights(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read as safetensors"):
        files_to_share(folder)


def test_shards_travel_with_their_index(folder):
    shards = split_weights(folder)
    assert len(shards) > 1
    expected = {"model.safetensors.index.json", *(path.name for path in shards)}
    assert names(folder) == (DETECTOR - {"model.safetensors"}) | expected | CODE


def test_one_file_goes_before_shards_as_in_from_pretrained(folder, saved_detector):
    shards = split_weights(folder)
    shutil.copy(saved_detector / "model.safetensors", folder)
    assert names(folder) == DETECTOR | CODE
    assert files_left_behind(folder).keys() == {INDEX, *(path.name for path in shards)}


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder, shard: shard.unlink(), FileNotFoundError, "lacks the weights model-00001"),
        (lambda folder, shard: save_file({"other": torch.ones(1)}, shard), ValueError, "model-00001.* lacks .*index"),
        (lambda folder, shard: rewrite(folder / INDEX, weight_map={}), ValueError, "no 'weight_map'"),
        (
            lambda folder, shard: rewrite(folder / INDEX, weight_map={"a": "../x.safetensors"}),
            ValueError,
            "of this fo",
        ),
        (lambda folder, shard: rewrite(folder / INDEX, weight_map={"a": "x.bin"}), ValueError, "no safetensors file"),
        (lambda folder, shard: (folder / INDEX).write_text("{"), ValueError, "not valid JSON"),
    ],
)
def test_damaged_shards(folder, damage, error, message):
    damage(folder, split_weights(folder)[0])
    with pytest.raises(error, match=message):
        files_to_share(folder)


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_config_that_is_no_json_object(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json"):
        files_to_share(folder)


def test_code_that_is_not_needed_stays(folder):
    (folder / "train_my_model.py").write_text("import os")
    assert "train_my_model.py" not in names(folder)


@pytest.mark.parametrize("lacking", ["modeling_dit_detection.py", "neck.py"])
def test_code_that_is_not_complete_is_no_code(folder, lacking):
    (folder / lacking).unlink()
    assert names(folder) == DETECTOR


PICTURES = """---
license: mit
---
![plain](a.png) ![title](sub/b.JPG "of all") ![](<with space.png>) ![](caf%C3%A9.webp?raw=true) ![](brackets(1).gif)
<p><img width="5" src='html.svg'></p> [no picture](notes.txt) ![web](https://example.com/x.png) ![](//cdn/x.png)
![](data:image/png;base64,AAAA)

```markdown
![in code](code.png)
```
`![in code](code.png)` <!-- ![commented](gone.png) -->
"""


def test_the_pictures_that_the_card_shows(folder):
    shown = ["a.png", "sub/b.JPG", "with space.png", "café.webp", "brackets(1).gif", "html.svg"]
    (folder / "sub").mkdir()
    for name in [*shown, "sub/other.png", "c.png"]:
        (folder / name).write_bytes(b"")
    (folder / "README.md").write_text(PICTURES, encoding="utf-8")
    assert names(folder) == DETECTOR | CODE | {"README.md", *shown}
    assert sorted(card_files(folder)) == sorted(["README.md", *shown])
    assert files_left_behind(folder).keys() == {"sub/other.png", "c.png"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("gone.png", "is not there"),
        ("../outside.png", "leads out"),
        ("/etc/hostname.png", "leads out"),
        ("linked.png", "leads out"),
        (".hidden.png", "hidden"),
        (".git/x.png", "hidden"),
        ("training_args.bin", "is no picture"),
        ("model.safetensors", "is no picture"),
        ("sub", "is no picture"),
        ("folder.png", "is not there"),
    ],
)
def test_a_card_that_shows_what_cannot_be_shared(folder, tmp_path, target, message):
    (tmp_path / "outside.png").write_bytes(b"")
    (folder / "linked.png").symlink_to(tmp_path / "outside.png")
    (folder / "training_args.bin").write_bytes(b"")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    (folder / "README.md").write_text(f"![x]({target})")
    with pytest.raises(ValueError, match=rf"README.md shows '{target}', which .*{message}"):
        files_to_share(folder)


def test_a_card_in_another_encoding(folder):
    (folder / "README.md").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"README.md is not in UTF-8"):
        files_to_share(folder)


def test_adapters(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"lora": torch.ones(1)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.bin").write_text("")
    (adapter / "README.md").write_text("")
    assert names(adapter) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    shutil.copy(folder / "preprocessor_config.json", adapter)
    assert "preprocessor_config.json" in names(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors"):
        files_to_share(adapter)
    shutil.copy(folder / "model.safetensors", adapter)
    with pytest.raises(ValueError, match="a folder of its own"):
        files_to_share(adapter)


def test_the_folder_one_stands_in(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert {os.fspath(path) for path in files_to_share(".")} == names(folder)
