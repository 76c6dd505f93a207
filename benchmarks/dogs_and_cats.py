"""Train a method where coat colour and species go together, and test it where they do not.

    python benchmarks/dogs_and_cats.py --data FOLDER --train-split TB1 --method lnl

FOLDER holds Kaggle's ``train/`` and the authors' ``list_bright.txt`` and ``list_dark.txt``. Prints
a table and appends a line to ``benchmarks/results/dogs_and_cats.jsonl``; with ``--output`` it
writes a page, ``report.html``, in that folder. ``--table`` sets all recorded runs out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from photographs.options import parse, parser

BENCHMARK = "dogs_and_cats"
METHODS = ("baseline", "gray", "blindeye", "grl", "lnl")
HEADS = ("map_and_label", "map", "global", "tone")


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__, BENCHMARK, METHODS, ("TB1", "TB2"))
    made.add_argument(
        "--heads",
        nargs="+",
        choices=HEADS,
        help="map: colours of every position, the paper's and the default with pretrained "
        "features; map_and_label, the default otherwise: the same once for all images and once by "
        "label; global: the mean colour likewise; tone: bright or dark",
    )
    return parse(made, arguments, ["map_and_label"], {"heads": ["map"], "strength": 3.0})


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, print and append."""
    options = read_options(arguments)
    from photographs import pets, report

    report.carry_out(BENCHMARK, pets.task, options, arguments)


if __name__ == "__main__":
    main()
