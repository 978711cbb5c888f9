"""Pushing and pulling with the real `huggingface_hub`, over a local server that speaks the Hub's HTTP API."""

import hashlib
import os
import pickle
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_server import Cut
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from huggingface_hub.utils import _http
from transformers import AutoImageProcessor, AutoModelForObjectDetection

import dit_detection
from dit_detection import (
    DetectionTrainer,
    DetectionTrainingArguments,
    DiTDetectionImageProcessor,
    DiTForObjectDetection,
)
from dit_detection.sharing.push import push_folder, upload_plan

REPO = "someone/cells"
CODE = Path(dit_detection.__file__).parent / "model"
# What `torch.save` and others pickle; `.npy` can hold pickled objects.
PICKLED = re.compile(r"\.(bin|pt|pth|ckpt|pkl|pickle|joblib|npy|npz)$")


@pytest.fixture
def save(tiny_model, tmp_path):
    """Saves a detector whose weights depend on `version`, with what training leaves beside it."""

    def run(version=0):
        folder = tmp_path / f"detector{version}"
        model = tiny_model()
        with torch.no_grad():
            model.head.class_predictor.bias.fill_(version)
        model.save_pretrained(folder)
        DiTDetectionImageProcessor(size=64).save_pretrained(folder)
        (folder / "test_results.json").write_text(f'{{"test_map": 0.{version}}}')
        torch.save({"learning_rate": 1e-4}, folder / "training_args.bin")
        (folder / "checkpoint-10").mkdir(exist_ok=True)
        torch.save({}, folder / "checkpoint-10" / "optimizer.pt")
        return folder

    return run


@pytest.fixture
def impatient(monkeypatch):
    """The client tries five times more where a connection breaks; without its pauses of a second and longer."""
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))


def version_of(repo=REPO, **options):
    model = AutoModelForObjectDetection.from_pretrained(repo, **options)
    return model.head.class_predictor.bias.unique().item()


def digests(contents):
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def without_token(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))


