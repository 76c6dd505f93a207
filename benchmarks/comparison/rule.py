"""One rule for every data set, by validation data: `lnl`, or resampling where that is fairer."""

from __future__ import annotations

from collections.abc import Sequence

from comparison.table import Line, Row, rows
from lnl_ext.reporting.tables import markdown

MARGIN = 0.01
"""What resampling's worst group must be better by, in accuracy."""


def chosen(trials: Sequence[Line]) -> dict[str, tuple[Row, Row, str]]:
    """Return for every data set the trials of `lnl` and of resampling, and which is to be taken."""
    found = {(row.data, row.method): row for row in rows(trials)}
    choice = {}
    for data in dict.fromkeys(data for data, _ in found):
        lnl = found.get((data, "lnl"))
        resampling = found.get((data, "resample"))
        if lnl is None or resampling is None:
            continue
        behind = resampling.mean("worst_group") - lnl.mean("worst_group")
        choice[data] = (lnl, resampling, "resample" if behind > MARGIN else "lnl")
    return choice


def table(trials: Sequence[Line], judged: Sequence[Line]) -> str:
    """Set out what the rule takes, and how that way did on the test part, as Markdown."""
    on_test = {(row.data, row.method): row for row in rows(judged)}
    cells = []
    for data, (lnl, resampling, taken) in chosen(trials).items():
        test = on_test.get((data, taken))
        fields = ("worst_group", "accuracy", "nats")
        cells.append(
            [
                data,
                f"{lnl.mean('worst_group'):.3f} ({len(lnl.runs)})",
                f"{resampling.mean('worst_group'):.3f} ({len(resampling.runs)})",
                taken,
                *("-" if test is None else f"{test.mean(field):.3f}" for field in fields),
            ]
        )
    header = ["data", "`lnl`: worst group (seeds)", "`resample`", "taken"]
    return markdown([*header, "test: worst group", "accuracy", "nats"], cells)
