"""
Does diffusion pretraining find more objects with fewer labels? One table, made over as many sittings as it takes.

    python scripts/experiments.py --pretrained_on bccd=DIT_BCCD cards=DIT_CARDS --minutes 60
    python scripts/experiments.py --table

The first makes the runs that are missing, the most informative first, and starts none after an hour. Every finished
run is a line of the results file; what is there is never run again, and a kill loses the run that is going on. All
arms get the same images, views, canvas and number of image passes; the detectors of others also get as many minutes
as ours took. No side starts from weights that have seen COCO or ImageNet. What is tested is the last weights, once:
no checkpoint is chosen.

    python scripts/experiments.py --large --arms random tuned --fractions 0.1
    python scripts/experiments.py --large --arms random tuned --fractions 0.1 --table

The same with a larger budget, for the parts of the table that are named.

    python scripts/experiments.py --sweep matcher
    python scripts/experiments.py --sweep matcher --table

Settings are chosen on the validation split: these are the lists in scripts/evidence/sweeps.py.

    python scripts/experiments.py --probe --datasets bccd

What a DiT knows before any detector is trained on it, per block and timestep, beside random weights. The pretrained
DiT is that of the package, unless --pretrained names another.

    python scripts/experiments.py --autoencoder FOLDER

Trains the small autoencoder with whose latents pretraining was tried, as `dit-detect pretrain --vae FOLDER` takes it.
"""

