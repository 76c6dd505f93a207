"""Train one method on coloured MNIST, test it where the colour is random, and measure leakage.

    python benchmarks/colored_mnist.py --variance 0.02 --method lnl

prints a table with the paper's number beside the measured one and appends a line to
``benchmarks/results/colored_mnist.jsonl``. With ``--output`` the run also gets a page,
``METHOD/report.html`` in that folder. ``--choose`` measures on training digits that are held out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from digits.protocol import METHODS, RESULTS, add_recipe, check_recipe
from recording.options import add_training, command

COEFFICIENTS = ("reversal", "entropy_weight")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command(__doc__)
    add = parser.add_argument
    add("--method", choices=METHODS, default="lnl")
    add("--variance", type=float, default=0.02, help="of the colours, the paper's sigma^2")
    add_recipe(parser)
    add_training(parser)
    add(
        "--output",
        type=Path,
        help="folder for the page and for checkpoints, from which a run resumes",
    )
    add("--results", type=Path, default=RESULTS, help="file to append the run to")
    add(
        "--choose",
        action="store_true",
        help="to choose settings: train on the first 55,000 training digits, measure on the "
        "others, append nothing",
    )
    for name in COEFFICIENTS:
        flag = f"--{name.replace('_', '-')}"
        add(
            flag,
            type=float,
            default=argparse.SUPPRESS,
            help="with --choose: instead of the recipe's",
        )
    options = parser.parse_args(arguments)
    if not options.choose and any(name in options for name in COEFFICIENTS):
        parser.error("--reversal and --entropy-weight need --choose: a line of results has neither")
    check_recipe(parser, options.recipe, [options.method])
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, print and append."""
    options = parse(arguments)
    import torch
    from digits import page, runs
    from recording.records import append, command_line, write_page

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    started = time.monotonic()
    load = runs.Data.held_out if options.choose else runs.Data.load
    data = load(options.data_root, options.variance, options.seed)
    measured = runs.measure(
        options.method,
        options.recipe,
        data,
        options.seed,
        epochs=options.epochs,
        output=options.output,
        progress=not options.no_progress,
        coefficients={name: value for name, value in vars(options).items() if name in COEFFICIENTS},
    )
    print(runs.table([measured.run]))
    where = "held-out digits: appended nowhere"
    if not options.choose:
        append(options.results, measured.run)
        where = f"appended to {options.results}"
    print(f"{(time.monotonic() - started) / 60:.1f} minutes in all; {where}")
    if options.output is not None:
        shown = page.summary(measured, data, options, command_line("colored_mnist", arguments))
        write_page(options.output / options.method, shown)


if __name__ == "__main__":
    main()
