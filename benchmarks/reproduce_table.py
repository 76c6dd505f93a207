"""Run every method at every variance of coloured MNIST and print the paper's table beside it.

    python benchmarks/reproduce_table.py

It may be stopped at any moment and started again: runs that stand in the results file are not
repeated, and a run that was interrupted resumes from its last checkpoint (one an epoch). Each run
is `benchmarks/colored_mnist.py` with one thread in a process of its own, two at a time. They
are longer here than by default: for `EPOCHS` epochs instead of three.

Lines of the results file name their recipe, not its version: after a change of
`lnl_ext/paper/recipes.py`, start another file (`--results`).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from digits.protocol import METHODS, RESULTS, VARIANCES, add_recipe, check_recipe
from recording.options import command

# Three seeds where the paper's numbers differ most, and in the middle; one elsewhere.
SEEDS = {0.02: (0, 1, 2), 0.03: (0, 1, 2)}
EPOCHS = 5.0
# The paper's, and what `lnl` adds to the label loss alone.
ROWS = ("baseline", "blindeye", "gray", "adjusted", "lnl")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command(__doc__)
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, help=f"by default {', '.join(ROWS)}")
    add("--variances", nargs="+", type=float, default=list(VARIANCES))
    add_recipe(parser, epochs=f"{EPOCHS:g}, and the recipe's own with --recipe paper")
    add(
        "--more-seeds",
        action="store_true",
        help="seeds 1 and 2 as well, at the variances "
        + ", ".join(f"{variance:.3f}" for variance in SEEDS),
    )
    add("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    add("--results", type=Path, default=RESULTS)
    add("--output", type=Path, default=Path("table_output"), help="folder for checkpoints")
    add("--figure", type=Path, help="draw accuracy against variance into this file")
    add("--table", action="store_true", help="print the recorded runs, train nothing")
    options = parser.parse_args(arguments)
    if options.methods is None:
        from lnl_ext.paper.recipes import RECIPES

        adjusts = RECIPES[options.recipe].logit_adjustment is not None
        options.methods = [m for m in ROWS if adjusts or m != "adjusted"]
    check_recipe(parser, options.recipe, options.methods)
    if options.epochs is None and options.recipe != "paper":
        options.epochs = EPOCHS
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and print the table."""
    options = parse(arguments)
    from digits.table import Runner, cells, draw, finished, run_all, table

    done = finished(options.results, options.recipe, options.epochs)
    seeds = SEEDS if options.more_seeds else {}
    wanted = cells(options.methods, options.variances, seeds)
    missing = [] if options.table else [cell for cell in wanted if cell not in done]
    if missing:
        print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are there", flush=True)
        # As Ctrl-C: the runs are ended, too.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        run_all(Runner(options), missing, options.jobs)
    accuracy = finished(options.results, options.recipe, options.epochs)
    print(table(accuracy, options.methods, options.variances))
    if options.figure is not None:
        draw(accuracy, options.methods, options.figure)


if __name__ == "__main__":
    main()
