"""Try other heads, a narrow layer and a penalty beside the recipe of `lnl`, on validation parts.

    python benchmarks/variations.py --faces utkface.tar --pets dogs_and_cats.tar

trains every variation with three seeds on the data sets of ``compare.py``, by a plain loop with the
recipe's numbers, appends a line a run to a file in ``benchmarks/results``, draws the trade-off and
prints the table, and below it which of `lnl` and resampling one rule takes on every set, with the
test figures that ``compare.py`` recorded. It can be stopped and started again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from comparison.protocol import DATA_SETS, VARIATIONS, add_files
from recording.options import RESULTS, command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command(__doc__)
    add = parser.add_argument
    add("--data", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), metavar="SET")
    add("--variations", nargs="+", choices=VARIATIONS, default=list(VARIATIONS), metavar="NAME")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    add_files(parser)
    add("--results", type=Path, default=RESULTS / "variations.jsonl", help="file of the runs")
    add("--figure", type=Path, help="where to draw the trade-off; by default beside the runs")
    add("--table", action="store_true", help="print and draw the recorded runs, train nothing")
    add("--threads", type=int, help="CPU threads; torch's choice by default")
    options = parser.parse_args(arguments)
    options.figure = options.figure or options.results.with_suffix(".png")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what has no line yet, append and print."""
    options = parse(arguments)
    import torch
    from comparison import figure, rule, table
    from comparison.data_sets import load
    from comparison.runs import judge
    from comparison.variations import train
    from recording import records

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    done = {(run["data"], run["method"], run["seed"]) for run in table.finished(options.results)}
    for name in [] if options.table else options.data:
        if (file := getattr(options, name)) is None:
            print(f"{name} is left out: its file is not given (--{name})", file=sys.stderr)
            continue
        missing = [
            (variation, seed)
            for seed in options.seeds
            for variation in options.variations
            if (name, variation, seed) not in done
        ]
        data = load(name, file) if missing else None
        for variation, seed in missing:
            assert data is not None
            trained = train(data, variation, seed)
            run = judge(trained, data, variation, seed, choose=True, benchmark="variations")
            records.append(options.results, run)
            print(
                f"{name}: {variation}, seed {seed}, worst group {run.worst_group:.3f}, "
                f"{run.nats:.3f} nats, {run.minutes:.1f} minutes",
                file=sys.stderr,
                flush=True,
            )
    recorded = [
        run
        for run in table.finished(options.results)
        if run["data"] in options.data and run["method"] in options.variations
    ]
    if not recorded:
        sys.exit(f"there is no run in {options.results}")
    judged = table.finished(RESULTS / "compare.jsonl")
    print(table.table(recorded), rule.table(recorded, judged), sep="\n\n")
    figure.draw(recorded, options.figure)
    print(f"drawn: {options.figure}", file=sys.stderr)


if __name__ == "__main__":
    main()
