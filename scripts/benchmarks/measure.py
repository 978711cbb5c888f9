"""Two things timed in turn: what a row of the benchmark is, how it is measured and how it is printed."""

import ctypes
import gc
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Settings:
    """
    What the whole run shares.

    Args:
        device (`str`): `"cpu"` or `"cuda"`.
        quick (`bool`): Whether all rows must fit in ten minutes on two cores.
        repeats (`int`): Most timed calls of each side; slow rows stop at three, when their share of time is used up.
    """

    device: str = "cpu"
    quick: bool = False
    repeats: int = 20

    @property
    def seconds_per_row(self) -> float:
        """What the timed calls of one row may take together, as long as there are three of each side."""
        return 3.0 if self.quick else 60.0


@dataclass
class Pair:
    """
    The two sides of a row. Each call is one unit of work; both sides do the same one.

    Args:
        ours, theirs: Called without arguments.
        parameters (`tuple[int, int]`, *optional*): Number of weights of each side.
        kept_bytes (`tuple[int, int]`, *optional*): Shown in the place of the peak memory of a call, where that is not
            the point.
        memory, flops (`bool`): Whether the peak memory and the FLOPs of a call say something.
    """

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    parameters: tuple[int, int] | None = None
    kept_bytes: tuple[int, int] | None = None
    memory: bool = True
    flops: bool = True


@dataclass
class Row:
    """
    One line of the table.

    Args:
        name (`str`): "group: what, sizes, against what".
        build: Makes the two sides, and raises if they do not give the same. Called when the row's turn has come.
        aim (`float`, *optional*): Least ratio of their time to ours.
        memory_aim (`float`, *optional*): Least ratio of their memory to ours.
    """

    name: str
    build: Callable[[], Pair]
    aim: float | None = None
    memory_aim: float | None = None


@dataclass
class Side:
    """Median milliseconds of a call (wall; CPU over all threads), FLOPs of a call, weights, peak bytes of a call."""

    wall_ms: float
    cpu_ms: float
    flops: int
    parameters: int | None
    peak_bytes: int | None


@dataclass
class Result:
    """A measured row. Ratios are theirs / ours, medians over the pairs of calls: above 1 ours is faster."""

    name: str
    ours: Side
    theirs: Side
    ratio: float
    cpu_ratio: float
    aim: float | None
    memory_aim: float | None
    repeats: int
    device: str
    met: bool | None = field(init=False)

    def __post_init__(self) -> None:
        checks = []
        if self.aim is not None:
            # On a CPU its own time: what other programs take of a busy machine is not in it.
            ratio = self.ratio if self.device == "cuda" else self.cpu_ratio
            # "Not slower" is met within 3 %, by which two runs of the very same thing differ.
            checks.append(ratio >= (self.aim if self.aim > 1 else 0.97 * self.aim))
        if self.memory_aim is not None and self.ours.peak_bytes and self.theirs.peak_bytes:
            checks.append(self.theirs.peak_bytes / self.ours.peak_bytes >= self.memory_aim)
        self.met = all(checks) if checks else None


def measure(row: Row, settings: Settings) -> Result:
    """Build a row's two sides and time them in turn: A, B, A, B, … after the calls that count FLOPs and memory."""
    pair = row.build()
    calls = (pair.ours, pair.theirs)
    gc.collect()
    flops = [_count_flops(call) if pair.flops else 0 for call in calls]
    peaks = pair.kept_bytes or [_peak_bytes(call, settings.device) if pair.memory else None for call in calls]
    if not (pair.flops or pair.memory):
        for call in calls:
            call()
    # (wall, CPU) seconds of each side.
    times: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    start = time.perf_counter()
    while len(times[0]) < settings.repeats:
        for call, taken in zip(calls, times, strict=True):
            taken.append(_time(call, settings.device))
        if len(times[0]) >= 3 and time.perf_counter() - start > settings.seconds_per_row:
            break
    parameters = pair.parameters or (None, None)
    sides = [
        Side(
            wall_ms=1000 * statistics.median(wall for wall, _ in taken),
            cpu_ms=1000 * statistics.median(cpu for _, cpu in taken),
            flops=flops[index],
            parameters=parameters[index],
            peak_bytes=peaks[index],
        )
        for index, taken in enumerate(times)
    ]
    ratios = [
        statistics.median(theirs[clock] / max(ours[clock], 1e-9) for ours, theirs in zip(*times, strict=True))
        for clock in (0, 1)
    ]
    return Result(row.name, sides[0], sides[1], *ratios, row.aim, row.memory_aim, len(times[0]), settings.device)


def _time(call: Callable[[], Any], device: str) -> tuple[float, float]:
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    _synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _count_flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """
    What a call needs on top of what is there before it, in bytes: on a GPU the allocator's peak, on Linux the growth
    of the process's resident memory, whose peak the kernel can be asked to count anew. Elsewhere it is not known.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        call()
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not be there for the call to take
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: the peak starts again from here
    before = _resident_bytes("VmRSS")
    call()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field_name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return 1024 * int(re.findall(rf"{field_name}:\s+(\d+)", status)[0])


def count_parameters(module: nn.Module) -> int:
    """Weights of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def machine(settings: Settings) -> dict[str, Any]:
    """The machine's description, without which no figure says anything."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": [
            name
            for name, there in (
                ("AMX", torch.cpu._is_amx_tile_supported()),
                ("AVX512-BF16", torch.cpu._is_avx512_bf16_supported()),
            )
            if there
        ],
        "gpu": torch.cuda.get_device_name() if settings.device == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


COLUMNS = (
    *("row", "ours ms (CPU)", "theirs ms (CPU)", "ratio, wall", "ratio, CPU", "aim"),
    *("GFLOP ours / theirs", "M parameters", "peak MB"),
)
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def markdown(result: Result) -> str:
    """One line of the table."""
    ours, theirs = result.ours, result.theirs
    aims = [f"≥ {result.aim:g}"] if result.aim is not None else []
    aims += [f"memory ≥ {result.memory_aim:g}"] if result.memory_aim is not None else []
    verdict = {True: " met", False: " **missed**", None: ""}[result.met]
    cells = [
        result.name,
        f"{_number(ours.wall_ms)} ({_number(ours.cpu_ms)})",
        f"{_number(theirs.wall_ms)} ({_number(theirs.cpu_ms)})",
        f"{result.ratio:.2f}",
        f"{result.cpu_ratio:.2f}",
        ", ".join(aims) + verdict,
        _both(ours.flops, theirs.flops, 1e9) if ours.flops or theirs.flops else "",
        _both(ours.parameters, theirs.parameters, 1e6),
        _both(ours.peak_bytes, theirs.peak_bytes, 2**20),
    ]
    return "| " + " | ".join(cells) + " |"


def as_json(results: list[Result], settings: Settings) -> dict[str, Any]:
    """The whole table, times in milliseconds, memory in bytes."""
    return {"machine": machine(settings), "quick": settings.quick, "rows": [asdict(result) for result in results]}


def progress(text: str) -> None:
    """On stderr, so that the table alone can be redirected."""
    print(text, file=sys.stderr, flush=True)


def _both(ours: int | None, theirs: int | None, unit: float) -> str:
    if ours is None or theirs is None:
        return ""
    return f"{_number(ours / unit)} / {_number(theirs / unit)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"
