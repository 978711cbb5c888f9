import json
import os
import shutil
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from tiny_training import TrainedOn

from dit_detection import (
    DetectionAugmentation,
    DetectionDataset,
    DetectionTrainer,
    DetectionTrainingArguments,
    DiTDetectionImageProcessor,
    id2label_of,
)
from dit_detection.data import collate_detection, draw_shapes_dataset
from dit_detection.training import frozen_cache
from dit_detection.training.frozen_cache import cache_frozen, states_shape
from dit_detection.training.frozen_dataset import FrozenDataset

LATENTS = {
    "latent_encoder": {
        "_class_name": "AutoencoderTiny",
        "in_channels": 3,
        "latent_channels": 4,
        "encoder_block_out_channels": [8, 8, 8],
        "num_encoder_blocks": [1, 1, 1],
        "act_fn": "relu",
        "scaling_factor": 0.5,
    },
    "in_channels": 4,
    "patch_size": 4,
}
NUM_VIEWS = 2


@pytest.fixture(scope="module")
def rows():
    return draw_shapes_dataset(9, 4, 0, image_size=(48, 64))


@pytest.fixture
def make_model(tiny_model, rows):
    def make(num_layers=None, **overrides):
        names = id2label_of(rows)
        label2id = {name: label for label, name in names.items()}
        model = tiny_model(num_labels=5, id2label=names, label2id=label2id, **LATENTS, **overrides)
        if num_layers is None:
            return model
        model.freeze_backbone(num_layers)
        return model

    return make


def make_dataset(rows, split="train", augment=True, **arguments):
    augmentation = DetectionAugmentation() if augment else None
    arguments = {"num_views": NUM_VIEWS if augment else None, "seed": 3, **arguments}
    return DetectionDataset(rows[split], DiTDetectionImageProcessor(size=64), augmentation, **arguments)


# Taps at blocks 1 and 3 of 4: what is passed on is latents, a hidden state, a tap, a tap and a hidden state, two taps.
DEPTHS = [(None, 0), (1, 1), (2, 1), (3, 2), (4, 2)]


@pytest.mark.parametrize(("num_layers", "num_states"), DEPTHS)
def test_the_frozen_part_in_advance_gives_the_same_outputs_and_gradients(
    make_model, rows, random_labels, num_layers, num_states
):
    model = make_model(num_layers, num_hidden_layers=4, out_indices=[1, 3]).train()
    dataset = make_dataset(rows)
    batch = collate_detection([dataset[0], dataset[1]])
    encoded = model.model.encode_frozen(batch["pixel_values"])
    results = []
    for inputs in (batch, {**encoded, "labels": batch["labels"]}):
        model.zero_grad()
        outputs = model(**inputs)
        outputs.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((outputs, gradients))
    (expected, expected_gradients), (found, gradients) = results
    if num_states:
        assert encoded["frozen_states"].shape == (2, num_states, 4, 4, 32)
        assert model.config.frozen_states_shape(num_layers, 4, 4) == (num_states, 4, 4, 32)
    else:
        assert encoded["latents"].shape == (2, 4, 16, 16)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-6, rtol=1e-4)


def test_inputs_that_do_not_fit_the_model_are_refused(make_model):
    model = make_model(1)
    states = torch.zeros(1, 2, 4, 4, 32)
    with pytest.raises(ValueError, match="exactly one of pixel_values, latents and frozen_states"):
        model()
    with pytest.raises(ValueError, match="exactly one of pixel_values"):
        model(torch.zeros(1, 3, 64, 64), latents=torch.zeros(1, 4, 16, 16))
    with pytest.raises(ValueError, match="frozen_states and num_frozen_layers together"):
        model(frozen_states=states)
    with pytest.raises(ValueError, match=r"expected \(B, 1, 4, 4, 32\)"):
        model(frozen_states=states, num_frozen_layers=1)
    with pytest.raises(ValueError, match="num_frozen_layers=3"):
        model(frozen_states=torch.zeros(1, 1, 4, 4, 32), num_frozen_layers=3)


