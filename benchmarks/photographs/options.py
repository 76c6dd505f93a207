"""Options of the commands on photographs. It imports no torch, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from recording.options import RESULTS, add_training, command

ARCHITECTURES = ("small", "resnet18")  # of the package, which the tests hold them against


def parser(
    description: str | None, benchmark: str, methods: Sequence[str], splits: Sequence[str]
) -> argparse.ArgumentParser:
    """Return the options that the commands share."""
    made = command(description)
    add = made.add_argument
    add("--data", type=Path, help="folder with the images; required without --table")
    add("--method", choices=methods, default="lnl")
    add("--train-split", choices=splits, default=splits[0])
    add_training(made)
    add("--epochs", type=float, default=15)
    add("--batch-size", type=int, default=32)
    add("--image-size", type=int, default=48, help="pixels; 5/6 of it are cut out")
    add("--arch", choices=ARCHITECTURES, default="small")
    add("--feature-layer", help="layer whose output is the features")
    add("--weights", default="none", help="'none', 'imagenet' or the path of a state_dict")
    add("--strength", type=float, default=1.0, help="factor of the adversaries' coefficients")
    add(
        "--smallest-part",
        type=float,
        default=0.35,
        help="in training, the smallest share of an image's area that is cut out",
    )
    add(
        "--choose",
        action="store_true",
        help="to choose settings: measure on the halves of the unbiased and the opposite set that "
        "are not reported, append nothing",
    )
    add("--workers", type=int, default=2, help="processes that decode the images")
    add("--output", type=Path, help="folder for metrics, the checkpoint and the page")
    add("--results", type=Path, default=RESULTS / f"{benchmark}.jsonl", help="file to append to")
    add("--table", action="store_true", help="print the recorded runs, train nothing")
    return made


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    options = made.parse_args(arguments)
    if options.data is None and not options.table:
        made.error("the following arguments are required: --data")
    return options
