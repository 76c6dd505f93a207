"""Accuracy in the groups of label and bias, as numbers, as text and as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lnl_ext.measuring.evaluation import Predictions, group_accuracy
from lnl_ext.reporting.tables import Table, align

__all__ = ["ColumnReport", "groups_of"]

_WIDE_TEXT, _WIDE_TABLE = 8, 20  # label classes up to which there is a column for each


@dataclasses.dataclass(frozen=True)
class ColumnReport:
    """Accuracy by one bias column."""

    name: str
    classes: tuple[str, ...]
    labels: tuple[str, ...]
    accuracy: dict[tuple[int, int], float]
    """By label and bias class, where there are samples."""
    samples: dict[tuple[int, int], int]

    def of_class(self, bias: int) -> tuple[float, int]:
        """Return accuracy and samples of a bias class, all labels together."""
        groups = [group for group in self.samples if group[1] == bias]
        total = sum(self.samples[group] for group in groups)
        right = sum(self.accuracy[group] * self.samples[group] for group in groups)
        return (right / total if total else math.nan), total

    @property
    def worst(self) -> tuple[int, int]:
        """The group of label and bias class with the lowest accuracy."""
        return min(self.accuracy, key=lambda group: self.accuracy[group])

    @property
    def empty(self) -> int:
        """Number of groups without a sample."""
        return len(self.classes) * len(self.labels) - len(self.samples)

    def text(self) -> list[str]:
        """Return the lines of a table."""
        shown, rows = self._grid(_WIDE_TEXT)
        cells = [[name, *(_cell(*figure) for figure in row)] for name, row in rows]
        return [*align([[self.name, *shown, "all"], *cells]), self._worst_text()]

    def table(self) -> Table:
        """Return the same for a page."""
        shown, rows = self._grid(_WIDE_TABLE)
        cells = [
            [name, *((accuracy, n) if n else None for accuracy, n in row)] for name, row in rows
        ]
        worst = self._worst_text()
        return Table((self.name, *shown, "all"), cells, note=worst[0].upper() + worst[1:])

    def _grid(
        self, widest: int
    ) -> tuple[tuple[str, ...], list[tuple[str, list[tuple[float, int]]]]]:
        """Return the labels shown, and accuracy and samples by bias class for these and for all."""
        shown = self.labels if len(self.labels) <= widest else ()
        rows = []
        for number, name in enumerate(self.classes):
            groups = [(label, number) for label in range(len(shown))]
            row = [(self.accuracy.get(g, math.nan), self.samples.get(g, 0)) for g in groups]
            rows.append((name, [*row, self.of_class(number)]))
        return shown, rows

    def _worst_text(self) -> str:
        label, bias = self.worst
        return (
            f"worst group: label {self.labels[label]}, {self.name} {self.classes[bias]}: "
            f"{_cell(self.accuracy[self.worst], self.samples[self.worst])}"
            + (f"; groups without an image: {self.empty}" if self.empty else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers."""
        return {
            "groups": [
                {
                    "label": self.labels[label],
                    "bias": self.classes[bias],
                    "accuracy": self.accuracy[label, bias],
                    "samples": self.samples[label, bias],
                }
                for label, bias in sorted(self.accuracy)
            ],
            "worst_group_accuracy": self.accuracy[self.worst],
        }


def _cell(accuracy: float, samples: int) -> str:
    return f"{accuracy:.3f} ({samples})" if samples else "-"


def groups_of(
    predictions: Predictions,
    target: Tensor,
    name: str,
    classes: Sequence[str],
    labels: Sequence[str],
) -> ColumnReport | None:
    """Return the accuracy in every group of label and bias class; None where all are missing."""
    if not (target >= 0).any():
        return None
    size = len(classes)
    groups = (predictions.labels * size + target).where(target >= 0, -1)
    found = group_accuracy(predictions, groups)
    return ColumnReport(
        name=name,
        classes=tuple(classes),
        labels=tuple(labels),
        accuracy={divmod(group, size): value for group, value in found.accuracy.items()},
        samples={divmod(group, size): count for group, count in found.samples.items()},
    )