def test_nothing_frozen_is_an_error_that_names_the_remedy(tiny_model, rows):
    model = tiny_model(num_labels=5)
    with pytest.raises(ValueError, match="freeze_backbone"):
        model.model.encode_frozen(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="--freeze_layers"):
        cache_frozen(model, make_dataset(rows))


@pytest.mark.parametrize("num_layers", [None, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_entries_are_the_states_of_the_same_views(make_model, rows, tmp_path, num_layers, dtype):
    model, dataset = make_model(num_layers), make_dataset(rows)
    cached = cache_frozen(model, dataset, dtype=dtype, cache_dir=tmp_path, batch_size=4)
    assert len(cached) == len(dataset) == 9 and cached.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for epoch in (0, 1, 2):  # the third epoch shows the first view again
        cached.set_epoch(epoch)
        dataset.set_epoch(epoch)
        for index in (0, 5, 8):
            expected, found = dataset[index], cached[index]
            encoded = model.model.encode_frozen(expected["pixel_values"][None])
            name = "latents" if num_layers is None else "frozen_states"
            assert found.get("num_frozen_layers") == encoded.get("num_frozen_layers")
            assert found[name].dtype == dtype and found[name].shape == states_shape(model, dataset.image_processor)[0]
            scale = encoded[name].abs().max()
            assert (found[name].float() - encoded[name][0]).abs().max() < tolerance * scale
            assert found["labels"].keys() == expected["labels"].keys()
            for key, values in found["labels"].items():
                assert values.dtype == expected["labels"][key].dtype
                assert torch.equal(values, expected["labels"][key]), key


def test_images_without_objects_are_kept(make_model, rows, tmp_path):
    train = rows["train"].map(lambda row: {"objects": {name: [] for name in row["objects"]}})
    cached = cache_frozen(make_model(2), make_dataset({"train": train}), cache_dir=tmp_path)
    assert cached[0]["labels"]["boxes"].shape == (0, 4) and cached[0]["labels"]["class_labels"].shape == (0,)


def test_workers_see_the_epoch(make_model, rows, tmp_path):
    cached = cache_frozen(make_model(2), make_dataset(rows), cache_dir=tmp_path, num_workers=1)
    loader = torch.utils.data.DataLoader(
        cached, batch_size=9, num_workers=1, persistent_workers=True, collate_fn=collate_detection
    )
    views = []
    for epoch in (0, 1, 2):
        cached.set_epoch(epoch)
        views.append(next(iter(loader))["frozen_states"])
    assert torch.equal(views[0], views[2]) and not torch.equal(views[0], views[1])


def count_encoded(model, monkeypatch):
    """Counts the images that go through the frozen part from now on."""
    counts, encode = [], model.model.encode_frozen
    monkeypatch.setattr(model.model, "encode_frozen", lambda pixels: counts.append(len(pixels)) or encode(pixels))
    return counts


def test_a_second_run_starts_at_once_and_a_changed_setting_is_never_served_stale(
    make_model, rows, tmp_path, monkeypatch
):
    model = make_model(1)
    counts = count_encoded(model, monkeypatch)

    def run(dataset, **arguments):
        counts.clear()
        cache_frozen(model, dataset, cache_dir=tmp_path, **arguments)
        return sum(counts)

    everything = 9 * NUM_VIEWS
    assert run(make_dataset(rows)) == everything
    assert run(make_dataset(rows), batch_size=3) == 0
    with torch.no_grad():  # what is trained may change
        model.head.class_predictor.weight.add_(1)
        model.model.backbone.layers[1].mlp.fc1.weight.add_(1)
    assert run(make_dataset(rows)) == 0
    assert run(make_dataset(rows, seed=4)) == everything
    assert run(make_dataset(rows, num_views=1)) == 9
    assert run(make_dataset(rows, augment=False)) == 9
    assert run(make_dataset(rows, "validation")) == 4 * NUM_VIEWS
    assert run(make_dataset(rows), dtype=torch.bfloat16) == everything
    changed = make_dataset(rows)
    changed.augmentation.photometric = 0.1
    assert run(changed) == everything
    changed = make_dataset(rows)
    changed.image_processor.image_mean = [0.4, 0.5, 0.5]
    assert run(changed) == everything
    with torch.no_grad():
        model.model.backbone.layers[0].mlp.fc1.bias[0] += 1e-3
    assert run(make_dataset(rows)) == everything
    model.freeze_backbone(2)
    assert run(make_dataset(rows)) == everything


def test_a_file_that_changed_is_encoded_again(make_model, rows, tmp_path, monkeypatch):
    from datasets import Image

    for index, row in enumerate(rows["validation"]):
        row["image"].save(tmp_path / f"{index}.png")
    paths = [str(tmp_path / f"{index}.png") for index in range(4)]
    files = rows["validation"].remove_columns("image").add_column("image", paths).cast_column("image", Image())
    model = make_model(2)
    counts = count_encoded(model, monkeypatch)
    for touched, expected in ((False, 4), (False, 4), (True, 8)):
        if touched:
            os.utime(paths[2], ns=(1, 1))
        cache_frozen(model, make_dataset({"train": files}, augment=False), cache_dir=tmp_path / "cache")
        assert sum(counts) == expected


def test_an_interrupted_cache_goes_on_where_it_stopped(make_model, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_cache, "SHARD_BYTES", 4 * 32 * 16 * 4)  # 4 rows of one hidden state in float32
    model, encode = make_model(1), None
    encode = model.model.encode_frozen
    encoded = []

    def fail_at_the_fourth_batch(pixels):
        if len(encoded) == 3:
            raise KeyboardInterrupt
        encoded.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(model.model, "encode_frozen", fail_at_the_fourth_batch)
    with pytest.raises(KeyboardInterrupt):
        cache_frozen(model, make_dataset(rows), cache_dir=tmp_path, batch_size=3)
    assert encoded == [3, 1, 3]
    assert len(list(tmp_path.rglob("*.arrow"))) == 1 and not list(tmp_path.rglob("*unfinished*"))

    monkeypatch.setattr(model.model, "encode_frozen", encode)
    counts = count_encoded(model, monkeypatch)
    cached = cache_frozen(model, make_dataset(rows), cache_dir=tmp_path, batch_size=3)
    assert sum(counts) == 9 * NUM_VIEWS - 4
    states = [cached[index]["frozen_states"] for index in range(9)]
    for shard in sorted(tmp_path.rglob("*.arrow"))[1:3]:  # cut short, and gone
        shard.write_bytes(shard.read_bytes()[:100])
    sorted(tmp_path.rglob("*.arrow"))[2].unlink()
    counts.clear()
    again = cache_frozen(model, make_dataset(rows), cache_dir=tmp_path, batch_size=3)
    assert sum(counts) == 8
    for index in range(9):
        assert torch.equal(again[index]["frozen_states"], states[index])


def test_what_a_killed_run_has_left_goes_and_a_run_beside_loses_nothing(make_model, rows, tmp_path):
    cached = cache_frozen(make_model(2), make_dataset(rows), cache_dir=tmp_path)
    (shard,) = tmp_path.rglob("*.arrow")
    whole = shard.read_bytes()
    shard.unlink()
    leftover = shard.with_suffix(".unfinished-123456789")
    leftover.write_bytes(whole[:100])
    again = cache_frozen(make_model(2), make_dataset(rows), cache_dir=tmp_path)
    assert not leftover.exists() and torch.equal(again[3]["frozen_states"], cached[3]["frozen_states"])

    def encoded_while_another_run_is_faster():
        for row in range(len(cached)):
            entry = cached[row]
            if row == len(cached) - 1:
                shard.write_bytes(whole)
                for unfinished in shard.parent.glob("*.unfinished-*"):
                    unfinished.unlink()
            yield entry["frozen_states"], entry["labels"]

    shard.unlink()
    frozen_cache._write_shard(shard, len(cached), encoded_while_another_run_is_faster())
    assert shard.read_bytes() == whole


def test_processes_share_the_work_by_the_same_list(make_model, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_cache, "SHARD_BYTES", 4 * 32 * 16 * 4)
    model, dataset = make_model(1), make_dataset(rows)

    class Process:
        """One of two; the other one, as fast as it can be, writes its share as soon as this one lets it pass."""

        num_processes, is_local_main_process = 2, False

        def __init__(self, index):
            self.process_index = index
            self.waits = 0

        def wait_for_everyone(self):
            self.waits += 1
            if self.process_index == 1 and self.waits == 1:
                first = Process(0)
                first.waits = 1
                monkeypatch.setattr(frozen_cache, "PartialState", lambda: first)
                with pytest.raises(OSError, match="was written by another process, but is not here"):
                    cache_frozen(model, dataset, cache_dir=tmp_path)

    second = Process(1)
    monkeypatch.setattr(frozen_cache, "PartialState", lambda: second)
    cached = cache_frozen(model, dataset, cache_dir=tmp_path)
    assert second.waits == 2 and len(cached) == 9


def test_a_full_disk_is_found_before_the_work_begins(make_model, rows, tmp_path, monkeypatch):
    model = make_model(2)
    counts = count_encoded(model, monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"take 0.00 GB, but .* has 0.00 GB free.*--num_views.*--frozen_cache_dir"):
        cache_frozen(model, make_dataset(rows), cache_dir=tmp_path)
    assert not counts


def test_views_that_cannot_be_numbered_are_refused(make_model, rows, tmp_path):
    with pytest.raises(ValueError, match="give DetectionDataset num_views"):
        cache_frozen(make_model(2), make_dataset(rows, num_views=None), cache_dir=tmp_path)
    with pytest.raises(ValueError, match="not of a list"):
        cache_frozen(make_model(2), [1, 2], cache_dir=tmp_path)
    dataset = make_dataset(rows)
    dataset.image_processor = DiTDetectionImageProcessor(size={"shortest_edge": 64})
    with pytest.raises(ValueError, match=r"shortest_edge.*a fixed canvas, such as size=512"):
        cache_frozen(make_model(2), dataset, cache_dir=tmp_path)


def train_losses(model, rows, folder, **arguments):
    trainer = DetectionTrainer(
        model,
        DetectionTrainingArguments(
            str(folder / "run"),
            use_cpu=True,
            disable_tqdm=True,
            num_train_epochs=3,
            per_device_train_batch_size=4,
            logging_strategy="steps",
            logging_steps=1,
            save_strategy="no",
            load_best_model_at_end=False,
            frozen_cache_dir=str(folder),
            **{"learning_rate": 1e-3, **arguments},
        ),
        processing_class=DiTDetectionImageProcessor(size=64),
        train_dataset=make_dataset(rows),
        eval_dataset=make_dataset(rows, "validation", augment=False),
    )
    trained_on = TrainedOn()
    trainer.add_callback(trained_on)
    trainer.train()
    assert isinstance(trained_on.datasets[0], FrozenDataset) == trainer.args.cache_frozen
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return losses, [entry["eval_loss"] for entry in history if "eval_loss" in entry], trainer


@pytest.mark.parametrize(
    "num_layers", [pytest.param(None, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_training_from_the_cache_is_training_without_it(make_model, rows, tmp_path, num_layers):
    losses, eval_losses, _ = train_losses(make_model(num_layers), rows, tmp_path)
    cached_losses, cached_eval_losses, trainer = train_losses(
        make_model(num_layers), rows, tmp_path, cache_frozen=True
    )
    assert len(losses) == 9 and len(set(losses)) == 9
    # The first epoch; later, rounding has grown from step to step, on some processors beyond that.
    assert cached_losses[:3] == pytest.approx(losses[:3], abs=1e-6, rel=1e-6)
    assert cached_losses == pytest.approx(losses, rel=1e-5)
    assert cached_eval_losses == pytest.approx(eval_losses, rel=1e-5)
    # Data that come later are seen as they are.
    metrics = trainer.evaluate(make_dataset(rows, "validation", augment=False))
    assert metrics["eval_loss"] == pytest.approx(cached_eval_losses[-1], rel=1e-5)


@pytest.mark.slow
def test_each_trial_and_each_freezing_has_a_cache_of_its_own(make_model, rows, tmp_path):
    trained = []

    def model_init(trial):
        model = make_model(2)
        with torch.no_grad():  # as another timestep does
            next(model.model.backbone.parameters()).mul_(2 + len(trained))
        trained.append(model)
        return model

    arguments = DetectionTrainingArguments(
        str(tmp_path / "run"),
        use_cpu=True,
        disable_tqdm=True,
        max_steps=1,
        save_strategy="no",
        eval_strategy="no",
        load_best_model_at_end=False,
        cache_frozen=True,
        frozen_cache_dir=str(tmp_path / "cache"),
    )
    more = {"processing_class": make_dataset(rows).image_processor, "train_dataset": make_dataset(rows)}
    trainer = DetectionTrainer(args=arguments, model_init=model_init, **more)
    for _ in range(2):
        trainer.train()
        assert len(list((tmp_path / "cache").iterdir())) == len(trained) - 1
    trained_on = TrainedOn()
    trainer = DetectionTrainer(make_model(2), arguments, callbacks=[trained_on], **more)
    for num_layers in (2, 1):
        trainer.model.freeze_backbone(num_layers)
        trainer.train()
    assert [dataset.num_frozen_layers for dataset in trained_on.datasets] == [2, 1]
    assert trainer.train_dataset is more["train_dataset"]


@pytest.mark.slow
def test_training_from_the_cache_in_bf16_is_close(make_model, rows, tmp_path):
    # A rate at which rounding does not grow from step to step.
    arguments = {"bf16": True, "learning_rate": 1e-4}
    losses, _, _ = train_losses(make_model(1), rows, tmp_path, **arguments)
    cached_losses, _, _ = train_losses(make_model(1), rows, tmp_path, cache_frozen=True, **arguments)
    assert cached_losses == pytest.approx(losses, rel=1e-2)


TWO_PROCESSES = """
    import sys
    import torch
    from accelerate import PartialState
    from dit_detection import (DetectionAugmentation, DetectionDataset, DiTDetectionImageProcessor,
        DiTForObjectDetection)
    from dit_detection.data import draw_shapes_dataset
    from dit_detection.training import frozen_cache

    torch.set_num_threads(1)
    frozen_cache.SHARD_BYTES = 3 * 32 * 16 * 4
    model = DiTForObjectDetection.from_pretrained(sys.argv[1])
    model.freeze_backbone(1)
    rows = draw_shapes_dataset(9, 4, 0, image_size=(48, 64))["train"]
    dataset = DetectionDataset(rows, DiTDetectionImageProcessor(size=64), DetectionAugmentation(), num_views=2, seed=3)
    PartialState(cpu=True)
    cached = frozen_cache.cache_frozen(model, dataset, cache_dir=sys.argv[2], batch_size=2)
    if PartialState().is_main_process:
        torch.save([cached[index]["frozen_states"] for index in range(9)], sys.argv[3])
    PartialState().destroy_process_group()
"""


@pytest.mark.long
def test_two_processes_write_what_one_does(make_model, tmp_path):
    make_model(1).save_pretrained(tmp_path)
    script = tmp_path / "caching.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES))
    results = []
    for count in (1, 2):
        target = tmp_path / f"{count}.pt"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "--standalone"]
        arguments = [str(script), str(tmp_path), str(tmp_path / f"cache-{count}"), str(target)]
        subprocess.run([*launcher, *arguments], check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        results.append(torch.load(target, weights_only=True))
    assert json.dumps(sorted(path.name for path in tmp_path.glob("cache-1/*/*"))) == json.dumps(
        sorted(path.name for path in tmp_path.glob("cache-2/*/*"))
    )
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
