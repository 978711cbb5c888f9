import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dit_detection import DetectionDataset, collate_detection, id2label_of
from dit_detection.commands import pretrain
from dit_detection.data import draw_shapes_dataset
from dit_detection.small_dit import SMALL_DIT, size_of, write_small_dit

ROOT = Path(__file__).parents[1]
# The folder above `scripts`, as scripts/experiments.py does it.
sys.path.append(str(ROOT))

from scripts.evidence import autoencoding, running  # noqa: E402
from scripts.evidence.arms import build_detector, fingerprint_of  # noqa: E402
from scripts.evidence.baselines import DFine, RetinaNet, corner_targets, relative_targets, to_original  # noqa: E402
from scripts.evidence.evaluation import evaluate, predictor, soft_nms  # noqa: E402
from scripts.evidence.images import draw_subset, make_processor, training_images  # noqa: E402
from scripts.evidence.machine import Machine  # noqa: E402
from scripts.evidence.probing import average_precision, probe, probe_table, token_classes  # noqa: E402
from scripts.evidence.records import Records  # noqa: E402
from scripts.evidence.settings import ARMS, CANVAS, PASSES, settings_of, table_plan  # noqa: E402
from scripts.evidence.sweeps import SWEEPS, sweep_plan  # noqa: E402
from scripts.evidence.table import results_table, sweep_table  # noqa: E402
from scripts.evidence.training import rate_at, update_averages  # noqa: E402

CPU = Machine("cpu", bf16=False, num_workers=0)
WEIGHTS = {("general", "bccd"): "g" * 16, ("own", "bccd"): "o" * 16}
# Small enough for seconds; wider than high, with images that do not fill it.
TINY = {"canvas": (64, 96), "passes": 4, "batch_size": 2, "model": {"num_views": 1}}


@pytest.fixture(scope="module")
def shapes():
    return draw_shapes_dataset(num_train=30, num_validation=6, num_test=6, image_size=(40, 90))


def make_record(settings, **metrics):
    return {
        "settings": settings.to_json(),
        "metrics": {"map": 0.0, "map_50": 0.0} | metrics,
        "spent": {"passes": settings.passes, "minutes": 2.0, "cpu_minutes": 4.0},
        "hardware": {"device": "a machine", "threads": 2},
    }


def test_subsets_are_nested_and_have_every_class(shapes):
    rows = shapes["train"]
    for seed in range(4):
        subsets = [draw_subset(rows, fraction, seed) for fraction in (0.2, 0.5, 1.0)]
        ids = [set(subset["image_id"]) for subset in subsets]
        assert [len(found) for found in ids] == [6, 15, 30]
        assert ids[0] < ids[1] < ids[2]
        # Five kinds of shapes, six images.
        assert {label for objects in subsets[0]["objects"] for label in objects["category"]} == set(range(5))
        assert draw_subset(rows, 0.2, seed)["image_id"] == subsets[0]["image_id"]
    assert set(draw_subset(rows, 0.2, 0)["image_id"]) != set(draw_subset(rows, 0.2, 1)["image_id"])
    assert len(draw_subset(rows, 1e-6, 0)) == 1
    with pytest.raises(ValueError, match=r"fraction is 1\.5"):
        draw_subset(rows, 1.5, 0)


def test_the_plan_runs_a_seed_everywhere_before_the_next_and_leaves_out_what_has_no_weights():
    plan = list(table_plan({}))
    # Random init, and two baselines with two budgets each, on 3 sets, 3 fractions, 3 seeds.
    assert len(plan) == len(set(map(repr, plan))) == 5 * 27
    seeds = [settings.seed for settings in plan]
    assert seeds == [0] * 27 + [1] * 27 + [2] * 27 + [0] * 18 + [1] * 18 + [2] * 18
    assert {settings.arm for settings in plan[:9]} == {"random"}
    assert {settings.budget for settings in plan[9:27]} == {"minutes"}
    assert {settings.split for settings in plan} == {"test"}

    own = [s for s in table_plan(WEIGHTS, datasets=["bccd", "cards"], fractions=[1.0], seeds=[0]) if s.weights]
    assert [(s.arm, s.dataset, s.weights) for s in own] == [
        ("frozen", "bccd", "g" * 16),
        ("tuned", "bccd", "g" * 16),
        ("own", "bccd", "o" * 16),
    ]


