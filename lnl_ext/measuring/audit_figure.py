"""The figure of an audit."""

from __future__ import annotations

import os
from typing import Any

from lnl_ext.measuring.report import AuditReport, BiasAudit, GroupAudit


def draw(report: AuditReport, path: str | os.PathLike[str]) -> None:
    """Draw a row for every bias: accuracy of the probes, their information, the groups."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    biases = report.biases
    columns = 3 if any(bias.groups is not None for bias in biases.values()) else 2
    figure = Figure(figsize=(4.2 * columns, 3.4 * len(biases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(biases), columns, squeeze=False)
    for row, (name, bias) in zip(axes, biases.items(), strict=True):
        _accuracy(row[0], name, bias)
        _information(row[1], name, bias)
        if bias.groups is not None:
            _groups(row[2], name, bias.groups)
        elif columns == 3:
            row[2].axis("off")
    figure.savefig(path, dpi=120)


def _bars(axis: Any, bias: BiasAudit, values: list[float], intervals: list[Any]) -> None:
    errors = [
        [max(0.0, v - i.low) for v, i in zip(values, intervals, strict=True)],
        [max(0.0, i.high - v) for v, i in zip(values, intervals, strict=True)],
    ]
    axis.bar(list(bias.probes), values, yerr=errors, capsize=4, color="#4c72b0", width=0.6)


def _accuracy(axis: Any, name: str, bias: BiasAudit) -> None:
    probes = list(bias.probes.values())
    _bars(axis, bias, [p.accuracy for p in probes], [p.accuracy_interval for p in probes])
    axis.axhline(bias.majority, color="#c44e52", linestyle="--", label="most frequent class")
    axis.axhline(bias.chance, color="#8c8c8c", linestyle=":", label="chance")
    axis.set(title=f"{name}: accuracy of fresh probes", ylim=(0, 1), ylabel="accuracy")
    axis.legend(fontsize="small")


def _information(axis: Any, name: str, bias: BiasAudit) -> None:
    probes = list(bias.probes.values())
    _bars(axis, bias, [p.information for p in probes], [p.information_interval for p in probes])
    axis.axhline(bias.entropy, color="#c44e52", linestyle="--", label="H(b)")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(title=f"{name}: lower bound of I(b; f)", ylabel="nats")
    axis.legend(fontsize="small")


def _groups(axis: Any, name: str, groups: GroupAudit) -> None:
    labels = sorted({label for label, _ in groups.accuracy})
    biases = sorted({bias for _, bias in groups.accuracy})
    grid = [
        [groups.accuracy.get((label, bias), float("nan")) for bias in biases] for label in labels
    ]
    shown = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(biases)), biases)
    axis.set_yticks(range(len(labels)), labels)
    axis.set(title=f"{name}: accuracy by group", xlabel="bias class", ylabel="label")
    if len(labels) * len(biases) <= 144:
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                if value == value:  # not NaN: a group without samples stays empty
                    color = "black" if value > 0.6 else "white"
                    axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=color, size=7)
    axis.figure.colorbar(shown, ax=axis)
