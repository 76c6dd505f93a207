"""Compare ways to handle a known bias on four data sets: accuracy and what features say of it.

    python benchmarks/compare.py --faces utkface.tar --pets dogs_and_cats.tar

trains every way with three seeds on every data set, on the same network, with the same
augmentation and as many steps, appends a line a run to a file in ``benchmarks/results``, prints the
table and draws the trade-off. It can be stopped and started again: a run with a line is not
repeated. Faces and pets are files of the user; without them these sets are left out. ``--choose``
measures on the validation parts, for the choice of settings, and appends nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from comparison.protocol import DATA_SETS, WAYS, add_files
from recording.options import RESULTS, command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command(__doc__)
    add = parser.add_argument
    add("--data", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), metavar="SET")
    add("--methods", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    add_files(parser)
    add("--results", type=Path, default=RESULTS / "compare.jsonl", help="file of the runs")
    add("--figure", type=Path, help="where to draw the trade-off; by default beside the runs")
    add("--table", action="store_true", help="print and draw the recorded runs, train nothing")
    add("--choose", action="store_true", help="measure on validation parts, append nothing")
    add("--threads", type=int, help="CPU threads; torch's choice by default")
    add("--no-progress", action="store_true")
    options = parser.parse_args(arguments)
    options.figure = options.figure or options.results.with_suffix(".png")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what has no line yet, append, print and draw."""
    options = parse(arguments)
    import torch
    from comparison import figure, runs, table

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if not options.table:
        done = [] if options.choose else table.finished(options.results)
        chosen = runs.run_missing(options, done)
        if options.choose:
            print(table.table(chosen))
            return
    recorded = [
        run
        for run in table.finished(options.results)
        if run["data"] in options.data and run["method"] in options.methods
    ]
    if not recorded:
        sys.exit(f"there is no run in {options.results}")
    print(table.table(recorded))
    figure.draw(recorded, options.figure)
    print(f"drawn: {options.figure}", file=sys.stderr)


if __name__ == "__main__":
    main()
