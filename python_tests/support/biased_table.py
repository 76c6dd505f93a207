"""A table whose label a bias predicts better than the columns made for it do."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

COLUMNS = 8


class Table(NamedTuple):
    """Rows (N, 8), labels and bias (N,), both 0 or 1."""

    rows: NDArray[Any]
    labels: NDArray[Any]
    bias: NDArray[Any]


def biased_table(samples: int, aligned: float, seed: int) -> Table:
    """Return rows in which the bias is the label with probability `aligned`, of equal groups."""
    random = np.random.default_rng(seed)
    labels = random.integers(2, size=samples)
    bias = np.where(random.random(samples) < aligned, labels, 1 - labels)
    rows = random.normal(size=(samples, COLUMNS)).astype(np.float32)
    rows[:, :2] += 0.8 * (2 * labels - 1)[:, None]
    rows[:, 2:4] += 1.0 * (2 * bias - 1)[:, None]
    return Table(rows, labels, bias)
