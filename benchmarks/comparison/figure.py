"""The trade-off: accuracy against what the features still say about the bias."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison.protocol import VARIATIONS, WAYS
from comparison.table import Line, Row, rows

PANELS = {"worst_group": "worst-group accuracy", "accuracy": "accuracy"}
_NAMES = list({**WAYS, **VARIATIONS})
_MARKERS = "osD^v<>PXp*h8d"
_COLORS = {"lnl": "black"}  # what is compared with the others


def draw(runs: Sequence[Line], path: Path) -> None:
    """Draw a column for each data set, a mark for each way or variation.

    A mark is at the means over seeds. The horizontal bar is the mean of the intervals of the
    information, the vertical one reaches from the lowest to the highest seed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = rows(runs)
    sets = list(dict.fromkeys(row.data for row in found))
    figure = Figure(figsize=(0.6 + 3.3 * len(sets), 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(PANELS), len(sets), squeeze=False, sharex="col")
    legend: dict[str, Any] = {}
    for axes_of_row, (field, name) in zip(grid, PANELS.items(), strict=True):
        for axes, data in zip(axes_of_row, sets, strict=True):
            own = [row for row in found if row.data == data]
            for row in own:
                legend[row.method] = _mark(axes, row, field)
            axes.set_xlim(left=-0.02 * max(row.mean("nats_high") for row in own))
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            if field == next(iter(PANELS)):
                axes.set_title(f"{data}, alignment {own[0].runs[0]['alignment']:.2f}", fontsize=10)
        axes_of_row[0].set_ylabel(name)
    for axes in grid[-1]:
        axes.set_xlabel("information about the bias, nats")
    named = [name for name in _NAMES if name in legend]
    handles = [legend[way] for way in named]
    figure.legend(handles, named, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _mark(axes: Any, row: Row, field: str) -> Any:
    from matplotlib import colormaps

    nats, value = row.mean("nats"), row.mean(field)
    number = _NAMES.index(row.method)
    return axes.errorbar(
        nats,
        value,
        xerr=[[nats - row.mean("nats_low")], [row.mean("nats_high") - nats]],
        yerr=[[value - min(row.values(field))], [max(row.values(field)) - value]],
        color=_COLORS.get(row.method) or colormaps["tab20"](number * 2 % 20 + number // 10),
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=8 if row.method in _COLORS else 6,
        linewidth=1,
        alpha=0.9,
        label=row.method,
    )
