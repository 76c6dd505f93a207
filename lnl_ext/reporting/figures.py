"""Figures: who is mistaken for whom, what training did, where features lie."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lnl_ext.measuring.audit_figure import blank_figure

__all__ = ["confusion_figure", "embedding_figure", "history_figure", "png"]

_LONG = 18  # letters of a class's name
_ABREAST = 40  # letters that the names along an axis may have together


def png(figure: Any, dpi: int = 110) -> bytes:
    """Return a matplotlib figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def confusion_figure(
    panels: Mapping[str, tuple[Tensor, Tensor]],
    *,
    classes: int,
    colors: Sequence[Sequence[float]] | None = None,
    row_name: str = "true class",
    names: Sequence[str] | None = None,
) -> Any:
    """Draw confusion matrices side by side, each row adding up to 1.

    Parameters
    ----------
    panels
        By title: the class of the row and the predicted class, each int64 of shape (N,). Negative
        rows are left out.
    classes
        Number of classes.
    colors
        A colour (red, green, blue in 0 to 1) per class, shown as squares along the axes.
    row_name
        What a row stands for.
    names
        Of the classes, instead of their numbers.

    Returns
    -------
    matplotlib.figure.Figure
    """
    side = max(4.4, 0.3 * classes)
    figure = blank_figure((side + 0.2) * len(panels), side)
    for axes, (title, (rows, predicted)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        if rows.shape != predicted.shape or rows.dim() != 1:
            raise ValueError(
                f"panels[{title!r}] has rows of shape {tuple(rows.shape)} and predictions of shape "
                f"{tuple(predicted.shape)}, expected (N,) both"
            )
        known = rows >= 0
        index = rows[known] * classes + predicted[known]
        counts = torch.bincount(index, minlength=classes**2).view(classes, classes).double()
        shares = (counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
        axes.imshow(shares, vmin=0, vmax=1, cmap="Greys")
        for (row, column), share in _cells(shares):
            if share >= 0.005:
                ink = "white" if share > 0.5 else "black"
                text = f"{share:.2f}".lstrip("0")
                style = {"ha": "center", "va": "center", "color": ink}
                axes.text(column, row, text, fontsize=max(5, min(9, 60 / classes)), **style)
        axes.set(title=title, xlabel="predicted", ylabel=row_name)
        axes.set_xticks(range(classes))
        axes.set_yticks(range(classes))
        if names is not None:
            shown = [name if len(name) <= _LONG else name[: _LONG - 1] + "…" for name in names]
            turned = {"rotation": 90} if max(map(len, shown)) * classes > _ABREAST else {}
            axes.set_xticklabels(shown, **turned)
            axes.set_yticklabels(shown)
        if colors is not None:
            _squares(axes, colors)
    return figure


def _cells(grid: Any) -> list[tuple[tuple[int, int], float]]:
    return [
        ((row, column), float(grid[row, column]))
        for row in range(grid.shape[0])
        for column in range(grid.shape[1])
    ]


def _squares(axes: Any, colors: Sequence[Sequence[float]]) -> None:
    for number, color in enumerate(colors):
        style: dict[str, Any] = {"marker": "s", "markersize": 8, "clip_on": False, "zorder": 5}
        axes.plot(-0.85, number, color=tuple(color), transform=axes.transData, **style)
        axes.plot(number, len(colors) - 0.15, color=tuple(color), transform=axes.transData, **style)
    axes.tick_params(pad=17, length=0)
    axes.set_xlim(-0.5, len(colors) - 0.5)
    axes.set_ylim(len(colors) - 0.5, -0.5)


def history_figure(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    panels: Mapping[str, Sequence[str]],
) -> Any:
    """Draw what was recorded during training, a panel a subject, a line a run and field.

    Parameters
    ----------
    histories
        By run: the records, as `Trainer.fit` returns and logs them.
    panels
        By title: the fields to draw. A record without a step, without
        a field, or with None, gives no point.

    Returns
    -------
    matplotlib.figure.Figure
    """
    columns = 2 if len(panels) > 1 else 1
    rows = math.ceil(len(panels) / columns)
    figure = blank_figure(5.2 * columns, 3.2 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, fields) in zip(grid, panels.items(), strict=False):
        for name, records in histories.items():
            for field in fields:
                points = [
                    (r["step"], r[field])
                    for r in records
                    if None not in (r.get("step"), r.get(field))
                ]
                if points:
                    marker = "o" if len(points) < 20 else None
                    label = name if len(fields) == 1 else f"{name}, {field}"
                    if len(histories) == 1 and len(fields) > 1:
                        label = field
                    if label.startswith("_"):
                        label = f" {label}"  # else matplotlib's legend leaves it out
                    axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4)
        axes.set(title=title, xlabel="step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(axes.lines) > 1 or len(histories) > 1:
            axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for unused in list(grid):
        unused.axis("off")
    return figure


def embedding_figure(
    features: Mapping[str, Tensor],
    labels: Tensor,
    colors: Tensor,
    *,
    color_name: str,
    seed: int = 0,
) -> Any:
    """Draw t-SNE maps of features, coloured by label above and by bias below.

    Parameters
    ----------
    features
        By title (a column each): (N, D, ...), flattened and reduced to 50 principal components
        first.
    labels
        (N,), up to ten classes.
    colors
        (N, 3), the bias as a colour, in 0 to 1.
    color_name
        What the colours stand for.
    seed
        Of the map.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    figure = blank_figure(4.4 * len(features), 8.4)
    grid = figure.subplots(2, len(features), squeeze=False)
    for column, (title, values) in enumerate(features.items()):
        flat = values.flatten(1).float().numpy()
        reduced = PCA(min(50, *flat.shape), random_state=seed).fit_transform(flat)
        points = TSNE(init="pca", random_state=seed).fit_transform(reduced)
        for axes, name, style in (
            (grid[0][column], "label", {"c": labels.numpy(), "cmap": "tab10"}),
            (grid[1][column], color_name, {"c": colors.clamp(0, 1).numpy()}),
        ):
            axes.scatter(points[:, 0], points[:, 1], s=6, linewidths=0, **style)
            axes.set_title(f"{title}, by {name}", fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_facecolor("#f2f2f2")
    return figure