def test_the_larger_budget_is_another_table(tmp_path):
    part = {"arms": ["random", "tuned"], "datasets": ["cards"], "fractions": [0.1]}
    plan = list(table_plan({("general", "cards"): "g" * 16}, **part, large=True))
    assert [(s.arm, s.seed) for s in plan] == [(arm, seed) for seed in range(3) for arm in part["arms"]]
    # Sides of 256 and 192 pixels, a third longer: 341 is not a whole number of tokens.
    assert {(s.passes, s.canvas) for s in plan} == {(2 * PASSES, (336, 256))}
    records = Records(tmp_path / "results.jsonl")
    for settings in plan:
        records.add(make_record(settings, map=0.5 if settings.arm == "tuned" else 0.3))
    records.add(make_record(settings_of("random", "cards", 0.1, 0), map=0.1))
    table = results_table(records, {}, **part, large=True)
    assert "| (a) random init, all blocks trained | 30.0 ± 0.0 (3) |" in table
    assert "| (c) against (a) random init, all blocks trained | +20.0 (3 : 0) |" in table
    assert "missing" not in table and "bccd" not in table
    assert "1 records of other" in table
    assert "| 10.0 (1) |" in results_table(records, {}, **part)


def test_records_are_found_by_their_settings_and_never_added_twice(tmp_path):
    path = tmp_path / "folder" / "results.jsonl"
    records = Records(path)
    first, second = settings_of("random", "bccd", 0.1, 0), settings_of("random", "bccd", 0.1, 1)
    records.add(make_record(first, map=0.25))
    again = Records(path)
    assert again.find(first)["metrics"]["map"] == 0.25
    assert again.find(second) is None
    # Another recipe is another run.
    assert again.find(first.with_changes({"training": {"learning_rate": 2e-3}})) is None
    with pytest.raises(ValueError, match="already"):
        again.add(make_record(first))
    assert len(path.read_text().splitlines()) == 1

    path.write_text(path.read_text() + '{"settings": {"ar')
    with pytest.raises(ValueError, match=r"results\.jsonl line 2"):
        Records(path)


def test_the_table_has_means_spreads_gains_and_what_is_missing(tmp_path):
    records = Records(tmp_path / "results.jsonl")
    scores = {
        ("random", "passes"): [0.30, 0.40, 0.38],
        ("tuned", "passes"): [0.50, 0.60],
        ("retinanet", "minutes"): [0.55, 0.35, 0.20],
    }
    for (arm, budget), values in scores.items():
        weights = "w" * 16 if arm == "tuned" else None
        for seed, value in enumerate(values):
            records.add(make_record(settings_of(arm, "bccd", 0.1, seed, budget=budget, weights=weights), map=value))
    records.add(make_record(replace(settings_of("random", "bccd", 0.1, 0), passes=8), map=1.0))
    records.add(make_record(replace(settings_of("random", "bccd", 0.1, 0), split="validation"), map=1.0))

    table = results_table(records, {})
    cells = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in table.splitlines()}
    # Mean 36, deviations -6, 4, 2: √((36 + 16 + 4) / 2) = 5.29. And 5, -5: √(50 / 1) = 7.07.
    assert "| (a) random init, all blocks trained | 36.0 ± 5.3 (3) | missing |" in table
    assert "| (c) pretrained, upper half tuned | 55.0 ± 7.1 (2) | missing |" in table
    # Seeds 0 and 1 alone: 50 - 30 and 60 - 40.
    assert cells["(c) against (a) random init, all blocks trained"][0] == "+20.0 (2 : 0)"
    # 50 - 55 and 60 - 35.
    retinanet = "(e) RetinaNet, ResNet-50 FPN, random init"
    assert cells[f"(c) against {retinanet}, same minutes"][0] == "+10.0 (1 : 1)"
    assert cells[f"(c) against {retinanet}, same image passes"][0] == "missing"
    assert "1 records of other recipes" in table
    assert "Machines: a machine, 2 threads (8 runs)." in table
    assert all(line.count("|") == 11 for line in table.splitlines() if line.startswith("|"))

    # Of another DiT: the last one, unless one is named.
    assert "Pretrained DiTs, by their fingerprints: (c) on bccd wwwwwwwwwwwwwwww." in table
    records.add(make_record(settings_of("tuned", "bccd", 0.3, 0, weights="x" * 16)))
    assert "| (c) pretrained, upper half tuned | missing | " in results_table(records, {})
    chosen = results_table(records, {("general", "bccd"): "w" * 16})
    assert "| (c) pretrained, upper half tuned | 55.0 ± 7.1 (2) | missing |" in chosen


