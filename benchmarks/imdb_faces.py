"""Train a method on young women and old men, and test it on old women and young men.

    python benchmarks/imdb_faces.py --data FOLDER --train-split EB1 --label gender --method lnl

FOLDER holds IMDB (``imdb_crop/`` and ``imdb.mat`` or the authors' ``.npy`` files) or UTKFace.
Prints a table and appends a line to ``benchmarks/results/imdb_faces.jsonl``; with ``--output`` it
writes a page, ``report.html``, in that folder. ``--table`` sets all recorded runs out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from photographs.options import parse, parser

BENCHMARK = "imdb_faces"
METHODS = ("baseline", "gray", "blindeye", "grl", "lnl")
HEADS = ("map", "linear", "global", "by_label")


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__, BENCHMARK, METHODS, ("EB1", "EB2"))
    made.add_argument(
        "--label", choices=("gender", "age"), default="gender", help="the other is the bias"
    )
    made.add_argument(
        "--heads",
        nargs="+",
        choices=HEADS,
        help="map: from every position of the features; linear: one linear layer on pooled "
        "features, the paper's; global: with two convolutions before it; by_label: the same for "
        "each label separately. By default map, and by_label with pretrained features as well",
    )
    pretrained = {"heads": ["map", "by_label"], "strength": 6.0}
    return parse(made, arguments, ["map"], pretrained)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, print and append."""
    options = read_options(arguments)
    from photographs import faces, report

    report.carry_out(BENCHMARK, faces.task, options, arguments)


if __name__ == "__main__":
    main()
