import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_server import Cut
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from dit_detection import DiTForObjectDetection, cli
from dit_detection.card.model_card import DetectionModelCardData, create_model_card
from dit_detection.commands import push
from dit_detection.sharing.push import CODE_FOLDER, push_folder, upload_plan

ROOT = Path(__file__).parents[1]
REPO = "someone/cells"
CODE = {path.name for path in CODE_FOLDER.glob("*.py")} - {"__init__.py"}
DETECTOR = {"config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.fixture
def folder(saved_detector, tmp_path):
    copy = shutil.copytree(saved_detector, tmp_path / "my detector")
    (copy / "training_args.bin").write_bytes(b"pickled")
    (copy / "checkpoint-3").mkdir()
    (copy / "checkpoint-3" / "model.safetensors").write_bytes(b"older")
    return copy


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"lora": torch.ones(1)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    return folder


def rewrite(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "gone"}))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def content(plan, name):
    return plan[name] if isinstance(plan[name], bytes) else plan[name].read_bytes()


def write_card(folder, **facts):
    config = json.loads((folder / "config.json").read_text())
    data = DetectionModelCardData(model_name="my detector", config=config, **facts)
    create_model_card(data).save(folder / "README.md")
    data.save(folder / "model_card.json")


# What is sent, without a network.


def test_files_are_sent_as_they_are_with_a_card(folder):
    plan = upload_plan(folder, repo_id=REPO)
    assert plan.keys() == DETECTOR | CODE | {"README.md"}
    assert all(plan[name] == folder / name for name in DETECTOR | CODE)
    card = ModelCard(plan["README.md"].decode())
    assert card.data.pipeline_tag == "object-detection" and card.data.library_name == "transformers"
    assert card.data.license is None and f'"{REPO}"' in card.text


def test_without_code_nothing_points_at_code(folder):
    before = contents(folder)
    plan = upload_plan(folder, code=False)
    assert plan.keys() == DETECTOR | {"README.md"}
    for name in ("config.json", "preprocessor_config.json"):
        was, sent = json.loads((folder / name).read_text()), json.loads(plan[name])
        assert was.pop("auto_map") and sent == was
    assert "trust_remote_code=True" not in plan["README.md"].decode()
    assert contents(folder) == before


@pytest.mark.parametrize(
    "lose_code",
    [
        lambda folder: [path.unlink() for path in folder.glob("*.py")],
        lambda folder: (folder / "neck.py").unlink(),
        lambda folder: [
            rewrite(folder / name, auto_map="gone") for name in ("config.json", "preprocessor_config.json")
        ],
        lambda folder: rewrite(folder / "preprocessor_config.json", auto_map="gone"),
        lambda folder: rewrite(
            folder / "config.json",
            auto_map={"AutoConfig": "other/repo--configuration_dit_detection.DiTDetectionConfig"},
        ),
    ],
)
def test_code_that_the_folder_lacks_is_the_packages(saved_detector, folder, lose_code):
    lose_code(folder)
    before = contents(folder)
    plan = upload_plan(folder)
    for name in CODE:
        assert content(plan, name) == (CODE_FOLDER / name).read_bytes()
    for name in ("config.json", "preprocessor_config.json"):
        # As transformers writes it, byte for byte.
        assert content(plan, name) == (saved_detector / name).read_bytes()
    assert contents(folder) == before


def test_an_unedited_card_is_written_again_with_the_name_of_the_repository(folder):
    write_card(folder, tags=["blood"])
    before = contents(folder)
    plan = upload_plan(folder, repo_id=REPO, tags=["blood", "cells"])
    card = plan["README.md"].decode()
    assert f'"{REPO}"' in card and '"my detector"' not in card
    assert ModelCard(card).data.tags[-2:] == ["blood", "cells"]
    (folder / "again.json").write_bytes(plan["model_card.json"])
    assert str(create_model_card(DetectionModelCardData.load(folder / "again.json"))) == card
    (folder / "again.json").unlink()
    assert contents(folder) == before


