import json
import logging
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import tiny_training
from hub_server import Cut
from huggingface_hub import ModelCard
from tiny_training import label_fields
from transformers.utils import PushInProgress

from dit_detection.commands import train
from dit_detection.data import draw_shapes_dataset
from dit_detection.sharing.push import CODE_FOLDER

# Whole trainings: together they take longer than all the fast tests may.
pytestmark = pytest.mark.slow

REPO = "someone/cells"
CODE = {path.name for path in CODE_FOLDER.glob("*.py")} - {"__init__.py"}
DETECTOR = {"config.json", "model.safetensors", "preprocessor_config.json", ".gitattributes"} | CODE
CARD = {"README.md", "model_card.json"}


@pytest.fixture(scope="module")
def dataset():
    return draw_shapes_dataset(2, 2, 2, image_size=64)


@pytest.fixture
def make_trainer(hub, tiny_model, dataset, tmp_path):
    def make(run="my run", **arguments):
        defaults = {
            "num_train_epochs": 2,
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "hub_model_id": REPO,
        }
        model = tiny_model(**label_fields(dataset))
        return tiny_training.make_trainer(model, dataset, tmp_path / run, **(defaults | arguments))

    return make


def commits_of(repository):
    """Titles and names of the files, the oldest first, without the commit that made the repository."""
    return [(repository.titles[commit], files.keys()) for commit, files in repository.commits.items()][1:]


