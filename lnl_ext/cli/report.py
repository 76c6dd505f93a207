"""Accuracy, overall and by group, as the commands print and keep it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lnl_ext.files import finite_or_none, write_whole
from lnl_ext.measuring.evaluation import Predictions
from lnl_ext.reporting import NamedGroups, groups_of

__all__ = ["Report", "write_json"]


@dataclasses.dataclass(frozen=True)
class Report:
    """Accuracy, and by group of every bias column."""

    samples: int
    accuracy: float
    columns: tuple[NamedGroups, ...]

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
        return min([column.groups.worst for column in self.columns], default=self.accuracy)

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


def write_json(path: Path, figures: Any) -> None:
    """Write results; NaN, which JSON lacks, as null."""
    write_whole(path, json.dumps(finite_or_none(figures), indent=2) + "\n")
