"""Weights that are spread over processes: the same training as without, checkpoints that fit any number of them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, merge_fsdp_weights
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from test_processes import in_processes, sparse_rows
from tiny_training import LATENTS

from dit_detection import DetectionTrainer, DetectionTrainingArguments, DiTForObjectDetection
from dit_detection.commands.train import main
from dit_detection.training.checkpoint_files import last_whole_checkpoint
from dit_detection.training.sharded import blocks_of

pytestmark = pytest.mark.forks

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "scripts" / "accelerate_configs"
JOB = ["--random_dit", "tiny", "--image_size", "64", "--bf16", "False", "--disable_tqdm", "True", "--use_cpu"]
JOB += ["--max_steps", "20", "--logging_strategy", "steps", "--logging_steps", "1", "--learning_rate", "1e-3"]
JOB += ["--eval_strategy", "no", "--load_best_model_at_end", "False", "--save_total_limit", "9"]
SAVE = ["--save_strategy", "steps", "--save_steps", "10"]
BEST = ["--eval_strategy", "steps", "--eval_steps", "10", "--load_best_model_at_end", "True"]


# the configs


def launch_arguments(config: str, *options: str) -> Any:
    """What `accelerate launch` makes of a config."""
    parser = launch_command_parser()
    return _validate_launch_command(
        parser.parse_args(["--config_file", str(CONFIGS / config), *options, "scripts/train.py"])
    )[0]


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.iterdir()))
def test_accelerate_knows_every_key_of_a_config(name) -> None:
    fields = yaml.safe_load((CONFIGS / name).read_text())
    config = load_config_from_file(str(CONFIGS / name))  # fails on top-level keys that it does not know
    launched = launch_arguments(name)
    assert launched.num_processes == config.num_processes == 8 * config.num_machines
    assert launched.mixed_precision == "bf16"
    known = vars(launch_command_parser().parse_args(["scripts/train.py"]))
    for section in ("fsdp_config", "deepspeed_config"):
        for key, value in fields.get(section, {}).items():
            assert key in known  # of others accelerate makes attributes, too, and does not look at them
            assert str(getattr(launched, key)).lower() == str(value).lower()


def test_a_misspelt_key_is_refused(tmp_path) -> None:
    assert "fsdp_reshard_after_foward" not in vars(launch_command_parser().parse_args(["scripts/train.py"]))
    (tmp_path / "config.yaml").write_text((CONFIGS / "fsdp2.yaml").read_text().replace("num_machines", "num_machine"))
    with pytest.raises(ValueError, match="num_machine"):
        load_config_from_file(str(tmp_path / "config.yaml"))


def test_blocks_are_those_that_the_model_has(tiny_model) -> None:
    assert blocks_of(tiny_model()) == ["DiTLayer", "PatchEmbedding"]
    assert blocks_of(tiny_model(**LATENTS)) == ["DiTLayer", "LatentEncoder", "PatchEmbedding"]


def test_fsdp_that_accelerate_would_leave_out_is_refused(tiny_model, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="accelerate shards nothing on cpu"):
        DetectionTrainer(
            tiny_model(), DetectionTrainingArguments(str(tmp_path), use_cpu=True), processing_class=SimpleNamespace()
        )


# training


def train(argv: list[str], environment: dict[str, str]) -> None:
    """`scripts/train.py` in one of several processes, as `accelerate launch` would start it."""
    os.environ |= environment
    torch.set_num_threads(1)
    begin = AcceleratorState.__init__

    def begin_sharded(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        # On CPUs accelerate (1.15) takes DDP in the place of FSDP. What it does for GPUs is done here; what shards,
        # saves and loads is its own code and torch's, over gloo.
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin = fsdp_plugin
        if getattr(self, "fsdp_plugin", None) is not None:  # each time: beginning anew forgets it
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = begin_sharded  # type: ignore[method-assign]
    main(argv)


def run(folder: Path, name: str, number: int, is_sharded: bool, *options: str, precision: str = "no") -> Path:
    """Train in several processes, steps of 8 images; returns the output folder."""
    output = ["--dataset", str(folder / "data"), "--output_dir", str(folder / name)]
    sizes = ["--per_device_train_batch_size", str(8 // number)]
    environment = {"ACCELERATE_MIXED_PRECISION": precision}
    if is_sharded:
        launched = launch_arguments("fsdp2.yaml", "--mixed_precision", precision, "--dynamo_backend", "no")
        launched_with = prepare_multi_gpu_env(launched)
        environment |= {key: launched_with[key] for key in launched_with if key.startswith(("FSDP_", "ACCELERATE_"))}
        assert environment["ACCELERATE_USE_FSDP"] == "true"
    in_processes(number, train, [*JOB, *output, *sizes, *options], environment)
    return folder / name


def losses_of(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a data set that has images without objects, and fewer than whole steps."""
    folder = tmp_path_factory.mktemp("sharded")
    rows = {
        split: sparse_rows(number, seed) for seed, (split, number) in enumerate([("train", 21), ("validation", 3)])
    }
    datasets.DatasetDict(rows).save_to_disk(str(folder / "data"))
    return folder


