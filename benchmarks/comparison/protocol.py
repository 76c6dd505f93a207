"""The data sets, the ways that are compared and the variations, and how long each is trained.

It imports no torch, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent / "data"
MNIST, ADULT = HERE / "mnist", HERE / "adult" / "adult.data.gz"

WAYS = {
    "erm": "label loss only",
    "resample": "batches balanced over groups of label and bias",
    "reweight": "label loss weighted by the inverse size of the group",
    "groupdro": "group DRO (Sagawa et al. 2020)",
    "adjusted": "logit adjustment by bias (Hong and Yang 2021)",
    "grl": "gradient reversal (Ganin and Lempitsky 2015)",
    "entropy": "entropy of the bias prediction",
    "blindeye": "confusion loss (Alvi et al. 2018)",
    "lnl": "both (Kim et al. 2019)",
    "erasure": "linear erasure of erm's features, classifier refitted (LEACE, Belrose et al. 2023)",
    "estimator": "lnl_ext.AdversarialClassifier, tables only: lnl and the adjusted loss",
    "fairlearn": "fairlearn's adversarial classifier, tables only (Zhang et al. 2018)",
}


@dataclasses.dataclass(frozen=True)
class Length:
    """How long every way is trained on a data set."""

    epochs: int
    batch_size: int


DATA_SETS = {
    "faces": Length(epochs=20, batch_size=32),
    "adult": Length(epochs=10, batch_size=128),
    "pets": Length(epochs=20, batch_size=32),
    "colored_mnist": Length(epochs=6, batch_size=64),
}
TABLES = ("adult",)
TABLES_ONLY = ("estimator", "fairlearn")


def add_files(parser: argparse.ArgumentParser) -> None:
    """Add the flags of where the data sets are."""
    add = parser.add_argument
    add("--faces", type=Path, help="tar of UTKFace's images")
    add("--pets", type=Path, help="tar of Kaggle's cats and dogs and the authors' two lists")
    add("--adult", type=Path, default=ADULT, help="adult.data.gz with a line of names")
    add("--colored-mnist", type=Path, default=MNIST, help="a folder with MNIST's IDX files")


@dataclasses.dataclass(frozen=True)
class Variation:
    """What is tried beside the recipe of `lnl`."""

    heads: int = 1
    """Side by side, with the mean of their losses; 0: without an adversary."""
    balance: float | None = None
    """Instead of the recipe's."""
    adjust: bool = True
    """Whether the label loss is that for labels as they come, whatever the draws and the bias."""
    renew: int = 0
    """Steps after which one head starts anew, in turn; 0: never."""
    width: int | None = None
    """Units of a further, narrow feature layer."""
    hsic: float = 0.0
    """Weight of a penalty without a game: the dependence of features and bias in the batch."""


VARIATIONS = {
    "lnl": Variation(),
    "three heads": Variation(heads=3),
    "renewed heads": Variation(heads=2, renew=100),
    "narrow layer": Variation(width=16),
    "with HSIC": Variation(hsic=10.0),
    "resample": Variation(heads=0, balance=1.0, adjust=False),
}
"""The variations by name, as they stand in lines of results."""
