"""
What this package does, timed in turn with what it is measured against, as one table of ratios.

    python scripts/benchmark.py --quick
    python scripts/benchmark.py --device cuda --json table.json

The first takes under ten minutes on two cores. Each row times two things in turn in one run, A, B, A, B, …, after
warm-up, and prints medians of wall and CPU time (over all threads), the medians of the ratios of each B to its A,
theirs to ours (above 1: ours is faster; on a busy machine they are steadier than the ratio of the medians), the FLOPs
of a call, the parameters and the memory that a call needs at its peak. Nothing is downloaded: weights are random.
"""

import argparse
import json
import sys
import time
import traceback
from pathlib import Path


def main() -> None:
    """Choose the rows, run them one after the other, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 1 for the largest, fewer repeats: 10 minutes")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows whose name contains one of these")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; by default as many as it takes")
    parser.add_argument("--repeats", type=int, default=20, help="most timed calls of each side of a row")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also save the table there")
    parser.add_argument("--costs", action="store_true", help="time nothing; count what training on DiT-XL/2 takes")
    args = parser.parse_args()

    import torch

    from scripts.benchmarks import backbone, compiled, encoder, evaluation, frozen, head, precision
    from scripts.benchmarks.costs import table
    from scripts.benchmarks.measure import HEADER, Settings, as_json, machine, markdown, measure, progress

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here.")
    if args.costs:
        print(table())
        return
    for name in ("threads", "repeats"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be 1 or more.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    settings = Settings(args.device, args.quick, args.repeats)
    groups = (frozen, backbone, encoder, precision, head, evaluation, compiled)
    rows = [row for group in groups for row in group.rows(settings)]
    if args.only:
        rows = [row for row in rows if any(name.lower() in row.name.lower() for name in args.only)]
    if not rows:
        parser.error(f"--only {' '.join(args.only)}: no row has such a name.")

    start, results, failed = time.perf_counter(), [], []
    for number, row in enumerate(rows, 1):
        progress(f"[{time.perf_counter() - start:4.0f} s] {number}/{len(rows)} {row.name}")
        try:
            results.append(measure(row, settings))
        except Exception:  # one row of an hour's run; the exit code tells
            progress(traceback.format_exc())
            failed.append(row.name)
            continue
        progress("         " + markdown(results[-1]))
        if args.json is not None:  # after every row: a run that is stopped leaves what it has measured
            args.json.write_text(json.dumps(as_json(results, settings), indent=2) + "\n", encoding="utf-8")
    print(", ".join(f"{name}: {value}" for name, value in machine(settings).items() if value), end="\n\n")
    print("\n".join([HEADER, *map(markdown, results)]))
    if failed:
        sys.exit(f"{len(failed)} rows failed, with the reasons above: {'; '.join(failed)}.")


if __name__ == "__main__":
    # Not this folder, whose evaluate.py would hide the library of that name, but the one above it.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
