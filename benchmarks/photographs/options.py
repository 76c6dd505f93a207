"""Options of the commands on photographs. It imports no torch, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recording.options import RESULTS, add_training, command

# Of the package, which the tests hold them against.
ARCHITECTURES = ("small", "resnet18", "efficientnet_lite0")
PRETRAINED = "efficientnet-lite0"
# What the options are that are not given; the second for pretrained features.
DEFAULTS: dict[str, Any] = {
    "arch": "small",
    "epochs": 15.0,
    "image_size": 48,
    "smallest_part": 0.35,
    "strength": 1.0,
}
PRETRAINED_DEFAULTS: dict[str, Any] = {
    "arch": "efficientnet_lite0",
    "epochs": 2.0,
    "image_size": 192,
    "smallest_part": 0.5,
}


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
    add("--epochs", type=float, help=_default("epochs"))
    add("--batch-size", type=int, default=32)
    add("--image-size", type=int, help=f"5/6 of it are cut out; {_default('image_size')} pixels")
    add("--arch", choices=ARCHITECTURES, help=_default("arch"))
    add("--feature-layer", help="layer whose output is the features")
    add(
        "--weights",
        default="none",
        help=f"'none', 'imagenet', the path of a state_dict, or {PRETRAINED!r}: the first half of "
        "the network is frozen, and runs once for every image",
    )
    add(
        "--strength",
        type=float,
        help="factor of the adversaries' coefficients; by default 1, and more for pretrained "
        "features",
    )
    add(
        "--smallest-part",
        type=float,
        help="in training, the smallest share of an image's area that is cut out; "
        + _default("smallest_part"),
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


def _default(name: str) -> str:
    return f"{DEFAULTS[name]}, with --weights {PRETRAINED} {PRETRAINED_DEFAULTS[name]}"


def parse(
    made: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    heads: Sequence[str],
    pretrained: Mapping[str, Any],
) -> argparse.Namespace:
    """Read the command line; ``heads`` and what ``pretrained`` features have are the defaults."""
    options = made.parse_args(arguments)
    if options.data is None and not options.table:
        made.error("the following arguments are required: --data")
    defaults: dict[str, Any] = DEFAULTS | {"heads": list(heads)}
    if options.weights == PRETRAINED:
        defaults = PRETRAINED_DEFAULTS | dict(pretrained)
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.weights == PRETRAINED and (
        options.arch != PRETRAINED_DEFAULTS["arch"] or options.feature_layer is not None
    ):
        made.error(f"--weights {PRETRAINED} has its own --arch and --feature-layer")
    return options