def test_an_edited_card_stays_as_it_is(folder):
    write_card(folder)
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nWritten by hand: å.\n", encoding="utf-8")
    plan = upload_plan(folder, repo_id=REPO)
    assert plan["README.md"] == folder / "README.md" and plan["model_card.json"] == folder / "model_card.json"
    tagged = upload_plan(folder, repo_id=REPO, tags=["cells"])["README.md"].decode()
    assert "Written by hand: å." in tagged and "cells" in ModelCard(tagged).data.tags


@pytest.mark.parametrize(
    "card", [None, "By hand.", "---\nlanguage: en\n---\nBy hand.", "---\nlicense: cc-by-nc-4.0\n---\n"]
)
def test_weights_of_the_published_dit_say_their_licence(folder, card):
    rewrite(folder / "config.json", base_model="facebook/DiT-XL-2-256")
    if card is not None:
        (folder / "README.md").write_text(card)
    sent = content(upload_plan(folder), "README.md").decode()
    assert ModelCard(sent).data.license == "cc-by-nc-4.0"
    assert card is None or "By hand" not in card or "By hand." in sent


def test_another_licence_for_them_is_refused(folder):
    rewrite(folder / "config.json", base_model="facebook/DiT-XL-2-256")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(ValueError, match=r"README.md says 'license: mit'.*cc-by-nc-4.0"):
        upload_plan(folder)


@pytest.mark.parametrize("front", ["license: [", "- a\n- list", "a: b: c"])
def test_front_matter_that_cannot_be_read(folder, front):
    (folder / "README.md").write_text(f"---\n{front}\n---\nText.")
    with pytest.raises(ValueError, match=r"README.md: its front matter"):
        upload_plan(folder)


def test_other_models_are_not_pushed(folder):
    rewrite(folder / "config.json", model_type="yolos")
    with pytest.raises(ValueError, match="model_type 'yolos'"):
        upload_plan(folder)


@pytest.mark.parametrize(
    "card", [None, "---\nbase_model: /home/me/base\nlibrary_name: peft\ntags: [lora]\n---\nBy peft."]
)
def test_an_adapter_names_its_base(adapter, card):
    if card is not None:
        (adapter / "README.md").write_text(card)
    plan = upload_plan(adapter, repo_id=REPO)
    assert plan.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    data = ModelCard(plan["README.md"].decode()).data
    assert (data.library_name, data.pipeline_tag) == ("peft", "object-detection")
    assert (data.base_model, data.base_model_relation) == ("someone/base", "adapter")
    assert "/home/me" not in plan["README.md"].decode()


