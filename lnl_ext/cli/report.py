"""What the commands find, as numbers and as text."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..evaluation import Predictions, group_accuracy
from ..json_values import finite_or_none
from .files import write_whole
from .leakage import Leakage

__all__ = ["ColumnReport", "Report", "groups_of", "write_json"]

_WIDE = 8  # label classes up to which a table has a column for each


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
        shown = self.labels if len(self.labels) <= _WIDE else ()
        rows = [[self.name, *shown, "all"]]
        for number, name in enumerate(self.classes):
            groups = [(label, number) for label in range(len(shown))]
            cells = [_cell(self.accuracy.get(g), self.samples.get(g, 0)) for g in groups]
            rows.append([name, *cells, _cell(*self.of_class(number))])
        label, bias = self.worst
        lines = align(rows)
        lines.append(
            f"worst group: label {self.labels[label]}, {self.name} {self.classes[bias]}: "
            f"{_cell(self.accuracy[self.worst], self.samples[self.worst])}"
            + (f"; groups without an image: {self.empty}" if self.empty else "")
        )
        return lines

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


def _cell(accuracy: float | None, samples: int) -> str:
    return f"{accuracy:.3f} ({samples})" if accuracy is not None and samples else "-"


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if position else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


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


@dataclasses.dataclass(frozen=True)
class Report:
    """Accuracy, by group, and leakage."""

    samples: int
    accuracy: float
    columns: tuple[ColumnReport, ...]

    @classmethod
    def of(
        cls,
        predictions: Predictions,
        bias: Mapping[str, Tensor],
        classes: Mapping[str, Sequence[str]],
        labels: Sequence[str],
    ) -> Report:
        """Evaluate predictions."""
        columns = [
            groups_of(predictions, bias[name], name, names, labels)
            for name, names in classes.items()
        ]
        found = tuple(column for column in columns if column is not None)
        return cls(len(predictions.labels), predictions.accuracy, found)

    @property
    def worst(self) -> float:
        """Worst-group accuracy over all columns; the accuracy where there is none."""
        return min(
            [column.accuracy[column.worst] for column in self.columns], default=self.accuracy
        )

    def text(self, title: str) -> str:
        """Return the whole as text."""
        lines = [f"Accuracy on {self.samples} {title}: {self.accuracy:.3f}"]
        for column in self.columns:
            lines += ["", f"By label and {column.name}, accuracy (images):", *column.text()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers."""
        return {
            "samples": self.samples,
            "accuracy": self.accuracy,
            "worst_group_accuracy": self.worst,
            "bias": {column.name: column.to_dict() for column in self.columns},
        }


def leakage_text(stages: Mapping[str, Mapping[str, Leakage]]) -> str:
    """Return a table of leakage: a line per bias column, the stages beside each other.

    Parameters
    ----------
    stages
        What the features are, and the leakage of each column there.
    """
    names = list(dict.fromkeys(name for stage in stages.values() for name in stage))
    rows = [["", *stages, "label alone", "majority"]]
    for name in names:
        cells = [f"{s[name].accuracy:.3f}" if name in s else "-" for s in stages.values()]
        last = [stage[name] for stage in stages.values() if name in stage][-1]
        rows.append([name, *cells, f"{last.label_only:.3f}", f"{last.majority:.3f}"])
    return "\n".join(
        ["Leakage: how often a fresh probe on the frozen features names the bias", *align(rows)]
    )


def write_json(path: Path, figures: Any) -> None:
    """Write figures; NaN, which JSON lacks, as null."""
    write_whole(path, json.dumps(finite_or_none(figures), indent=2) + "\n")