import argparse
import signal
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Read the options, then make what is missing, or print what is there."""
    # What a run writes in its temporary folder is removed when it is ended from outside, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ended; go on with the same command."))
    from scripts.evidence.autoencoding import train_autoencoder
    from scripts.evidence.probing import print_probes
    from scripts.evidence.records import Records
    from scripts.evidence.running import Runner
    from scripts.evidence.settings import DATASETS, table_plan
    from scripts.evidence.sweeps import sweep_plan
    from scripts.evidence.table import results_table, sweep_table

    parser = make_parser()
    args = parser.parse_args()
    check_options(args, parser)
    try:
        if args.autoencoder:
            ratio = train_autoencoder(args.autoencoder, [args.data / name for name in DATASETS])
            print(f"{args.autoencoder}: peak signal-to-noise ratio {ratio:.1f} dB on held-out images.")
            return
        if args.probe:
            print_probes(args.data, args.pretrained, args.datasets or DATASETS)
            return
        records = Records(args.results)
        known = sorted({name for record in records for name in record["metrics"]})
        if args.table and known and args.metric not in known:
            parser.error(f"--metric {args.metric} is none of {', '.join(known)}.")
        runner = Runner(args.data, _pretrained(args, parser), records)
        if args.sweep:
            plan = list(
                sweep_plan(args.sweep, runner.weights, args.datasets or ["bccd"], args.fractions, args.seeds or [0])
            )
        else:
            parts = {"arms": args.arms, "datasets": args.datasets, "fractions": args.fractions, "seeds": args.seeds}
            given = {name: value for name, value in parts.items() if value} | {"large": args.large}
            plan = [("", settings) for settings in table_plan(runner.weights, **given)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.table:
        if args.sweep:
            print(sweep_table(records, plan, args.metric))
        else:
            print(results_table(records, runner.weights, args.metric, **given))
        return
    missing = [(option, settings) for option, settings in plan if records.find(settings) is None]
    if args.plan:
        print_plan(missing, records)
        return
    if not make_runs(missing, runner, records, args.minutes):
        sys.exit("Some runs failed, with the reasons above.")


def check_options(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """End with a usage error where options contradict each other or name nothing that could be run."""
    if args.large and args.sweep:
        parser.error("--large is a budget of the table; a --sweep has its own.")
    if args.arms and args.sweep:
        parser.error("--arms is of the table; a --sweep has its own arm.")
    for fraction in args.fractions or ():
        if not 0 < fraction <= 1:
            parser.error(f"--fractions {fraction:g} must lie above 0 and be at most 1.")
    for seed in args.seeds or ():
        if seed < 0:
            parser.error(f"--seeds {seed} must be 0 or more.")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    from scripts.evidence.settings import ARMS, DATASETS
    from scripts.evidence.sweeps import SWEEPS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "model_cards" / "evidence" / "results.jsonl", help="the finished runs"
    )
    parser.add_argument(
        "--pretrained",
        type=Path,
        metavar="DIT",
        default=ROOT / "dit_detection" / "small-dit",
        help="pipeline or DiT folder of arms (b) and (c); default: that of the package",
    )
    parser.add_argument(
        "--pretrained_on", nargs="+", default=[], metavar="SET=DIT", help="per data set, the DiT of arm (d)"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS)
    parser.add_argument("--datasets", nargs="+", choices=DATASETS)
    parser.add_argument("--fractions", nargs="+", type=float, metavar="SHARE", help="of the labels: 0.1 0.3 1")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after these")
    parser.add_argument(
        "--large", action="store_true", help="twice the passes, and sides of the canvas a third longer"
    )
    parser.add_argument("--sweep", choices=SWEEPS, help="compare settings on the validation split")
    parser.add_argument("--probe", action="store_true", help="linear classifiers of the DiT's tokens")
    parser.add_argument("--autoencoder", type=Path, metavar="FOLDER", help="train a small one and write it there")
    parser.add_argument("--table", action="store_true", help="print the results and run nothing")
    parser.add_argument("--plan", action="store_true", help="print what is missing and its minutes; run nothing")
    parser.add_argument("--metric", default="map", help="of --table: map, map_50, …")
    return parser


def _pretrained(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[tuple[str, str], Path]:
    """Folders of pretrained DiTs by kind and data set."""
    from scripts.evidence.settings import DATASETS

    folders = {("general", dataset): args.pretrained for dataset in DATASETS}
    for text in args.pretrained_on:
        dataset, _, folder = text.partition("=")
        if dataset not in DATASETS or not folder:
            parser.error(f"--pretrained_on {text}: must be SET=FOLDER, with a SET of {', '.join(DATASETS)}.")
        folders["own", dataset] = Path(folder)
    for folder in folders.values():
        if not folder.is_dir():
            parser.error(f"{folder} is no folder: a DiT of `dit-detect pretrain` is needed.")
    return folders


def make_runs(missing: list[tuple[str, Any]], runner: Any, records: Any, minutes: float) -> bool:
    """Make the runs in turn until the time is up; whether none failed."""
    start, failed = time.perf_counter(), 0
    for number, (option, settings) in enumerate(missing, 1):
        elapsed = (time.perf_counter() - start) / 60
        if elapsed >= minutes:
            break
        name = f"[{elapsed:4.0f} min] {number}/{len(missing)} {describe(option, settings)}"
        if not runner.is_ready(settings):
            progress(f"{name}: waits for the minutes of ours on this machine")
            continue
        progress(name)
        try:
            record = runner.run(settings)
            records.add(record)
        except Exception:  # one of a hundred runs; the exit code tells
            progress(traceback.format_exc())
            failed += 1
            continue
        metrics, spent = record["metrics"], record["spent"]
        progress(f"           map {metrics['map']:.3f}, map_50 {metrics['map_50']:.3f}, {spent['minutes']:.1f} min")
    return not failed


def print_plan(missing: list[tuple[str, Any]], records: Any) -> None:
    """What would be run, and how long it took with other seeds."""
    known: dict[tuple, list[float]] = {}
    for record in records:
        known.setdefault(_cost_key(record["settings"]), []).append(record["spent"]["minutes"])
    total, unknown = 0.0, 0
    for option, settings in missing:
        minutes = known.get(_cost_key(settings.to_json()))
        total += statistics.mean(minutes) if minutes else 0.0
        unknown += not minutes
        print(f"{describe(option, settings)}: {f'{statistics.mean(minutes):.1f} min' if minutes else '?'}")
    print(f"{len(missing)} runs, {total / 60:.1f} hours of training and {unknown} of which no record tells the time.")


def describe(option: str, settings: Any) -> str:
    """A run, with the option of a sweep that it is."""
    run = f"{settings.arm} ({settings.budget}), {settings.dataset} {settings.fraction:.0%}, seed {settings.seed}"
    return f"{run}: {option}" if option else run


def progress(text: str) -> None:
    """On stderr, so that nothing mixes with a table."""
    print(text, file=sys.stderr, flush=True)


def _cost_key(settings: dict[str, Any]) -> tuple:
    names = ("arm", "dataset", "fraction", "budget", "passes", "canvas")
    return tuple(str(settings[name]) for name in names)


if __name__ == "__main__":
    # Not this folder, whose evaluate.py would hide the library of that name, but the one above it.
    sys.path[0] = str(ROOT)
    main()
