"""Where a run takes place and what it takes."""

import os
import platform
import re
import subprocess
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Machine:
    """
    What all runs share.

    Args:
        device (`str`): `"cpu"` or `"cuda"`.
        bf16 (`bool`): Whether training computes in bfloat16, ours and theirs.
        num_workers (`int`): Processes that read and augment images.
    """

    device: str
    bf16: bool
    num_workers: int

    @classmethod
    def here(cls) -> "Machine":
        """The GPU, if torch sees one; bf16 where it is faster than float32."""
        if torch.cuda.is_available():
            return cls("cuda", torch.cuda.is_bf16_supported(), min(8, os.cpu_count() or 1))
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return cls("cpu", fast, 0)  # workers would take the cores from the model

    @property
    def clock(self) -> str:
        """The field of `Spent` by which budgets count."""
        return "cpu_minutes" if self.device == "cpu" else "minutes"

    def describe(self) -> dict[str, Any]:
        """For a record: minutes compare only where this is the same."""
        if self.device == "cuda":
            name = torch.cuda.get_device_name()
        else:
            found = re.findall(r"model name\s*: (.*)", _text(Path("/proc/cpuinfo")))
            name = found[0] if found else platform.processor() or platform.machine()
        threads = torch.get_num_threads() if self.device == "cpu" else None
        return {"device": name, "threads": threads, "precision": "bfloat16" if self.bf16 else "float32"}


@dataclass(frozen=True)
class Spent:
    """What training took: image passes, minutes by the clock and of the processor (over all threads)."""

    passes: int
    minutes: float
    cpu_minutes: float

    def to_json(self) -> dict[str, Any]:
        """As it stands in a record."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


class Stopwatch:
    """Runs from the moment it is made."""

    def __init__(self) -> None:
        self._clock, self._cpu = time.perf_counter(), time.process_time()

    def spent(self, passes: int) -> Spent:
        """What these image passes took, so far."""
        minutes, cpu_minutes = time.perf_counter() - self._clock, time.process_time() - self._cpu
        return Spent(passes, minutes / 60, cpu_minutes / 60)


def versions() -> dict[str, str]:
    """Of the libraries that decide a result."""
    return {name: version(name) for name in ("torch", "torchvision", "transformers", "diffusers", "dit_detection")}


def commit() -> str:
    """The commit of the code, `+changes` if files differ from it; "unknown" outside a repository."""
    found = _git("rev-parse", "HEAD")
    return found + ("+changes" if _git("status", "--porcelain", "--", "dit_detection", "scripts") else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown" if arguments[0] == "rev-parse" else ""
    return done.stdout.strip()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
