"""What an audit found, as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lnl_ext.measuring.groups import GroupAccuracy

if TYPE_CHECKING:
    from lnl_ext.measuring.audit_report import AuditReport, BiasAudit

__all__ = ["audit_figure", "blank_figure"]


def blank_figure(width: float, height: float) -> Any:
    """Make a matplotlib figure of this size in inches."""
    # Not through pyplot: no display, no state, no figure that stays open.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def audit_figure(report: AuditReport) -> Any:
    """Draw a row for every bias: accuracy of the probes, their information, the groups.

    Parameters
    ----------
    report
        What `lnl_ext.audit` returned.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    biases = report.biases
    columns = 3 if any(bias.groups is not None for bias in biases.values()) else 2
    figure = blank_figure(4.2 * columns, 3.4 * len(biases))
    axes = figure.subplots(len(biases), columns, squeeze=False)
    for row, (name, bias) in zip(axes, biases.items(), strict=True):
        _probe_accuracy(row[0], name, bias)
        _probe_information(row[1], name, bias)
        if bias.groups is not None:
            _group_grid(row[2], name, bias.groups)
        elif columns == 3:
            row[2].axis("off")
    return figure


def _probe_bars(axis: Any, bias: BiasAudit, values: list[float], intervals: list[Any]) -> None:
    errors = [
        [max(0.0, v - i.low) for v, i in zip(values, intervals, strict=True)],
        [max(0.0, i.high - v) for v, i in zip(values, intervals, strict=True)],
    ]
    axis.bar(list(bias.probes), values, yerr=errors, capsize=4, color="#4c72b0", width=0.6)


def _probe_accuracy(axis: Any, name: str, bias: BiasAudit) -> None:
    probes = list(bias.probes.values())
    _probe_bars(axis, bias, [p.accuracy for p in probes], [p.accuracy_interval for p in probes])
    axis.axhline(bias.majority, color="#c44e52", linestyle="--", label="most frequent class")
    axis.axhline(bias.chance, color="#8c8c8c", linestyle=":", label="chance")
    axis.set(title=f"{name}: accuracy of fresh probes", ylim=(0, 1), ylabel="accuracy")
    axis.legend(fontsize="small")


def _probe_information(axis: Any, name: str, bias: BiasAudit) -> None:
    probes = list(bias.probes.values())
    _probe_bars(
        axis, bias, [p.information for p in probes], [p.information_interval for p in probes]
    )
    axis.axhline(bias.entropy, color="#c44e52", linestyle="--", label="H(b)")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(title=f"{name}: lower bound of I(b; f)", ylabel="nats")
    axis.legend(fontsize="small")


def _group_grid(axis: Any, name: str, groups: GroupAccuracy) -> None:
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