def test_every_save_is_pushed_with_its_card_and_no_pickles(make_trainer, hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    trainer = make_trainer(
        push_to_hub=True, hub_always_push=True, hub_private_repo=True, hub_token=hub.WRITE, hub_revision="dev"
    )
    trainer.train()
    trainer.push_to_hub()
    repository = hub.repositories[REPO]
    assert repository.private
    commits = commits_of(repository)
    titles = [title for title, _ in commits]
    assert titles == ["Training in progress, epoch 1", "Training in progress, epoch 2", "End of training"]
    assert commits[0][1] == commits[1][1] == DETECTOR | CARD
    assert hub.files(REPO).keys() == {".gitattributes"}  # main is as the Hub made it
    folder = tmp_path / "my run"
    assert commits[2][1] - {name.name for name in folder.iterdir()} == {".gitattributes"}
    assert commits[2][1] >= DETECTOR | CARD and not any(name.endswith((".bin", ".pt")) for name in commits[2][1])
    assert not list(folder.glob("push-*"))
    sent = hub.files(REPO, "dev")
    assert sent["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    card = sent["README.md"].decode()
    assert ModelCard(card).data.pipeline_tag == "object-detection" and f'"{REPO}"' in card


def test_at_the_end_alone(make_trainer, hub, tmp_path):
    trainer = make_trainer(hub_strategy="end", push_to_hub=True, hub_model_id=None, run="my-run")
    trainer.train()
    assert commits_of(hub.repositories["someone/my-run"]) == []
    push = trainer.push_to_hub("Mine", blocking=False, tags="blood", dataset_name="Shapes")
    assert isinstance(push, Future) and push.result().oid
    ((title, _),) = commits_of(hub.repositories["someone/my-run"])
    card = hub.files("someone/my-run")["README.md"].decode()
    assert title == "Mine" and "Shapes" in card and "blood" in ModelCard(card).data.tags


def test_without_push_to_hub_in_the_arguments(make_trainer, hub):
    trainer = make_trainer()
    assert hub.requests == []
    trainer.push_to_hub(private=True, revision="dev")
    assert hub.repositories[REPO].private and hub.files(REPO, "dev").keys() >= DETECTOR | CARD


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_checkpoints_are_not_for_the_hub(make_trainer, hub, strategy):
    with pytest.raises(ValueError, match=rf"hub_strategy='{strategy}'.*every_save"):
        make_trainer(push_to_hub=True, hub_strategy=strategy)
    assert hub.requests == []


def test_no_token_is_told_before_the_training(make_trainer, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    with pytest.raises(PermissionError, match="hf auth login"):
        make_trainer(push_to_hub=True)
    with pytest.raises(PermissionError, match="not accept the token"):
        make_trainer(push_to_hub=True, hub_token="hf_wrong")


def test_an_adapter_of_a_local_base_is_told_before_the_training(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.model.peft_config = {"default": SimpleNamespace(base_model_name_or_path=str(tmp_path))}
    with pytest.raises(ValueError, match="no one else can load"):
        trainer.init_hf_repo()


def test_a_push_that_fails_does_not_end_the_training(make_trainer, hub, caplog):
    trainer = make_trainer(push_to_hub=True, hub_always_push=True)
    hub.cuts.append(Cut("POST .*/commit/", times=99))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.epoch == 2
    warnings = [record.getMessage() for record in caplog.records if "was not pushed" in record.getMessage()]
    assert [message[:7] for message in warnings] == ["epoch 1", "epoch 2"]
    hub.cuts.clear()
    trainer.push_to_hub()
    assert [title for title, _ in commits_of(hub.repositories[REPO])] == ["End of training"]


def test_while_one_push_runs_the_next_waits_for_another_save(make_trainer, hub, tmp_path):
    trainer = make_trainer(push_to_hub=True)
    running: Future = Future()
    trainer.push_in_progress = PushInProgress([running])
    trainer.model.save_pretrained(tmp_path / "checkpoint-1")
    trainer.processing_class.save_pretrained(tmp_path / "checkpoint-1")
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert trainer.push_in_progress.jobs == [running]
    trainer.args.hub_always_push = True
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert len(trainer.push_in_progress.jobs) == 2
    trainer.push_in_progress.jobs[1].result()
    running.set_result(None)
    assert hub.files(REPO).keys() >= DETECTOR


def test_what_transformers_pushes_leaves_the_card_of_the_repository_alone(make_trainer, hub):
    trainer = make_trainer()
    trainer.push_to_hub()
    before = hub.files(REPO)
    trainer.model.push_to_hub(REPO)
    trainer.processing_class.push_to_hub(REPO)
    assert hub.files(REPO) == before
    trainer.model.push_to_hub("someone/other")
    trainer.processing_class.push_to_hub("someone/other")
    assert hub.files("someone/other").keys() == DETECTOR | {"README.md"}


def test_the_command_that_trains_ends_with_one_commit(hub, dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "draw_shapes_dataset", lambda **sizes: dataset)
    options = ["--random_dit", "tiny", "--image_size", "64", "--bf16", "False", "--disable_tqdm", "True"]
    options += ["--num_train_epochs", "1", "--output_dir", str(tmp_path / "out"), "--hub_strategy", "end"]
    train.main([*options, "--push_to_hub", "--hub_model_id", REPO, "--hub_private_repo", "True"])
    assert hub.repositories[REPO].private
    ((_, names),) = commits_of(hub.repositories[REPO])
    assert names >= DETECTOR | CARD | {"test_results.json", "predictions.jpg", "history.png"}
    assert not any(name.startswith(("checkpoint", "random-dit", "training_args")) for name in names)
    assert "test_map" in json.loads(hub.files(REPO)["test_results.json"])


def test_a_card_that_cannot_be_written_does_not_end_training(make_trainer, hub, monkeypatch, caplog, tmp_path):
    left_over = tmp_path / "my run" / ".push-of-a-killed-run"
    left_over.mkdir(parents=True)
    trainer = make_trainer(push_to_hub=True, hub_token=hub.WRITE)
    assert not left_over.exists()

    def fail(*args, **kwargs):
        raise OSError("photo.jpg is gone")

    monkeypatch.setattr(trainer, "create_model_card", fail)
    trainer.train()
    assert "was not pushed: photo.jpg is gone" in caplog.text


def test_the_card_takes_the_names_of_the_trainer_and_refuses_others(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.state.global_step = 1  # as if it had been trained
    trainer.create_model_card(finetuned_from="someone/dit", dataset="Cells")
    card = (tmp_path / "my run" / "README.md").read_text()
    assert "someone/dit" in card and "Cells" in card
    with pytest.raises(TypeError, match=r"no tasks\. It has: model_name, .*dataset_name"):
        trainer.create_model_card(tasks="object-detection")
