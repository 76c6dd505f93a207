"""Groups from lists, arrays and pandas objects, with missing values."""

from __future__ import annotations

import datetime
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lnl_ext.estimators.encoding import encode_groups


@pytest.mark.parametrize(
    ("values", "numbers", "groups"),
    [
        (["b", "a", "b"], [1, 0, 1], ["a", "b"]),
        (np.array([3, -1, 3]), [1, 0, 1], [-1, 3]),
        ([True, False, True], [1, 0, 1], [False, True]),
        ([2.0, 1.0, math.nan], [1, 0, -1], [1.0, 2.0]),
        (["b", None, "a"], [1, -1, 0], ["a", "b"]),
        (["b", math.nan, "a"], [1, -1, 0], ["a", "b"]),
        (pd.Series(["b", None, "a"]), [1, -1, 0], ["a", "b"]),
        (pd.Series(["b", None, "a"], dtype="string"), [1, -1, 0], ["a", "b"]),
        (pd.Series(["b", pd.NA, "a"], dtype=object), [1, -1, 0], ["a", "b"]),
        (pd.Series(["b", None, "a"], dtype="category"), [1, -1, 0], ["a", "b"]),
        (pd.Series([2, None, 1], dtype="Int64"), [1, -1, 0], [1, 2]),
        (pd.Series([True, None, True], dtype="boolean"), [0, -1, 0], [True]),
        (np.array([["b"], ["a"], ["b"]]), [1, 0, 1], ["a", "b"]),
        ([[1, "x"], [0, "x"], [1, "x"]], [1, 0, 1], [(0, "x"), (1, "x")]),
        (
            pd.DataFrame({"sex": ["f", "m", "f"], "old": [1, None, 0]}),
            [1, -1, 0],
            [("f", 0.0), ("f", 1.0)],
        ),
    ],
)
def test_equal_values_are_a_group_and_missing_ones_none(
    values: Any, numbers: list[int], groups: list[Any]
) -> None:
    found, names = encode_groups("bias", values, 3)
    assert found.tolist() == numbers
    assert names == groups


def test_dates_are_groups_too() -> None:
    column = pd.Series(pd.to_datetime(["2020-01-02", None, "2020-01-01"]))
    numbers, names = encode_groups("bias", column, 3)
    assert numbers.tolist() == [1, -1, 0]
    assert names == [datetime.datetime(2020, 1, 1), datetime.datetime(2020, 1, 2)]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([0, 1], ValueError, r"bias has shape \(2,\), expected \(3,\) or \(3, columns\)"),
        (1, ValueError, r"bias has shape \(\)"),
        (np.zeros((3, 1, 1)), ValueError, r"bias has shape \(3, 1, 1\)"),
        ([0.5, 1.25, 3.0], ValueError, "bias is continuous, expected groups: pandas.cut"),
        ([None, math.nan, None], ValueError, "bias has no value for any sample"),
        ([1, "b", 2], TypeError, r"\['int', 'str'\]"),
    ],
)
def test_what_is_no_group_is_named(values: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encode_groups("bias", values, 3)
