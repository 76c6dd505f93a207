"""What the commands find, as numbers and as text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lnl_ext.cli.leakage import Leakage
from lnl_ext.files import finite_or_none, write_whole
from lnl_ext.measuring.evaluation import Predictions
from lnl_ext.reporting import ColumnReport, Leak, groups_of
from lnl_ext.reporting.tables import align

__all__ = ["Report", "leakage_text", "leaks", "write_json"]


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


def leaks(
    before: Mapping[str, Leakage], after: Mapping[str, Leakage], before_step: int
) -> list[Leak]:
    """Return the same for the page of a run."""
    return [
        Leak(
            name,
            accuracy=leakage.accuracy,
            majority=leakage.majority,
            before=before[name].accuracy if name in before else None,
            before_step=before_step,
            label_only=leakage.label_only,
            information=leakage.information,
            samples=leakage.samples,
        )
        for name, leakage in after.items()
    ]


def write_json(path: Path, figures: Any) -> None:
    """Write figures; NaN, which JSON lacks, as null."""
    write_whole(path, json.dumps(finite_or_none(figures), indent=2) + "\n")
