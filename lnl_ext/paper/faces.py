"""Faces (Kim et al., section 4.1): young women and old men in training, labels gender and age."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.paper.face_files import FEMALE, MALE, list_faces

__all__ = ["AGE_EDGES", "LABELS", "SPLITS", "Faces", "age_bins", "binary_age", "select_faces"]

#: Edges of the 12 age bins, in years; the first of a bin belongs to it.
AGE_EDGES = (0, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 120)
#: Extreme bias 1 and 2, and the test set in which both genders have all ages.
SPLITS = ("EB1", "EB2", "test")
#: Possible labels; the other one is the bias.
LABELS = ("gender", "age")
TEST_SHARE = 0.2

_YOUNG, _OLD = 30, 40  # young: below; old: from


class Faces(NamedTuple):
    """One split, in the order of the file names."""

    paths: list[Path]
    age: Tensor
    """(N,) int64, years."""
    gender: Tensor
    """(N,) int64: 0 female, 1 male."""


def age_bins(age: Tensor) -> Tensor:
    """Return the bin 0..11 of ages in years ``(N,)``, `IGNORE_INDEX` outside of `AGE_EDGES`."""
    bins = torch.bucketize(age, torch.tensor(AGE_EDGES[1:-1]), right=True)
    return bins.masked_fill((age < AGE_EDGES[0]) | (age > AGE_EDGES[-1]), IGNORE_INDEX)


def binary_age(age: Tensor) -> Tensor:
    """Return 0 for ages below 30, 1 from 40 on, and `IGNORE_INDEX` between."""
    return (
        torch.full_like(age, IGNORE_INDEX).masked_fill(age < _YOUNG, 0).masked_fill(age >= _OLD, 1)
    )


def select_faces(root: str | os.PathLike[str], split: str, *, seed: int = 0) -> Faces:
    """Return the faces of a split.

    Parameters
    ----------
    root
        As in `lnl_ext.paper.face_files.list_faces`.
    split
        ``"EB1"``: women below 30 and men from 40 on; ``"EB2"``: men below 30 and women from 40 on;
        ``"test"``: the faces held out from both. These are the authors' test list where the
        source has it, else a fifth of all faces, drawn with ``seed``, of every age.
    seed
        Of the draw; the same for all splits of an experiment.

    Raises
    ------
    ValueError
        The split is unknown or has no face.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    faces = list_faces(root)
    test = faces.test
    if test is None:
        count = len(faces.paths)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        test = torch.zeros(count, dtype=torch.bool)
        test[order[: round(count * TEST_SHARE)]] = True
    if split == "test":
        chosen = test
    else:
        # EB1: women below 30 and men from 40 on, where the two numbers are equal.
        aligned = binary_age(faces.age) == faces.gender
        opposed = binary_age(faces.age) == (FEMALE + MALE - faces.gender)
        chosen = (aligned if split == "EB1" else opposed) & ~test
    rows = chosen.nonzero().flatten()
    if not len(rows):
        raise ValueError(f"{root}: no face belongs to split {split}")
    return Faces([faces.paths[row] for row in rows.tolist()], faces.age[rows], faces.gender[rows])