@pytest.fixture(scope="module")
def sharded(folder) -> Path:
    """A run with shards in checkpoints 10 and 20, that ends with the best one."""
    return run(folder, "sharded", 2, True, *SAVE, *BEST)


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """The same run with whole weights in each process."""
    return run(folder, "whole", 2, False, *SAVE, *BEST)


@pytest.mark.slow
def test_sharded_weights_train_to_the_same_losses(sharded, whole) -> None:
    expected = losses_of(whole)
    assert len(expected) == 20
    assert losses_of(sharded) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_with_a_frozen_prefix_too(folder) -> None:
    freeze = ["--freeze_layers", "1", "--save_strategy", "no"]
    expected = losses_of(run(folder, "whole-frozen", 2, False, *freeze, "--gradient_checkpointing", "True"))
    assert len(expected) == 20
    frozen = run(folder, "sharded-frozen", 2, True, *freeze)  # whose config recomputes activations, too
    assert losses_of(frozen) == pytest.approx(expected, abs=1e-4)
    before, after = load_file(folder / "whole-frozen" / "model.safetensors"), load_file(frozen / "model.safetensors")
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_bf16_is_that_of_a_run_that_is_not_sharded(folder, whole) -> None:
    # accelerate's own policy would round boxes, and all else that goes in and out, to 8 bits. Two steps, the first of
    # which has a learning rate of 0: later on rounding to bf16 makes small differences large.
    options = ["--bf16", "True", "--max_steps", "2", "--save_strategy", "no"]
    expected = run(folder, "whole-bf16", 2, False, *options, precision="bf16")
    found = run(folder, "sharded-bf16", 2, True, *options, precision="bf16")
    assert losses_of(found) == pytest.approx(losses_of(expected), rel=1e-5)
    assert losses_of(found)[0] != pytest.approx(losses_of(whole)[0], rel=1e-5)  # which is in float32


@pytest.mark.slow
def test_averages_of_sharded_weights_are_refused(folder) -> None:
    with pytest.raises(AssertionError, match="ema_decay needs whole weights"):
        run(folder, "ema", 1, True, "--ema_decay", "0.99", "--save_strategy", "no")


def outputs_of(folder: Path) -> torch.Tensor:
    model = DiTForObjectDetection.from_pretrained(folder)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(pixel_values=pixels).logits


@pytest.mark.slow
def test_what_a_sharded_run_leaves_is_what_any_run_leaves(sharded, whole) -> None:
    for part in (".", "checkpoint-10", "checkpoint-20"):
        assert (sharded / part / "config.json").read_text() == (whole / part / "config.json").read_text()
        # No code of torch beside that of the model.
        code = {path.name for path in (whole / part).glob("*.py")}
        assert {path.name for path in (sharded / part).glob("*.py")} == code != set()
        torch.testing.assert_close(outputs_of(sharded / part), outputs_of(whole / part), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_merged_shards_are_the_model(sharded, tmp_path) -> None:
    checkpoint = sharded / "checkpoint-10"
    assert len(list((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), str(tmp_path))
    merged, saved = load_file(tmp_path / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert merged.keys() == saved.keys()
    assert all(torch.equal(merged[name], saved[name]) for name in saved)
    shutil.copy(checkpoint / "config.json", tmp_path)
    assert torch.equal(outputs_of(tmp_path), outputs_of(checkpoint))


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 4])
def test_goes_on_with_another_number_of_processes(folder, sharded, number) -> None:
    # And from the checkpoint before the last one, of which a shard is damaged.
    resumed = folder / f"resumed-{number}"
    for step in (10, 20):
        shutil.copytree(sharded / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
    shard = resumed / "checkpoint-20" / "pytorch_model_fsdp_0" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert last_whole_checkpoint(resumed) == resumed / "checkpoint-10"
    begun = (resumed / "checkpoint-10" / "trainer_state.json").stat().st_mtime_ns
    run(folder, resumed.name, number, True, *SAVE, *BEST, "--resume_from_checkpoint", "last")
    assert losses_of(resumed) == pytest.approx(losses_of(sharded), abs=1e-4)
    assert (resumed / "checkpoint-10" / "trainer_state.json").stat().st_mtime_ns == begun  # not trained anew
    assert len(list((resumed / "checkpoint-20" / "optimizer_0").glob("*.distcp"))) == number
    torch.testing.assert_close(outputs_of(resumed), outputs_of(sharded), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_deepspeed_trains_to_the_same_losses(folder, whole) -> None:
    pytest.importorskip("deepspeed")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no"]
    launcher += ["--config_file", str(CONFIGS / "deepspeed_zero3.yaml"), "--num_processes", "2"]
    launcher += ["--main_process_port", "0", str(ROOT / "scripts" / "train.py")]
    job = [*JOB, *SAVE, *BEST, "--dataset", str(folder / "data"), "--output_dir", str(folder / "zero3")]
    finished = subprocess.run(
        [*launcher, *job, "--per_device_train_batch_size", "4"],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert losses_of(folder / "zero3") == pytest.approx(losses_of(whole), abs=1e-4)
    torch.testing.assert_close(outputs_of(folder / "zero3"), outputs_of(whole), rtol=1e-3, atol=1e-4)