@pytest.mark.parametrize("base", [None, "", "here", "../base", "/home/me/base", "a/b/c"])
def test_an_adapter_whose_base_is_of_this_machine(adapter, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    rewrite(adapter / "adapter_config.json", base_model_name_or_path=base, r=8)
    before = contents(adapter)
    with pytest.raises(ValueError, match="which no one else can load"):
        upload_plan(adapter)
    plan = upload_plan(adapter, base_model="someone/base")
    assert json.loads(plan["adapter_config.json"]) == {"base_model_name_or_path": "someone/base", "r": 8}
    assert ModelCard(plan["README.md"].decode()).data.base_model == "someone/base"
    assert contents(adapter) == before


def test_an_adapter_of_the_published_dit_has_its_licence(adapter):
    (adapter / "base").mkdir()
    (adapter / "base" / "config.json").write_text('{"base_model": "facebook/DiT-XL-2-512"}')
    rewrite(adapter / "adapter_config.json", base_model_name_or_path="someone/base-on-the-hub")
    plan = upload_plan(adapter)
    assert ModelCard(plan["README.md"].decode()).data.license == "cc-by-nc-4.0"
    assert not any(name.startswith("base") for name in plan)


def test_an_adapter_has_the_licence_of_the_base_that_it_names(adapter, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"base_model": "facebook/DiT-XL-2-512"}')
    rewrite(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "other"))
    plan = upload_plan(adapter, base_model="someone/base")
    assert ModelCard(plan["README.md"].decode()).data.license == "cc-by-nc-4.0"
    (adapter / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(ValueError, match="says 'license: mit'"):
        upload_plan(adapter, base_model="someone/base")


def test_results_of_other_classes_are_not_shared(folder):
    write_card(folder, metrics={"map": 0.63})
    rewrite(folder / "config.json", id2label={"0": "dog"})
    with pytest.raises(ValueError, match=r"model_card.json has other classes than config.json"):
        upload_plan(folder, repo_id=REPO)


def test_a_detector_has_no_base_to_name(folder):
    with pytest.raises(ValueError, match="is for adapters"):
        upload_plan(folder, base_model="someone/base")


# Over the wire, to a server of the test's own.


def test_one_commit_takes_everything_and_nothing_else(folder, hub):
    commit = push_folder(folder, REPO, private=True, tags=["cells"], git_tag="v1", commit_message="The first")
    repository = hub.repositories[REPO]
    assert repository.private
    assert repository.branches["main"] == repository.tags["v1"] == commit.oid
    assert repository.titles[commit.oid] == "The first"
    assert sum("/commit/" in request for request in hub.requests) == 1
    sent = hub.files(REPO)
    assert sent.keys() - {".gitattributes"} == DETECTOR | CODE | {"README.md"}
    assert sent["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert "cells" in ModelCard(sent["README.md"].decode()).data.tags


def test_a_branch_is_made_and_main_left_alone(folder, hub):
    push_folder(folder, REPO, commit_message="main")
    before = hub.files(REPO)
    rewrite(folder / "config.json", class_loss_weight=3.0)
    push_folder(folder, REPO, revision="better")
    assert hub.files(REPO) == before
    assert json.loads(hub.files(REPO, "better")["config.json"])["class_loss_weight"] == 3.0


def test_weights_of_an_earlier_push_do_not_stay_beside_new_ones(folder, adapter, hub):
    push_folder(folder, REPO)
    model = DiTForObjectDetection.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    push_folder(folder, REPO)
    weights = {name for name in hub.files(REPO) if "safetensors" in name}
    assert weights == {path.name for path in folder.glob("model*safetensors*")} and len(weights) > 2
    push_folder(adapter, REPO)
    assert {name for name in hub.files(REPO) if "safetensors" in name} == {"adapter_model.safetensors"}
    push_folder(folder, REPO)
    assert {name for name in hub.files(REPO) if "safetensors" in name} == weights
    assert "adapter_config.json" not in hub.files(REPO)


def test_the_card_of_the_repository_stays_where_the_folder_has_none(folder, hub):
    (folder / "README.md").write_text("From a folder that has one.")
    push_folder(folder, REPO)
    (folder / "README.md").unlink()
    rewrite(folder / "config.json", class_loss_weight=3.0)
    push_folder(folder, REPO)
    assert hub.files(REPO)["README.md"] == b"From a folder that has one."
    assert json.loads(hub.files(REPO)["config.json"])["class_loss_weight"] == 3.0


def test_a_public_repository_is_not_taken_for_a_private_one(folder, hub):
    push_folder(folder, REPO)
    before = hub.repositories[REPO].branches["main"]
    rewrite(folder / "config.json", class_loss_weight=3.0)
    with pytest.raises(ValueError, match="exists and is public"):
        push_folder(folder, REPO, private=True)
    assert hub.repositories[REPO].branches["main"] == before


def test_a_git_tag_is_not_moved(folder, hub):
    push_folder(folder, REPO, git_tag="v1")
    before = dict(hub.repositories[REPO].branches)
    rewrite(folder / "config.json", class_loss_weight=3.0)
    with pytest.raises(ValueError, match="a tag 'v1' already"):
        push_folder(folder, REPO, git_tag="v1")
    assert hub.repositories[REPO].branches == before


@pytest.mark.parametrize("repo_id", ["a/b/c", "a b", "", "someone/", "-x", "someone/é"])
def test_a_name_that_is_none_is_told_before_anything_is_sent(folder, hub, repo_id):
    with pytest.raises(ValueError, match="Repo id"):
        push_folder(folder, repo_id)
    with pytest.raises(SystemExit, match="Repo id"):
        push.main([str(folder), "--dry_run", "--", repo_id])
    assert hub.requests == []


def test_a_bad_folder_is_told_before_anything_is_sent(folder, hub):
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        push_folder(folder, REPO)
    assert hub.requests == []


def test_without_a_token(folder, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    with pytest.raises(PermissionError, match="hf auth login"):
        push_folder(folder, REPO)
    assert hub.requests == []


@pytest.mark.parametrize(("token", "message"), [("hf_wrong", "not accept the token"), ("READ", "may not write")])
def test_a_token_that_may_not_write(folder, hub, token, message):
    with pytest.raises(PermissionError, match=rf"(?s){message}.*hf auth login"):
        push_folder(folder, REPO, token=getattr(hub, token, token))
    assert REPO not in hub.repositories or not hub.files(REPO).keys() & DETECTOR


def test_an_upload_that_is_cut_changes_nothing_and_is_told(folder, hub):
    push_folder(folder, REPO)
    before = hub.files(REPO)
    model = DiTForObjectDetection.from_pretrained(folder)
    with torch.no_grad():
        model.head.class_predictor.bias.add_(1)
    model.save_pretrained(folder)
    hub.cuts.append(Cut("POST .*/commit/", times=99))
    with pytest.raises(ConnectionError, match="push again"):
        push_folder(folder, REPO)
    assert hub.files(REPO) == before
    hub.cuts.clear()
    push_folder(folder, REPO)
    assert hub.files(REPO)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


# The command.


def test_a_dry_run_lists_and_sends_nothing(folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://nowhere.invalid")
    (folder / "neck.py").unlink()
    assert push.main([str(folder), REPO, "--dry_run"]) is None
    told = capsys.readouterr().out
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors\n" in told and "README.md  (written for the Hub)" in told
    assert "neck.py  (from the installed package)" in told
    assert "training_args.bin: pickled" in told and "checkpoint-3: a checkpoint" in told
    plan = upload_plan(folder, repo_id=REPO)
    assert f"{sum(len(content(plan, name)) for name in plan):,}  bytes in all" in told


def test_the_command_pushes_and_says_how_it_is_loaded(folder, hub, capsys):
    arguments = [str(folder), REPO, "--private", "--revision", "dev", "--tags", "a", "b", "--git_tag", "v1"]
    commit = push.main([*arguments, "--commit_message", "Mine"])
    told = capsys.readouterr().out
    assert f"{hub.endpoint}/{REPO}" in told and commit.oid in told
    assert f'pipeline("object-detection", "{REPO}", revision="v1", trust_remote_code=True)' in told
    repository = hub.repositories[REPO]
    assert (
        repository.branches["dev"] == repository.tags["v1"] == commit.oid and repository.titles[commit.oid] == "Mine"
    )
    commit = push.main([str(folder), REPO, "--no_code"])
    assert (
        f'import dit_detection; from transformers import pipeline\ndetector = pipeline("object-detection", "{REPO}", '
    )
    assert "trust_remote_code" not in capsys.readouterr().out
    assert "auto_map" not in json.loads(hub.files(REPO)["config.json"])


@pytest.mark.parametrize("arguments", [["nothing", REPO], ["nothing", REPO, "--dry_run"]])
def test_the_command_ends_with_the_message_alone(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dit-detect", "push", *arguments])
    with pytest.raises(SystemExit, match=r"^dit-detect push: There is no folder nothing\.$"):
        cli.main()


def test_the_script_says_how_it_is_run():
    text = (ROOT / "scripts" / "push.py").read_text()
    assert text.count("scripts/push.py") == 2 and "sys.path.pop(0)" in text
