"""The recorded runs as a table: means over seeds, and the mean of their intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recording import records

from comparison.protocol import DATA_SETS, VARIATIONS, WAYS
from lnl_ext.reporting.tables import markdown

Line = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One way on one data set."""

    data: str
    method: str
    runs: Sequence[Line]

    def values(self, field: str) -> list[float]:
        """Return a field of all runs."""
        return [run[field] for run in self.runs]

    def mean(self, field: str) -> float:
        """Return the mean of a field over the runs."""
        return sum(self.values(field)) / len(self.runs)


def finished(results: Path) -> list[Line]:
    """Return the recorded runs; none where there is no file yet."""
    return list(records.read(results)) if results.exists() else []


def rows(runs: Sequence[Line]) -> list[Row]:
    """Return the runs by data set and way, in the protocol's order."""
    found: dict[tuple[str, str], list[Line]] = {}
    for run in runs:
        found.setdefault((run["data"], run["method"]), []).append(run)
    order = [(data, way) for data in DATA_SETS for way in {**WAYS, **VARIATIONS}]
    return [Row(*key, found[key]) for key in order if key in found]


def table(runs: Sequence[Line]) -> str:
    """Set the runs out as Markdown."""
    header = [
        *("data", "way", "seeds", "accuracy", "worst group", "conflicting", "parity gap"),
        *("nats (95 %)", "probe accuracy", "chance", "p", "minutes"),
    ]
    return markdown(header, [_cells(row) for row in rows(runs)])


def _cells(row: Row) -> list[str]:
    first = row.runs[0]
    gap = "-" if first["parity_gap"] is None else f"{row.mean('parity_gap'):.3f}"
    nats, low, high = (f"{row.mean(field):.3f}" for field in ("nats", "nats_low", "nats_high"))
    return [
        f"{row.data} ({first['alignment']:.2f})",
        row.method,
        str(len(row.runs)),
        *(f"{row.mean(field):.3f}" for field in ("accuracy", "worst_group", "conflicting")),
        gap,
        f"{nats} ({low} to {high})",
        *(f"{row.mean(field):.3f}" for field in ("probe_accuracy", "chance")),
        ", ".join(f"{p:.2g}" for p in row.values("p_value")),
        f"{row.mean('minutes'):.1f}",
    ]
