"""Runs side by side: a row per method, the mean over its seeds; text, Markdown or a page."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lnl_ext.files import finite_or_none
from lnl_ext.measuring.audit_figure import blank_figure
from lnl_ext.measuring.interval import Interval
from lnl_ext.reporting.page import Page
from lnl_ext.reporting.tables import align, markdown

__all__ = ["LEAKAGE", "ComparedRun", "Comparison", "Measured"]

LEAKAGE = "leakage of "
"""What the names of the columns of leakage begin with."""

_NOTE = (
    "On the validation images of each run. Intervals are 95 %: over several seeds Student's t of "
    "the mean, within what is possible; of a single run that of its validation images (Wilson; of "
    "AUC and leakage a bootstrap). Leakage: nats that the strongest fresh probe finds in the "
    "frozen features, at the end of training."
)


class Measured(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    interval: Interval


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """What a run found.

    Attributes
    ----------
    name
        The row it belongs to: its method, and options in which the runs of the method differ.
    seed, folder
        Which run it is.
    measured
        By column; what was not measured is left out.
    """

    name: str
    seed: int
    folder: str
    measured: Mapping[str, Measured]


class Comparison:
    """Rows of runs.

    Parameters
    ----------
    runs
        In any order; rows have the order of the first run of each.
    """

    def __init__(self, runs: Sequence[ComparedRun]) -> None:
        self.runs = list(runs)
        self.names = list(dict.fromkeys(run.name for run in runs))
        self.columns = list(dict.fromkeys(name for run in runs for name in run.measured))

    def of(self, name: str) -> list[ComparedRun]:
        """Return the runs of a row, by seed."""
        return sorted((run for run in self.runs if run.name == name), key=lambda run: run.seed)

    def mean(self, name: str, column: str) -> Measured | None:
        """Return a row's mean over its runs; None where none measured it."""
        found = [run.measured[column] for run in self.of(name) if column in run.measured]
        found = [measured for measured in found if math.isfinite(measured.value)]
        if len(found) < 2:
            return found[0] if found else None
        from scipy import stats

        values = [measured.value for measured in found]
        middle, spread = statistics.fmean(values), statistics.stdev(values)
        half = float(stats.t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))
        # Nothing here is negative, and only leakage may be above 1.
        most = math.inf if column.startswith(LEAKAGE) else 1.0
        return Measured(middle, Interval(max(0.0, middle - half), min(most, middle + half)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers."""
        rows = []
        for name in self.names:
            runs = self.of(name)
            figures: dict[str, Any] = {}
            for column in self.columns:
                if (mean := self.mean(name, column)) is not None:
                    values = [
                        run.measured[column].value if column in run.measured else None
                        for run in runs
                    ]
                    figures[column] = {
                        "mean": mean.value,
                        "low": mean.interval.low,
                        "high": mean.interval.high,
                        "values": values,
                    }
            rows.append(
                {
                    "method": name,
                    "seeds": [run.seed for run in runs],
                    "runs": [run.folder for run in runs],
                    "measured": figures,
                }
            )
        plain: dict[str, Any] = finite_or_none({"rows": rows, "note": _NOTE})
        return plain

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        rows = []
        for name in self.names:
            seeds = [str(run.seed) for run in self.of(name)]
            means = [self.mean(name, column) for column in self.columns]
            rows.append([name, ", ".join(seeds), *map(_text, means)])
        return ["method", "seeds", *self.columns], rows

    def text(self) -> str:
        """Return a table as text."""
        header, rows = self._cells()
        return "\n".join([*align([header, *rows]), "", _NOTE])

    def markdown(self) -> str:
        """Return a table in Markdown."""
        header, rows = self._cells()
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
        return "\n".join([markdown(escaped[0], escaped[1:]), "", _NOTE])

    def html(self, title: str) -> str:
        """Return a page: the table, the trade-off of leakage and accuracy, and every run."""
        from lnl_ext.reporting.run_page import plain_style

        page = Page(title)
        header, rows = self._cells()
        page.heading("Methods").table(header, rows).note(_NOTE)
        leakage = [column for column in self.columns if column.startswith(LEAKAGE)]
        if leakage:
            with plain_style():
                figures = {
                    f"{column} and {height}": self._trade_off(column, height)
                    for column in leakage
                    for height in ("worst group", "overall")
                    if height in self.columns
                }
                page.heading("Trade-off").gallery(
                    figures,
                    "Up is more accurate, left is less bias in the features. Large points are the "
                    "means with their intervals, small ones the runs.",
                )
        each = [
            [run.name, run.seed, run.folder, *(_value(run, column) for column in self.columns)]
            for name in self.names
            for run in self.of(name)
        ]
        page.heading("Runs").table(["method", "seed", "run", *self.columns], each)
        return page.render()

    def _trade_off(self, across: str, up: str) -> Any:
        figure = blank_figure(6.2, 4.6)
        axes = figure.subplots()
        for number, name in enumerate(self.names):
            color = f"C{number % 10}"
            points = [
                (run.measured[across].value, run.measured[up].value)
                for run in self.of(name)
                if across in run.measured and up in run.measured
            ]
            means = [self.mean(name, column) for column in (across, up)]
            if not points or means[0] is None or means[1] is None:
                continue
            errors = [
                [[m.value - _end(m.interval.low, m)], [_end(m.interval.high, m) - m.value]]
                for m in (means[0], means[1])
            ]
            axes.errorbar(
                means[0].value,
                means[1].value,
                xerr=errors[0],
                yerr=errors[1],
                fmt="os^Dv"[number // 10 % 5],
                color=color,
                capsize=3,
                label=name,
            )
            if len(points) > 1:
                axes.scatter(*zip(*points, strict=True), s=9, color=color, alpha=0.6)
        axes.set(xlabel=f"{across} (nats)", ylabel=f"accuracy, {up}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8)
        return figure


def _end(end: float, measured: Measured) -> float:
    return end if math.isfinite(end) else measured.value


def _value(run: ComparedRun, column: str) -> str:
    return f"{run.measured[column].value:.3f}" if column in run.measured else "-"


def _text(measured: Measured | None) -> str:
    if measured is None:
        return "-"
    low, high = measured.interval
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{measured.value:.3f}"
    return f"{measured.value:.3f} ({low:.3f} to {high:.3f})"