def test_the_shipped_records_make_the_tables_of_the_readme(monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text().replace("*", "").splitlines()
    run_script(monkeypatch, "--table")
    printed = capsys.readouterr().out
    rows = printed[: printed.index("Points that")].splitlines()[4:]
    rows = [row.replace(" (3)", "") for row in rows if row]
    assert len(rows) == 8 and not set(rows) - set(readme)
    run_script(monkeypatch, "--large", "--arms", "random", "tuned", "--fractions", "0.1", "--table")
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "±" in line and line.startswith("| (a)")]
    assert row.replace(" (3)", "") in readme


def test_a_sweep_changes_one_thing_and_its_table_has_the_best_first(tmp_path):
    for name, sweep in SWEEPS.items():
        plan = list(sweep_plan(name, WEIGHTS))
        settings = [option for _, option in plan]
        assert len(set(map(repr, settings))) == len(sweep.options) > 1
        assert {option.split for option in settings} == {"validation"}
    sizes = [settings.canvas for _, settings in sweep_plan("resolution", WEIGHTS)]
    assert sizes == [(192, 256), (144, 192), (256, 336)]
    with pytest.raises(ValueError, match="--pretrained"):
        list(sweep_plan("matcher", {}))

    records, plan = Records(tmp_path / "results.jsonl"), list(sweep_plan("box_loss", WEIGHTS, seeds=(0, 1)))
    for option, settings in plan:
        if option in ("giou", "l1"):
            value = {"giou": 0.2, "l1": 0.3}[option] + settings.seed / 10
            records.add(make_record(settings, map=value, map_50=0.5))
    lines = sweep_table(records, plan).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines[:2]] == ["| l1", "| giou"]
    assert lines[0] == "| l1 | bccd 100% | 35.0 ± 7.1 (2) | 50.0 ± 0.0 (2) | 2.0 |"
    assert lines[2].endswith("| missing | missing | missing |")


def test_the_annotations_themselves_score_1_through_either_box_format(shapes):
    rows, settings = shapes["test"], replace(settings_of("retinanet", "bccd", 1.0, 0), canvas=(64, 96))
    processor = make_processor(settings)
    d_fine = DFine(5)

    def as_torchvision(batch):
        found = [target | {"scores": torch.ones(len(target["labels"]))} for target in corner_targets(batch)]
        return to_original(found, batch)

    def as_transformers(batch):
        logits, boxes = (
            torch.full((len(batch["labels"]), 10, 5), -20.0),
            torch.full((len(batch["labels"]), 10, 4), 0.5),
        )
        for index, target in enumerate(relative_targets(batch)):
            count = len(target["boxes"])
            logits[index, torch.arange(count), target["class_labels"]] = 20.0
            boxes[index, :count] = target["boxes"]
        return d_fine.post_process(SimpleNamespace(logits=logits, pred_boxes=boxes), batch)

    for predict in (as_torchvision, as_transformers):
        metrics = evaluate(predict, rows, processor)
        assert metrics["map"] == pytest.approx(1.0, abs=1e-6)
        assert metrics["mar_100"] == pytest.approx(1.0, abs=1e-6)


def test_the_evaluation_is_that_of_the_trainer(shapes, tiny_model, tmp_path):
    from dit_detection import DetectionTrainer, DetectionTrainingArguments

    rows, processor = shapes["test"], make_processor(replace(settings_of("random", "bccd", 1.0, 0), canvas=(64, 96)))
    labels = id2label_of(rows)
    names = {name: index for index, name in labels.items()}
    model = tiny_model(num_labels=5, id2label=labels, label2id=names)
    args = DetectionTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = DetectionTrainer(
        model, args, processing_class=processor, eval_dataset=DetectionDataset(rows, processor), train_dataset=None
    )
    expected = trainer.evaluate()
    found = evaluate(predictor(model, processor, {}), rows, processor)
    assert 0 < found["map"] == pytest.approx(expected["eval_map"], abs=1e-6)
    assert found["mar_100"] == pytest.approx(expected["eval_mar_100"], abs=1e-6)


