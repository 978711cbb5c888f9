"""Records → Markdown: what was measured, with what is missing, what was lost and what it took."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from .records import Record, Records
from .settings import ARMS, DATASETS, FRACTIONS, SEEDS, Settings, table_plan

# The arm that is held against all others.
MAIN_ARM = "tuned"
BUDGETS = {"passes": "same image passes", "minutes": "same minutes"}
MISSING = "missing"

Line = tuple[str, str]  # arm, budget
Cell = tuple[str, float]  # data set, fraction
Runs = dict[tuple[Line, Cell], dict[int, Record]]  # by seed


def results_table(
    records: Records,
    weights: dict[tuple[str, str], str],
    metric: str = "map",
    *,
    arms: Sequence[str] = tuple(ARMS),
    datasets: Sequence[str] = DATASETS,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = SEEDS,
    large: bool = False,
) -> str:
    """
    The table of all arms: mean ± standard deviation over the seeds (their number), in points of a hundred; then what
    the main arm gains over each other with the same seed; then the minutes.

    Only records of the recipes as they are now count; how many others there are is said below.

    Args:
        weights (`dict`): Fingerprints of the pretrained weights by kind and data set. For an arm that has none there,
            those of the last record are taken; the table says which they are.
        metric (`str`): A metric that the records have.
        arms, datasets, fractions, seeds: Parts of the table.
        large (`bool`): With the larger budget ([`Settings.enlarged`]).
    """
    lines = [(name, budget) for name in arms for budget in (BUDGETS if ARMS[name].is_baseline else ["passes"])]
    cells = [(dataset, fraction) for dataset in datasets for fraction in fractions]
    weights = _weights_of(records, weights)
    runs = _collect(records, table_plan(weights, arms, datasets, fractions, seeds, large=large))

    scores = [
        [_title(line), *(_mean_and_spread(_values(runs, line, cell, metric)) for cell in cells)] for line in lines
    ]
    main = (MAIN_ARM, "passes")
    gains = [
        [f"{_letter(MAIN_ARM)} against {_title(line)}", *(_gain(runs, main, line, cell, metric) for cell in cells)]
        for line in lines
        if line != main
    ]
    minutes, cpu_minutes = (
        [[_title(line), *(_mean(runs.get((line, cell), {}).values(), clock) for cell in cells)] for line in lines]
        for clock in ("minutes", "cpu_minutes")
    )
    names = [f"{dataset} {fraction:.0%}" for dataset, fraction in cells]
    made = [record for by_seed in runs.values() for record in by_seed.values()]
    others = sum(record["settings"]["split"] == "test" for record in records) - len(made)
    parts = [
        f"`{metric}` in points on the test split, mean ± standard deviation over the seeds (how many):",
        markdown_table(["", *names], scores),
        f"Points that {_letter(MAIN_ARM)} is ahead, mean over the seeds that both have (seeds won : lost):",
        markdown_table(["", *names], gains),
        "Minutes of training, by the clock:",
        markdown_table(["", *names], minutes),
        "Minutes of the processor, over all threads:",
        markdown_table(["", *names], cpu_minutes),
    ]
    machines = Counter(map(_machine, made))
    if machines:
        parts.append("Machines: " + "; ".join(f"{name} ({count} runs)" for name, count in machines.items()) + ".")
    pretrained = {
        f"{_letter(settings['arm'])} on {settings['dataset']} {settings['weights']}"
        for settings in (record["settings"] for record in made)
        if settings["weights"] is not None
    }
    if pretrained:
        parts.append(f"Pretrained DiTs, by their fingerprints: {', '.join(sorted(pretrained))}.")
    if others:
        parts.append(f"{others} records of other recipes, parts or budgets are left out.")
    return "\n\n".join(parts)


def sweep_table(records: Records, plan: Iterable[tuple[str, Settings]], metric: str = "map") -> str:
    """The table of a sweep: one line per option and cell, best first."""
    found: dict[tuple[str, str, float], list[Record | None]] = {}
    for option, settings in plan:
        found.setdefault((option, settings.dataset, settings.fraction), []).append(records.find(settings))
    rows = []
    for (option, dataset, fraction), all_seeds in found.items():
        made = [record for record in all_seeds if record is not None]
        values = [[record["metrics"][name] for record in made] for name in (metric, "map_50")]
        cells = [option, f"{dataset} {fraction:.0%}", *map(_mean_and_spread, values), _mean(made, "minutes")]
        rows.append((-statistics.mean(values[0]) if made else 1.0, cells))
    rows.sort(key=lambda row: row[0])
    return markdown_table(["validation", "data", metric, "map_50", "minutes"], [cells for _, cells in rows])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of numbers to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def _collect(records: Records, plan: Iterable[Settings]) -> Runs:
    runs: Runs = {}
    for settings in plan:
        record = records.find(settings)
        if record is not None:
            key = (settings.arm, settings.budget), (settings.dataset, settings.fraction)
            runs.setdefault(key, {})[settings.seed] = record
    return runs


def _weights_of(records: Records, given: Mapping[tuple[str, str], str]) -> dict[tuple[str, str], str]:
    """The pretrained weights by kind and data set: those that are given, or else of the last record of these."""
    found = {
        (kind, settings["dataset"]): settings["weights"]
        for settings in (record["settings"] for record in records)
        if (kind := ARMS[settings["arm"]].pretrained) is not None and settings["split"] == "test"
    }
    return found | dict(given)


def _values(runs: Runs, line: Line, cell: Cell, metric: str) -> list[float]:
    return [record["metrics"][metric] for record in runs.get((line, cell), {}).values()]


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f} ({len(values)})" if len(values) > 1 else f"{mean} (1)"


def _gain(runs: Runs, main: Line, other: Line, cell: Cell, metric: str) -> str:
    ours, theirs = runs.get((main, cell), {}), runs.get((other, cell), {})
    gains = [ours[seed]["metrics"][metric] - theirs[seed]["metrics"][metric] for seed in ours if seed in theirs]
    if not gains:
        return MISSING
    won, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return f"{100 * statistics.mean(gains):+.1f} ({won} : {lost})"


def _mean(made: Iterable[Record], clock: str) -> str:
    minutes = [record["spent"][clock] for record in made]
    return f"{statistics.mean(minutes):.1f}" if minutes else MISSING


def _title(line: Line) -> str:
    arm = ARMS[line[0]]
    return f"{arm.title}, {BUDGETS[line[1]]}" if arm.is_baseline else arm.title


def _machine(record: Record) -> str:
    facts = {name: value for name, value in record["hardware"].items() if value is not None}
    return ", ".join(f"{value} {name}" if name == "threads" else str(value) for name, value in facts.items())


def _letter(arm: str) -> str:
    return ARMS[arm].title.split()[0]
