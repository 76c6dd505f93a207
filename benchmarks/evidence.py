"""Train methods on coloured MNIST, audit their features, and write figures and one page of it all.

    python benchmarks/evidence.py --variance 0.02 --output evidence_output

writes `report.html` (self-contained) and its figures. Runs are checkpointed in the output folder:
stopped and started again, the command resumes from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from digits.protocol import METHODS, VARIANCES, add_recipe, check_recipe
from recording.options import add_training, command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command(__doc__)
    add = parser.add_argument
    add("--variance", type=float, choices=VARIANCES, default=0.02)
    add("--methods", nargs="+", choices=METHODS, default=["baseline", "lnl"])
    add_recipe(parser)
    add_training(parser)
    add("--train-samples", type=int, help="the first digits only")
    add("--log-every", type=int, default=100, help="steps between two losses")
    add("--output", type=Path, default=Path("evidence_output"))
    options = parser.parse_args(arguments)
    check_recipe(parser, options.recipe, options.methods)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not trained, measure, draw, write."""
    options = parse(arguments)
    from digits.evidence import write

    write(options)


if __name__ == "__main__":
    main()
