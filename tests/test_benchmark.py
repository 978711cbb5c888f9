import json
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# The folder above `scripts`, as scripts/benchmark.py does it.
sys.path.append(str(ROOT))

from scripts.benchmarks import backbone, encoder, evaluation, precision  # noqa: E402
from scripts.benchmarks.measure import HEADER, Pair, Row, Settings, as_json, markdown, measure  # noqa: E402


@pytest.fixture
def tiny_sizes(monkeypatch):
    backbone.random_dit.cache_clear()
    monkeypatch.setattr(backbone, "DIT_SIZES", {"S/2": (2, 8, 3)})
    monkeypatch.setattr(precision, "DIT_SIZES", {"B/2": (2, 8, 3)})
    monkeypatch.setattr(precision, "DETECTOR_RUNS", {"small, 320 px": (64, 2, 2)})
    monkeypatch.setattr(evaluation, "NUM_CLASSES", 3)
    yield
    backbone.random_dit.cache_clear()


@pytest.mark.slow
def test_every_row_of_the_backbone_and_of_bf16_runs(tiny_sizes):
    settings = Settings(repeats=1)
    rows = [row for group in (backbone, precision) for row in group.rows(settings) if "load" not in row.name]
    results = [measure(row, settings) for row in rows if "batch 8" not in row.name]
    assert len(results) == 8
    for result in results:
        assert result.repeats == 1
        assert result.ours.wall_ms > 0 and result.theirs.wall_ms > 0
        assert result.ours.flops > 0 and result.theirs.flops > 0


def test_the_same_blocks_have_the_same_products_and_fewer_weights(tiny_sizes):
    row = next(row for row in backbone.rows(Settings()) if "same blocks" in row.name)
    result = measure(row, Settings(repeats=1))
    # adaLN's own products, one row per image, are all that is saved.
    assert 0.8 < result.ours.flops / result.theirs.flops < 1
    assert result.ours.parameters < result.theirs.parameters


def test_the_two_sides_of_the_evaluation_give_the_same_numbers(tiny_sizes):
    pair = evaluation.coco_map(num_images=12)
    assert 0 < pair.ours()["map"] < 1
    assert pair.theirs()["map"] == pytest.approx(pair.ours()["map"], abs=1e-12)


@pytest.mark.slow
def test_the_trainer_keeps_no_more_for_more_anchors():
    more, fewer = evaluation.kept_by_trainer("cpu").kept_bytes
    assert more == fewer > 0


def test_the_encoder_row_compares_equal_results(monkeypatch):
    pixels = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: pixels(1, 3, 32, 32, **options))
    pair = encoder.encode("TAESD", "fp32", "cpu")
    assert pair.ours().shape == (1, 4, 4, 4)
    torch.testing.assert_close(pair.ours(), pair.theirs(), atol=1e-5, rtol=0)


def test_a_difference_between_the_sides_stops_the_run():
    with pytest.raises(RuntimeError, match="differ"):
        backbone.check_equal(torch.ones(3), torch.tensor([1.0, 1.0, 1.1]))
    with pytest.raises(RuntimeError, match="differ"):
        backbone.check_equal(torch.full((3,), torch.nan), torch.ones(3))


def test_sides_run_in_turn_and_the_table_says_what_was_measured():
    calls = []

    def work(name, size):
        calls.append(name)
        return torch.ones(size, size) @ torch.ones(size, size)

    pair = Pair(partial(work, "ours", 10), partial(work, "theirs", 20), parameters=(1_000_000, 2_500_000))
    settings = Settings(repeats=4)
    result = measure(Row("a row", lambda: pair, aim=1e9), settings)
    assert calls[-8:] == ["ours", "theirs"] * 4
    assert (result.ours.flops, result.theirs.flops) == (2 * 10**3, 2 * 20**3)
    assert result.met is False

    line = markdown(result)
    assert line.startswith("| a row | ") and "1.0 / 2.5" in line and "**missed**" in line
    assert len({text.count("|") for text in [line, *HEADER.splitlines()]}) == 1
    table = json.loads(json.dumps(as_json([result], settings)))
    assert table["rows"][0]["ours"]["parameters"] == 1_000_000
    assert {"cpu", "cores", "threads", "torch"} <= table["machine"].keys()


@pytest.mark.slow
def test_the_script_prints_and_saves_the_table(monkeypatch, capsys, tmp_path):
    table = tmp_path / "table.json"
    script = str(ROOT / "scripts" / "benchmark.py")
    monkeypatch.setattr(sys, "argv", [script, "--only", "matrix", "--repeats", "1", "--quick", "--json", str(table)])
    monkeypatch.setattr(sys, "path", ["the script's folder", *sys.path])
    runpy.run_path(script, run_name="__main__")
    output = capsys.readouterr()
    printed = output.out.splitlines()
    assert printed[0].startswith("cpu: ") and printed[2:4] == HEADER.splitlines()
    assert [row["name"] in printed[4] for row in json.loads(table.read_text())["rows"]] == [True]
    assert "1/1" in output.err


def test_a_name_that_no_row_has_is_refused(monkeypatch, capsys):
    script = str(ROOT / "scripts" / "benchmark.py")
    monkeypatch.setattr(sys, "argv", [script, "--only", "no such row"])
    monkeypatch.setattr(sys, "path", ["the script's folder", *sys.path])
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name="__main__")
    assert "--only no such row: no row" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [script, "--repeats", "0"])
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name="__main__")
    assert "--repeats 0 must be 1 or more" in capsys.readouterr().err
