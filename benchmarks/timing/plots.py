"""Reports as figures: bars for cases, lines for sweeps."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot

from .tables import number

OURS = "#0b6e4f"
OTHERS = "#8d99ae"
COLORS = {"fused": OURS, "eager": "#8d99ae", "exp": "#e09f3e", "products": "#e09f3e"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the report's figure as PNG."""
    mpl.use("Agg")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = _lines(report) if "panel" in report["rows"][0] else _bars(report)
    figure.suptitle(report["title"].replace("`", ""))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _grid(count: int, height: float) -> tuple[Any, list[Any]]:
    columns = 1 if count == 1 else 2
    lines = math.ceil(count / columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(11, height * lines + 0.6), squeeze=False, layout="constrained"
    )
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.set_visible(False)
    return figure, flat[:count]


def _bars(report: dict[str, Any]) -> Any:
    rows = report["rows"]
    most = max(len(row["values"]) for row in rows)
    figure, panels = _grid(len(rows), 0.34 * most + 0.9)
    for axes, row in zip(panels, rows, strict=True):
        names = list(row["values"])[::-1]
        middle = [row["values"][name]["median"] for name in names]
        low = [m - row["values"][name]["q1"] for m, name in zip(middle, names, strict=True)]
        high = [row["values"][name]["q3"] - m for m, name in zip(middle, names, strict=True)]
        colors = [OURS if _ours(name) else OTHERS for name in names]
        error = {"ecolor": "#333333", "capsize": 3}
        axes.barh(names, middle, xerr=[low, high], color=colors, error_kw=error)
        for position, name in enumerate(names):
            ratio = row["ratios"][name]["median"]
            label = f" {number(row['values'][name]['median'])} {report['unit']}"
            label += "" if name == report["base"] else f", {ratio:.2f}x"
            x = row["values"][name]["q3"]
            axes.annotate(
                label, (x, position), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_title(textwrap.fill(row["case"], 40), fontsize=10)  # the labels need room
        axes.margins(x=0.35)
        axes.set_xlim(left=0)
        axes.set_xlabel(report["unit"])
        axes.tick_params(axis="y", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _ours(name: str) -> bool:
    return name.startswith(("fused", "joint", "two_step"))


def _lines(report: dict[str, Any]) -> Any:
    titles = list(dict.fromkeys(row["panel"] for row in report["rows"]))
    figure, panels = _grid(len(titles), 2.9)
    for axes, title in zip(panels, titles, strict=True):
        rows = [row for row in report["rows"] if row["panel"] == title]
        x = [row["x"] for row in rows]
        for name in rows[0]["values"]:
            values = [row["values"][name] for row in rows]
            color = COLORS[name]
            axes.plot(x, [v["median"] for v in values], "o-", color=color, label=name, ms=4)
            axes.fill_between(
                x, [v["q1"] for v in values], [v["q3"] for v in values], color=color, alpha=0.2
            )
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylabel(report["unit"])
        axes.set_xlabel(title.split(":", 1)[1].split(",")[0].strip())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