def test_theirs_are_fed_the_pixels_and_boxes_of_ours(shapes):
    settings = replace(settings_of("retinanet", "bccd", 1.0, 0), canvas=(64, 96))
    batch = collate_detection([training_images(shapes["train"], settings)[index] for index in range(4)])
    seen = []
    model = RetinaNet(5).eval()
    model.model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model.predict(batch)
    assert seen[0].shape == (4, 3, 64, 96)  # not resized
    assert all(parameter.requires_grad for parameter in model.parameters())
    mean, std = torch.tensor(model.model.transform.image_mean), torch.tensor(model.model.transform.image_std)
    pixels = seen[0] * std[:, None, None] + mean[:, None, None]
    torch.testing.assert_close(pixels, (batch["pixel_values"] + 1) / 2, atol=1e-5, rtol=0)
    for labels, target in zip(batch["labels"], corner_targets(batch), strict=True):
        height, width = labels["size"].tolist()
        assert (target["boxes"][:, 0::2] <= width + 1e-3).all() and (target["boxes"][:, 1::2] <= height + 1e-3).all()
        sides = (target["boxes"][:, 2:] - target["boxes"][:, :2]) / torch.tensor([width, height])
        torch.testing.assert_close(sides, labels["boxes"][:, 2:])


def test_soft_nms_lowers_scores_and_leaves_other_classes_alone():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 10]])
    found = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.tensor([0, 0, 1])}
    result = soft_nms(found, sigma=0.5)
    # IoU of the first two is 0.5: 0.8 · exp(-0.25 / 0.5).
    torch.testing.assert_close(result["scores"], torch.tensor([0.9, 0.7, 0.8 * 0.60653066]))
    assert result["labels"].tolist() == [0, 1, 0]
    assert soft_nms({name: value[:0] for name, value in found.items()}, 0.5)["boxes"].shape == (0, 4)


def test_the_learning_rate_rises_and_ends_at_zero():
    assert [rate_at(share) for share in (0.0, 0.025, 0.05, 1.0, 1.2)] == pytest.approx([0, 0.5, 1, 0, 0])
    assert rate_at(0.525) == pytest.approx(0.5)


def test_averages_hold_weights_and_running_statistics():
    averages, model = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(2.0)
        model.num_batches_tracked.fill_(7)
    update_averages(averages, model, 0.75)
    # 0.75 · 1 + 0.25 · 3 and 0.75 · 0 + 0.25 · 2.
    assert (averages.weight.item(), averages.running_mean.item()) == (1.5, 0.5)
    assert averages.num_batches_tracked.item() == 7


