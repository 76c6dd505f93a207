"""Accuracy in the groups of label and bias, as text and as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lnl_ext.measuring.evaluation import Predictions
from lnl_ext.measuring.groups import GroupAccuracy
from lnl_ext.measuring.interval import proportion_interval
from lnl_ext.reporting.tables import Table, align

__all__ = ["NamedGroups", "groups_of", "with_interval"]

_WIDE_TEXT, _WIDE_TABLE = 8, 20  # label classes up to which there is a column for each


@dataclasses.dataclass(frozen=True)
class NamedGroups:
    """Accuracy by one bias column, and the names of its classes and of the labels."""

    name: str
    classes: tuple[str, ...]
    labels: tuple[str, ...]
    groups: GroupAccuracy

    @property
    def empty(self) -> int:
        """Number of groups without a sample."""
        return len(self.classes) * len(self.labels) - len(self.groups.samples)

    def text(self) -> list[str]:
        """Return the lines of a table."""
        shown, rows = self._grid(_WIDE_TEXT)
        cells = [[name, *(_cell(*figure) for figure in row)] for name, row in rows]
        return [*align([[self.name, *shown, "all"], *cells]), *self._told()]

    def table(self) -> Table:
        """Return the same for a page."""
        shown, rows = self._grid(_WIDE_TABLE)
        cells = [
            [name, *((accuracy, n) if n else None for accuracy, n in row)] for name, row in rows
        ]
        told = "; ".join(self._told())
        return Table((self.name, *shown, "all"), cells, note=told[0].upper() + told[1:])

    def _grid(
        self, widest: int
    ) -> tuple[tuple[str, ...], list[tuple[str, list[tuple[float, int]]]]]:
        """Return the labels shown, and accuracy and samples by bias class for these and for all."""
        shown = self.labels if len(self.labels) <= widest else ()
        found, rows = self.groups, []
        for number, name in enumerate(self.classes):
            groups = [(label, number) for label in range(len(shown))]
            row = [(found.accuracy.get(g, math.nan), found.samples.get(g, 0)) for g in groups]
            rows.append((name, [*row, found.of_bias(number)]))
        return shown, rows

    def _told(self) -> list[str]:
        """Say which group is the worst, and how the groups do on the whole."""
        label, bias = self.groups.worst_group
        low, high = self.groups.interval((label, bias))
        worst = (
            f"worst group: label {self.labels[label]}, {self.name} {self.classes[bias]}: "
            f"{_cell(self.groups.worst, self.groups.samples[label, bias])}, "
            f"95 %: {low:.3f} to {high:.3f}"
        )
        sides = [
            f"{side} {_cell(accuracy, samples)}"
            for side, (accuracy, samples) in self._sides().items()
            if accuracy is not None
        ]
        means = ", ".join([f"mean of the groups: {self.groups.balanced:.3f}", *sides])
        return [worst, means + (f"; groups without an image: {self.empty}" if self.empty else "")]

    def _sides(self) -> dict[str, tuple[float | None, int]]:
        groups = self.groups
        return {
            "aligned": (groups.aligned, groups.aligned_samples),
            "conflicting": (groups.conflicting, groups.conflicting_samples),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers."""
        return {
            "groups": [
                {
                    "label": self.labels[label],
                    "bias": self.classes[bias],
                    **with_interval("accuracy", accuracy, self.groups.samples[label, bias]),
                    "samples": self.groups.samples[label, bias],
                }
                for (label, bias), accuracy in sorted(self.groups.accuracy.items())
            ],
            **with_interval(
                "worst_group_accuracy",
                self.groups.worst,
                self.groups.samples[self.groups.worst_group],
            ),
            "balanced_accuracy": self.groups.balanced,
        } | {
            key: value
            for side, (accuracy, samples) in self._sides().items()
            if accuracy is not None
            for key, value in {
                **with_interval(side, accuracy, samples),
                f"{side}_samples": samples,
            }.items()
        }


def with_interval(name: str, share: float, samples: int) -> dict[str, float]:
    """Return a share and the ends of its 95 % interval, as results keep them."""
    low, high = proportion_interval(share, samples)
    return {name: share, f"{name}_low": low, f"{name}_high": high}


def _cell(accuracy: float, samples: int) -> str:
    return f"{accuracy:.3f} ({samples})" if samples else "-"


def groups_of(
    predictions: Predictions,
    target: Tensor,
    name: str,
    classes: Sequence[str],
    labels: Sequence[str],
    aligned: Tensor | None = None,
) -> NamedGroups | None:
    """Return the accuracy in every group of label and bias class; None where all are missing.

    ``aligned`` is that of `GroupAccuracy.of`.
    """
    if not (target >= 0).any():
        return None
    groups = GroupAccuracy.of(predictions.classes, predictions.labels, target, aligned)
    return NamedGroups(name, tuple(classes), tuple(labels), groups)
