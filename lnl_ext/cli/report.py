"""Accuracy, overall and by group, as the commands print and keep it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lnl_ext.data.association import Association
from lnl_ext.files import finite_or_none, write_whole
from lnl_ext.measuring.evaluation import Predictions
from lnl_ext.measuring.interval import Interval, proportion_interval
from lnl_ext.measuring.ranking import auc
from lnl_ext.reporting import NamedGroups, groups_of, with_interval

__all__ = ["Report", "write_json"]


@dataclasses.dataclass(frozen=True)
class Report:
    """Accuracy, and by group of every bias column."""

    samples: int
    accuracy: float
    columns: tuple[NamedGroups, ...]
    predictions: Predictions

    @classmethod
    def of(
        cls,
        predictions: Predictions,
        bias: Mapping[str, Tensor],
        classes: Mapping[str, Sequence[str]],
        labels: Sequence[str],
        associations: Mapping[str, Association] | None = None,
    ) -> Report:
        """Evaluate predictions.

        ``associations`` are those of the training images, by bias column: they say which samples
        are aligned.
        """
        columns = []
        for name, names in classes.items():
            trained = (associations or {}).get(name)
            aligned = None
            if trained is not None and trained.samples:
                aligned = trained.is_aligned(predictions.labels, bias[name])
            columns.append(groups_of(predictions, bias[name], name, names, labels, aligned))
        found = tuple(column for column in columns if column is not None)
        return cls(len(predictions.labels), predictions.accuracy, found, predictions)

    @property
    def worst(self) -> float:
        """Worst-group accuracy over all columns; the accuracy where there is none."""
        return min([column.groups.worst for column in self.columns], default=self.accuracy)

    @property
    def balanced(self) -> float:
        """Mean accuracy of the groups, the lowest of all columns; the accuracy without columns."""
        return min([column.groups.balanced for column in self.columns], default=self.accuracy)

    @functools.cached_property
    def auc(self) -> tuple[float, Interval]:
        """Area under the ROC curve, and its interval."""
        return auc(*self.predictions)

    @property
    def worst_of(self) -> tuple[float, int]:
        """Worst-group accuracy over all columns and its samples; of all where there is none."""
        if not self.columns:
            return self.accuracy, self.samples
        groups = min((column.groups for column in self.columns), key=lambda found: found.worst)
        return groups.worst, groups.samples[groups.worst_group]

    def text(self, title: str) -> str:
        """Return the whole as text."""
        low, high = proportion_interval(self.accuracy, self.samples)
        area, interval = self.auc
        lines = [
            f"Accuracy on {self.samples} {title}: {self.accuracy:.3f} (95 %: {low:.3f} to "
            f"{high:.3f}); AUC {area:.3f} (95 %: {interval.low:.3f} to {interval.high:.3f})"
        ]
        for column in self.columns:
            lines += ["", f"By label and {column.name}, accuracy (images):", *column.text()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers."""
        area, interval = self.auc
        return {
            "samples": self.samples,
            **with_interval("accuracy", self.accuracy, self.samples),
            "auc": area,
            "auc_low": interval.low,
            "auc_high": interval.high,
            **with_interval("worst_group_accuracy", *self.worst_of),
            "balanced_accuracy": self.balanced,
            "bias": {column.name: column.to_dict() for column in self.columns},
        }


def write_json(path: Path, figures: Any) -> None:
    """Write results; NaN, which JSON lacks, as null."""
    write_whole(path, json.dumps(finite_or_none(figures), indent=2) + "\n")
