"""Which samples the probes learn from, are stopped by and are measured on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Three disjoint sets of rows, each int64 in ascending order."""

    train: Tensor
    validation: Tensor
    test: Tensor


def stratified_split(strata: Tensor, validation: float, test: float, seed: int) -> Split:
    """Divide samples at random so that every stratum is divided alike.

    Parameters
    ----------
    strata
        Shape (N,), integer: samples of equal value are divided together.
    validation, test
        Shares of the samples, each in (0, 1), together less than 1.
    seed
        Decides the division.

    Raises
    ------
    ValueError
        The shares are out of range, or one of the sets would be empty.
    """
    if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise ValueError(
            f"validation={validation} and test={test}, expected shares in (0, 1) that leave some "
            "samples to learn from"
        )
    samples = len(strata)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(samples, generator=generator)
    # Samples of a stratum side by side, in random order; every place is then dealt to a set by
    # where it stands, which divides each stratum alike up to one sample.
    ordered = shuffled[torch.argsort(strata[shuffled], stable=True)]
    place = torch.arange(samples, dtype=torch.float64) + torch.rand(
        (), generator=generator, dtype=torch.float64
    )
    in_test = (place * test).floor() != ((place + 1) * test).floor()
    rest = (~in_test).cumsum(0)
    share = validation / (1 - test)
    in_validation = ~in_test & ((rest * share).floor() != ((rest - 1) * share).floor())
    in_train = ~in_test & ~in_validation
    split = Split(*(ordered[rows].sort().values for rows in (in_train, in_validation, in_test)))
    if min(map(len, split)) == 0:
        raise ValueError(
            f"{samples} samples are too few for shares validation={validation} and test={test}"
        )
    return split
