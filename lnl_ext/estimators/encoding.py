"""Groups from what a user gives as bias or sensitive features."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import OrdinalEncoder
from sklearn.utils.multiclass import type_of_target

__all__ = ["encode_groups"]


def encode_groups(name: str, values: Any, samples: int) -> tuple[NDArray[np.int64], list[Any]]:
    """Return numbers for the groups of samples with equal values.

    Parameters
    ----------
    name
        Of the argument, for messages.
    values
        Array-like (N,) or (N, columns) of numbers or strings, such as a pandas Series or DataFrame.
        Several columns are one bias: every combination that occurs is a group. None, NaN and
        ``pandas.NA`` are missing values.
    samples
        N.

    Returns
    -------
    numbers
        Shape (N,) int64: the group of each sample, -1 where a value is missing.
    groups
        The value of each group, ascending; a tuple of values for several columns.

    Raises
    ------
    TypeError
        A column has strings and numbers.
    ValueError
        The shape is wrong, a column is continuous, or no sample has a group.
    """
    table = np.array(values, dtype=object)  # an array of strings would make "nan" of a missing one
    if table.ndim not in (1, 2) or len(table) != samples:
        raise ValueError(
            f"{name} has shape {table.shape}, expected ({samples},) or ({samples}, columns)"
        )
    table = table.reshape(samples, -1)
    table[_is_missing(table)] = np.nan
    encoder = OrdinalEncoder(encoded_missing_value=-1)
    numbers = encoder.fit_transform(table).astype(np.int64)
    for values_found in encoder.categories_:
        if type_of_target(values_found[~_is_missing(values_found)].tolist()) == "continuous":
            raise ValueError(f"{name} is continuous, expected groups: pandas.cut makes them")
    known = (numbers >= 0).all(1)
    if not known.any():
        raise ValueError(f"{name} has no value for any sample")
    combinations, inverse = np.unique(numbers[known], axis=0, return_inverse=True)
    group = np.full(samples, -1)
    group[known] = inverse.reshape(-1)
    found = [
        tuple(column[i] for column, i in zip(encoder.categories_, row, strict=True))
        for row in combinations
    ]
    return group, found if table.shape[1] > 1 else [value for (value,) in found]


@np.vectorize(otypes=[bool])
def _is_missing(value: Any) -> bool:
    """Whether a value is None, NaN, NaT or pandas.NA, without an import of pandas."""
    try:
        return value is None or bool(value != value)
    except TypeError:  # what pandas.NA says when asked whether it differs from itself
        return True
