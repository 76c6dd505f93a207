"""Coloured MNIST: methods, variances, recipes, and the paper's numbers.

It imports no torch, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from recording.options import RESULTS as FOLDER

MNIST = Path(__file__).resolve().parent.parent / "data" / "mnist"
RESULTS = FOLDER / "colored_mnist.jsonl"
# Those of the package, which the tests hold them against.
METHODS = ("baseline", "gray", "blindeye", "grl", "entropy", "lnl", "adjusted")
RECIPES = ("lnl", "digits", "unadjusted", "paper")
VARIANCES = (0.020, 0.025, 0.030, 0.035, 0.040, 0.045, 0.050)
# Kim et al., CVPR 2019, table 1: accuracy on the unbiased test set by variance.
PAPER = {
    method: dict(zip(VARIANCES, accuracies, strict=True))
    for method, accuracies in {
        "baseline": (0.4055, 0.4813, 0.5996, 0.6626, 0.7333, 0.7973, 0.8450),
        "blindeye": (0.6741, 0.7123, 0.7883, 0.8203, 0.8638, 0.8927, 0.9159),
        "gray": (0.8374, 0.8751, 0.8996, 0.9166, 0.9325, 0.9472, 0.9596),
        "lnl": (0.8185, 0.8854, 0.9137, 0.9306, 0.9406, 0.9555, 0.9618),
    }.items()
}


def add_recipe(parser: argparse.ArgumentParser, epochs: str = "the recipe's") -> None:
    """Add the options of data and recipe; ``epochs`` says what is the default."""
    parser.add_argument("--recipe", choices=RECIPES, default="lnl")
    parser.add_argument("--epochs", type=float, help=f"of every stage; by default {epochs}")
    parser.add_argument(
        "--data-root", type=Path, default=MNIST, help="a folder with MNIST's IDX files"
    )


def check_recipe(parser: argparse.ArgumentParser, recipe: str, methods: Sequence[str]) -> None:
    """Exit with a message where a method cannot have the recipe."""
    from lnl_ext.paper.recipes import get_recipe
    from lnl_ext.training.methods import get_method

    try:
        for method in map(get_method, methods):
            get_recipe(recipe, method).adjustment(method)
    except ValueError as error:
        parser.error(str(error))