def test_a_pretrained_dit_is_known_by_its_network_and_its_weights(tmp_path):
    write_small_dit(tmp_path / "dit", "tiny", 64)
    write_small_dit(tmp_path / "pipeline" / "transformer", "tiny", 64, seed=1)
    assert fingerprint_of(tmp_path / "dit") != fingerprint_of(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="NETWORK"):
        running.Runner(tmp_path, {("own", "bccd"): tmp_path / "pipeline"}, Records(tmp_path / "r.jsonl"), CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no weights"):
        fingerprint_of(tmp_path / "empty")


def test_an_arm_reads_the_features_of_its_dits_own_timestep(shapes, tmp_path):
    tuned = settings_of("tuned", "bccd", 1.0, 0)
    for settings, timestep in ((tuned, 200), (tuned.with_changes({"model": {"timestep": 50}}), 50)):
        assert build_detector(shapes["train"], settings, SMALL_DIT, tmp_path).config.timestep == timestep


@pytest.mark.slow
def test_a_dit_on_latents_is_held_against_one_on_pixels(shapes, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for index, image in enumerate(shapes["train"]["image"]):
        image.save(tmp_path / "data" / f"{index}.png")
    monkeypatch.setattr(autoencoding, "NUM_SHAPES", 20)
    before = autoencoding.train_autoencoder(tmp_path / "vae", [tmp_path / "data"], steps=1)
    after = autoencoding.train_autoencoder(tmp_path / "vae", [tmp_path / "data"], steps=40)
    assert after > before + 2
    argv = ["--vae", str(tmp_path / "vae"), "--images", str(tmp_path / "data"), "--image_size", "64"]
    argv += [
        "--objective",
        "sample",
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "2",
        "--disable_tqdm",
        "True",
    ]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    pretrain.main([*argv, "--save_samples", "False", "--save_strategy", "no", "--output_dir", str(tmp_path / "dit")])

    assert size_of(tmp_path / "dit") == "small"
    settings = replace(settings_of("frozen", "bccd", 1.0, 0), canvas=(96, 96))
    found = dict(probe(tmp_path / "dit", shapes["train"], shapes["test"], settings, [50]))
    assert len(found[50]) == 6 and min(found[50]) > 0.2
    fingerprint = fingerprint_of(tmp_path / "dit")
    with (tmp_path / "dit" / "vae" / "diffusion_pytorch_model.safetensors").open("ab") as file:
        file.write(b" ")
    assert fingerprint_of(tmp_path / "dit") != fingerprint  # the autoencoder is part of the weights


def run_script(monkeypatch, *arguments):
    script = str(ROOT / "scripts" / "experiments.py")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(sys, "path", ["the script's folder", *sys.path])
    runpy.run_path(script, run_name="__main__")


def test_what_is_there_is_not_run_again_and_a_failed_run_stops_no_other(monkeypatch, capsys, tmp_path):
    made = []

    def run(self, settings):
        made.append((settings.arm, settings.dataset, settings.seed))
        if settings.dataset == "cards":
            raise RuntimeError("no luck with cards")
        return make_record(settings, map=0.5) | {"hardware": self.machine.describe()}

    monkeypatch.setattr(running.Runner, "run", run)
    results = str(tmp_path / "results.jsonl")
    options = ["--results", results, "--fractions", "0.1", "--seeds", "0", "--arms", "random", "retinanet"]
    with pytest.raises(SystemExit, match="failed"):
        run_script(monkeypatch, *options, "--datasets", "bccd", "cards")
    # The minutes of ours on cards are not known.
    assert made == [
        *(("random", "bccd", 0), ("random", "cards", 0), ("retinanet", "bccd", 0)),
        *(("retinanet", "bccd", 0), ("retinanet", "cards", 0)),
    ]
    assert "no luck with cards" in (error := capsys.readouterr().err) and "waits" in error

    made.clear()
    run_script(monkeypatch, *options, "--datasets", "bccd")
    assert made == []
    run_script(monkeypatch, *options, "--datasets", "microcontrollers", "--minutes", "0")
    assert made == []
    run_script(monkeypatch, "--results", results, "--datasets", "bccd", "--seeds", "0", "1", "--plan")
    assert "random (passes), bccd 10%, seed 1: 2.0 min" in capsys.readouterr().out
    run_script(monkeypatch, "--results", results, "--table")
    printed = capsys.readouterr().out
    assert "50.0 (1)" in printed and "by the clock" in printed and "of the processor" in printed
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "--results", results, "--table", "--metric", "nope")
    assert "--metric nope is none of map, map_50" in capsys.readouterr().err


def test_wrong_options_are_refused(monkeypatch, capsys, tmp_path):
    for options, message in {
        ("--sweep", "matcher", "--arms", "random"): "--arms is of the table",
        ("--fractions", "10"): "--fractions 10 must lie above 0",
        ("--seeds", "-1"): "--seeds -1 must be 0 or more",
        ("--pretrained_on", "cells=x"): "must be SET=FOLDER",
        ("--pretrained", str(tmp_path / "none")): "is no folder",
        ("--pretrained", str(tmp_path)): "no weights of a DiT",
    }.items():
        with pytest.raises(SystemExit):
            run_script(monkeypatch, "--results", str(tmp_path / "results.jsonl"), *options)
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_and_is_evaluated(shapes, tmp_path, monkeypatch, arm):
    write_small_dit(tmp_path / "dit", "small", 96)
    monkeypatch.setattr(running, "load_splits", lambda folder: shapes)
    folders = {("general", "bccd"): tmp_path / "dit", ("own", "bccd"): tmp_path / "dit"}
    runner = running.Runner(tmp_path, folders, Records(tmp_path / "r.jsonl"), CPU)
    settings = next(s for s in table_plan(runner.weights, [arm], ["bccd"], [0.3], [0]) if s.budget == "passes")
    changes = TINY if arm == "frozen" else {**TINY, "model": {}}
    if arm == "d_fine":  # its queries are the best of as many cells
        changes |= {"canvas": CANVAS["bccd"]}
    record = runner.run(settings.with_changes(changes))
    assert record["spent"]["passes"] == 4 and record["spent"]["minutes"] > 0
    assert 0 <= record["metrics"]["map"] <= 1
    assert record["parameters"] > 1e6
    json.dumps(record)


@pytest.mark.slow
def test_a_baseline_stops_when_the_minutes_of_ours_are_over(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "load_splits", lambda folder: shapes)
    records = Records(tmp_path / "results.jsonl")
    runner = running.Runner(tmp_path, {}, records, CPU)
    settings = settings_of("d_fine", "bccd", 0.3, 0, budget="minutes")
    assert not runner.is_ready(settings)
    reference = make_record(settings_of("random", "bccd", 0.3, 0)) | {"hardware": runner.machine.describe()}
    reference["spent"] |= {"minutes": 7.0, "cpu_minutes": 0.05}  # the machine stood still for the rest
    records.add(reference)
    assert runner.is_ready(settings)
    spent = runner.run(settings.with_changes({"batch_size": 2}))["spent"]
    assert 0.05 <= spent["cpu_minutes"] < 1
    assert 0 < spent["passes"] < PASSES


@pytest.mark.slow
def test_runs_that_differ_in_post_processing_train_once(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "load_splits", lambda folder: shapes)
    runner = running.Runner(tmp_path, {}, Records(tmp_path / "r.jsonl"), CPU)
    trained = []
    monkeypatch.setattr(runner, "_train", lambda *args: trained.append(1) or running.Runner._train(runner, *args))
    settings = settings_of("random", "bccd", 0.3, 0).with_changes({"passes": 4, "canvas": (64, 96)})
    first = runner.run(settings)
    other = runner.run(settings.with_changes({"post": {"soft_nms_sigma": 0.5}, "split": "validation"}))
    again = runner.run(settings)
    assert len(trained) == 1
    assert first["metrics"] == again["metrics"] != other["metrics"]
    runner.run(replace(settings, seed=1))
    assert len(trained) == 2


def test_a_token_shows_the_smallest_object_around_its_centre():
    labels = {
        "size": torch.tensor([40, 64]),
        # A table of 48 x 40 pixels with a cup on it, and a fly between the tokens' centres.
        "boxes": torch.tensor([[24, 20, 48, 40], [8, 8, 12, 12], [16, 32, 3, 3]]) / torch.tensor([64, 40, 64, 40]),
        "class_labels": torch.tensor([0, 1, 2]),
    }
    for order in ([0, 1, 2], [2, 1, 0]):
        shuffled = labels | {name: labels[name][order] for name in ("boxes", "class_labels")}
        found = token_classes(shuffled, (3, 5), patch_size=16, num_labels=3)
        assert found.tolist() == [[1, 0, 0, 3, -1], [0, 0, 0, 3, -1], [-1] * 5]
    empty = {"size": labels["size"], "boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.int64)}
    assert set(token_classes(empty, (3, 5), 16, 3).flatten().tolist()) == {3, -1}


def test_average_precision_is_the_mean_precision_at_each_hit():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.rand(30, generator=generator)
        is_true = torch.rand(30, generator=generator) < 0.3
        is_true[3] = True
        ranked = [bool(hit) for _, hit in sorted(zip(scores.tolist(), is_true.tolist(), strict=True), reverse=True)]
        precisions = [sum(ranked[: rank + 1]) / (rank + 1) for rank, hit in enumerate(ranked) if hit]
        assert average_precision(scores, is_true) == pytest.approx(sum(precisions) / len(precisions))
    assert average_precision(torch.tensor([2.0, 1.0]), torch.tensor([True, False])) == 1


def test_a_probe_finds_what_random_features_show_and_is_the_same_twice(shapes, tmp_path):
    write_small_dit(tmp_path, "small", 96)
    settings = replace(settings_of("frozen", "bccd", 1.0, 0), canvas=(96, 96))
    found = dict(probe(tmp_path, shapes["train"], shapes["test"], settings, [0, 50]))
    assert {len(values) for values in found.values()} == {6}
    assert found[0] == found[50]  # random weights do not know the timestep
    # Of five classes on about half of the area: chance is 0.1.
    assert min(found[0]) > 0.2
    assert dict(probe(tmp_path, shapes["train"], shapes["test"], settings, [0])) == {0: found[0]}
    table = probe_table({"random": found})
    assert table.count("**") >= 2 and table.count("\n") == 3