@pytest.mark.parametrize("part_size", [None, 50_000])
def test_every_byte_comes_back(hub, save, part_size):
    hub.part_size = part_size
    folder = save()
    push_folder(folder, REPO)
    sent = {
        name: source if isinstance(source, bytes) else source.read_bytes()
        for name, source in upload_plan(folder, repo_id=REPO).items()
    }
    assert sent["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    pulled = Path(snapshot_download(REPO))
    received = {path.relative_to(pulled).as_posix(): path.read_bytes() for path in pulled.rglob("*") if path.is_file()}
    del received[".gitattributes"]
    assert digests(received) == digests(sent)
    parts = [request for request in hub.requests if re.fullmatch(r"PUT /uploads/\w+/\d+", request)]
    assert len(parts) == (0 if part_size is None else -(-len(sent["model.safetensors"]) // part_size))


def assert_nothing_pickled(hub, repo):
    """Not by name, and not by how pickles and `torch.save`'s archives begin."""
    commits = list(hub.repositories[repo].commits.values())[1:]  # the first is the Hub's own
    for files in commits:
        assert not [name for name in files if PICKLED.search(name) or "checkpoint" in name]
        assert not [name for name, content in files.items() if content.startswith((b"PK", b"\x80"))]
    assert "model.safetensors" in commits[-1]
    assert not [content for content in hub.large_files.values() if content.startswith((b"PK", b"\x80"))]


def test_folder_model_and_image_processor_push_nothing_pickled(hub, save, tiny_model):
    folder = save(1)
    assert (folder / "training_args.bin").read_bytes().startswith(b"PK")
    push_folder(folder, REPO)
    assert_nothing_pickled(hub, REPO)
    tiny_model().push_to_hub("someone/model")
    DiTDetectionImageProcessor(size=64).push_to_hub("someone/model")
    assert_nothing_pickled(hub, "someone/model")
    AutoModelForObjectDetection.from_pretrained("someone/model")
    AutoImageProcessor.from_pretrained("someone/model")
    pushed = {name: content for name, content in hub.files("someone/model").items() if name.endswith(".py")}
    assert pushed == {path.name: path.read_bytes() for path in CODE.glob("*.py") if path.name != "__init__.py"}


@pytest.mark.parametrize("every_save", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_trainer_pushes_nothing_pickled(hub, tiny_model, tmp_path, every_save):
    labels = {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    arguments = DetectionTrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        push_to_hub=every_save,
        hub_model_id=REPO,
        hub_always_push=True,
        eval_strategy="no",
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = DetectionTrainer(
        tiny_model(),
        arguments,
        processing_class=DiTDetectionImageProcessor(size=64),
        train_dataset=[{"pixel_values": torch.zeros(3, 64, 64), "labels": labels}] * 2,
    )
    trainer.train()
    trainer.push_to_hub()
    assert (tmp_path / "run" / "training_args.bin").is_file()
    assert_nothing_pickled(hub, REPO)
    titles = list(hub.repositories[REPO].titles.values())
    assert titles[-1] == "End of training"
    assert [title for title in titles if "in progress" in title] == (
        ["Training in progress, step 1", "Training in progress, step 2"] if every_save else []
    )
    pulled = AutoModelForObjectDetection.from_pretrained(REPO).state_dict()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(pulled[name], tensor), name


def test_a_wrong_token_is_told_and_makes_nothing(hub, save, monkeypatch, tmp_path):
    folder = save()
    with pytest.raises(PermissionError, match="token"):
        push_folder(folder, REPO, token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()
    without_token(monkeypatch, tmp_path)
    requests = len(hub.requests)
    with pytest.raises(PermissionError, match="hf auth login"):
        push_folder(folder, REPO)
    assert len(hub.requests) == requests
    assert not hub.repositories


def test_a_token_without_write_right_is_told_and_changes_nothing(hub, save):
    folder = save()
    with pytest.raises(PermissionError, match="write"):
        push_folder(folder, REPO, token=hub.READ)
    assert not hub.repositories
    push_folder(folder, REPO)
    before = dict(hub.repositories[REPO].branches)
    for token in (hub.READ, hub.OTHER):
        with pytest.raises(PermissionError, match="write"):
            push_folder(save(1), REPO, token=token)
    assert hub.repositories[REPO].branches == before


@pytest.mark.parametrize("where", ["PUT /uploads", "POST .*/objects/batch", "POST .*/commit/"])
def test_a_push_cut_in_the_middle_leaves_the_earlier_revision_whole(hub, save, impatient, where):
    push_folder(save(1), REPO)
    first = hub.repositories[REPO].branches["main"]
    hub.cuts.append(Cut(where, times=99))
    with pytest.raises(ConnectionError, match=REPO):
        push_folder(save(2), REPO)
    assert hub.repositories[REPO].branches == {"main": first}
    assert version_of() == 1
    hub.cuts.clear()
    push_folder(save(3), REPO)
    assert version_of() == 3
    assert version_of(revision=first) == 1


def test_a_push_whose_last_answer_is_lost_can_be_repeated(hub, save):
    push_folder(save(1), REPO)
    hub.cuts.append(Cut("POST .*/commit/", answered=True))
    with pytest.raises(ConnectionError, match="push again"):
        push_folder(save(2), REPO)
    commits = len(hub.repositories[REPO].commits)
    commit = push_folder(save(2), REPO)
    assert commit.oid == hub.repositories[REPO].branches["main"]
    assert len(hub.repositories[REPO].commits) == commits
    assert version_of() == 2


@pytest.mark.parametrize("answered", [False, True])
def test_a_short_break_of_an_upload_is_survived(hub, save, impatient, answered):
    hub.cuts.append(Cut("PUT /uploads", times=2, answered=answered))
    push_folder(save(1), REPO)
    assert len([request for request in hub.requests if request.startswith("PUT /uploads")]) == 3
    assert version_of() == 1


@pytest.mark.slow
def test_a_download_cut_in_the_middle_goes_on_where_it_stopped(hub, save, impatient, monkeypatch):
    folder = save(1)
    push_folder(folder, REPO)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what is less is not kept
    hub.cuts.append(Cut("GET /large-files", times=2, answered=True))
    assert version_of() == 1
    pulled = Path(snapshot_download(REPO, allow_patterns="*.safetensors"))
    assert (pulled / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    starts = [re.search(r"bytes=(\d+)-", request) for request in hub.requests if request.startswith("GET /large")]
    assert [int(start[1]) // 10_000 for start in starts[1:]] == [13, 20]


def test_a_gated_repository_opens_to_those_let_in(hub, save):
    push_folder(save(1), REPO)
    hub.repositories[REPO].gated = True
    with pytest.raises(OSError, match="gated"):
        version_of(token=hub.OTHER)
    with pytest.raises(GatedRepoError):
        snapshot_download(REPO, token=hub.OTHER)
    hub.readers.add("other")
    assert version_of(token=hub.OTHER) == 1


def test_a_private_repository_is_not_there_for_strangers(hub, save, monkeypatch, tmp_path):
    push_folder(save(1), REPO, private=True)
    assert hub.repositories[REPO].private
    assert version_of(token=hub.READ) == 1
    with pytest.raises(OSError, match="not a valid model identifier"):
        version_of(token=hub.OTHER, cache_dir=tmp_path / "other")
    without_token(monkeypatch, tmp_path)
    with pytest.raises(OSError, match="not a valid model identifier"):
        version_of(cache_dir=tmp_path / "none")


def test_offline_takes_what_was_pulled_before_and_says_what_was_not(hub, save, monkeypatch, tmp_path):
    push_folder(save(1), REPO)
    assert version_of() == 1
    AutoImageProcessor.from_pretrained(REPO)
    push_folder(save(2), REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert version_of() == 1
    assert AutoImageProcessor.from_pretrained(REPO).size.max_height == 64
    with pytest.raises(OSError, match=r"(?s)couldn't find them in the cached files.*offline mode"):
        version_of(cache_dir=tmp_path / "cold")
    assert not hub.requests


def test_a_pinned_revision_is_what_it_was(hub, save):
    first = push_folder(save(1), REPO, git_tag="v1").oid
    push_folder(save(2), REPO)
    push_folder(save(3), REPO, revision="next", git_tag="v3")
    pinned = {revision: version_of(revision=revision) for revision in (first, "v1", "main", "next", "v3")}
    assert pinned == {first: 1, "v1": 1, "main": 2, "next": 3, "v3": 3}
    with pytest.raises(OSError, match="v9"):
        version_of(revision="v9")
    references = HfApi().list_repo_refs(REPO)
    assert {branch.name for branch in references.branches} == {"main", "next"}
    assert {tag.name: tag.target_commit for tag in references.tags} == hub.repositories[REPO].tags
    with pytest.raises(ValueError, match="v1"):
        push_folder(save(4), REPO, git_tag="v1")
    assert version_of() == 2


class Payload:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("safe_weights", [False, True])
@pytest.mark.parametrize("trust", [None, False])
def test_pickled_weights_of_a_repository_are_never_run(hub, save, tmp_path, safe_weights, trust):
    mark = tmp_path / "was_here"
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # the trap is live
    mark.unlink()
    folder = save(1)
    push_folder(folder, REPO)
    torch.save({"weight": Payload(mark)}, folder / "pytorch_model.bin")
    api = HfApi()
    api.upload_file(path_or_fileobj=folder / "pytorch_model.bin", path_in_repo="pytorch_model.bin", repo_id=REPO)
    if safe_weights:
        assert version_of(trust_remote_code=trust) == 1
    else:
        api.delete_file("model.safetensors", REPO)
        with pytest.raises(Exception, match=r"weights_only|Unsupported|unsafe"):
            DiTForObjectDetection.from_pretrained(REPO, trust_remote_code=trust)
    assert not mark.exists()
