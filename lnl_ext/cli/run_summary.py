"""What the page of a training run shows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision

from lnl_ext.cli.arguments import saved_value
from lnl_ext.cli.data_summary import associations, contingency
from lnl_ext.cli.leakage import Figures, leaks
from lnl_ext.cli.options import TrainOptions
from lnl_ext.cli.report import Report
from lnl_ext.cli.run_data import RunData
from lnl_ext.cli.worst_images import worst_images
from lnl_ext.measuring.evaluation import Predictions
from lnl_ext.reporting import Confusion, RunSummary, Table, trainer_settings
from lnl_ext.training.distributed import Processes
from lnl_ext.training.run_log import METRICS, Record, read_records
from lnl_ext.training.trainer import Trainer

__all__ = ["Found", "run_summary"]

_PANELS = 6  # classes of a bias and labels up to which every class has a confusion matrix
_LEAKAGE = (
    "How often a fresh probe on the frozen features predicts the bias of validation images that it "
    "has not seen; it was trained on others of them. The strongest of several kinds of probes. "
    "Before: at the end of the last epoch before unlearning. After: at the end of training. Label "
    "alone: predicting the most frequent bias of the image's label, which features that are good "
    "for the label allow. Majority: always predicting the most frequent bias. Information: H(bias) "
    "- CE of the probe at the end, with its interval."
)


class Found(NamedTuple):
    """What a run found."""

    predictions: Predictions
    """Of the validation images."""
    report: Report
    before: Figures
    after: Figures
    epoch: str
    """Which one it is of."""


def run_summary(
    options: TrainOptions,
    data: RunData,
    trainer: Trainer,
    found: Found,
    command: str,
    processes: Processes,
) -> RunSummary:
    """Return what the page of a run is to show."""
    assert options.output is not None
    report = found.report
    area, interval = report.auc
    figures = {
        "method": options.method,
        "network": options.arch,
        "validation accuracy": (report.accuracy, report.samples),
        "worst group": report.worst_of if report.columns else None,
        "mean of the groups": report.balanced if report.columns else None,
        "AUC (95 %)": f"{area:.3f} ({interval.low:.3f} to {interval.high:.3f})",
        "steps": trainer.step,
        "minutes of training": f"{trainer.seconds / 60:.1f}",
    }
    settings = {
        field.name: saved_value(getattr(options, field.name))
        for field in dataclasses.fields(options)
        if field.metadata["saved"]
    }
    label = options.label_column or "folder"
    trained = associations(data.train, data.labels, data.bias)
    return RunSummary(
        title=f"{options.output.absolute().name}: {options.method}, label {label}",
        about=[
            *data.describe().splitlines(),
            f"Accuracy is that of the {found.epoch} on the validation images.",
        ],
        results=Table(
            [name for name, value in figures.items() if value is not None],
            [[value for value in figures.values() if value is not None]],
        ),
        command=command,
        configuration={**settings, "trainer": trainer_settings(trainer)},
        histories={options.method: _records(trainer, options.output / METRICS)},
        data={
            f"Training images by {label} and {name}": contingency(
                trained[name], name, classes, data.labels, label
            )
            for name, classes in data.bias.items()
        },
        groups={
            f"Accuracy by {label} and {column.name}": column.table() for column in report.columns
        },
        leaks=leaks(found.before, found.after),
        leakage_note=_LEAKAGE,
        confusions=[
            Confusion(
                "validation images",
                found.predictions.labels,
                found.predictions.classes,
                data.labels,
                row_name=label,
            ),
            *_by_bias(report, data, label),
        ],
        pictures=worst_images(report, data.validation, label),
        environment={
            "torchvision": torchvision.__version__,
            "device": str(trainer.device),
            "processes": processes.world_size,
        },
    )


def _by_bias(report: Report, data: RunData, label: str) -> list[Confusion]:
    """Return the confusion in every class of the bias columns that have few."""
    labels, predicted = report.predictions.labels, report.predictions.classes
    return [
        Confusion(
            f"{column.name}: {name}",
            torch.where(data.validation.bias[column.name] == number, labels, -1),
            predicted,
            data.labels,
            row_name=label,
        )
        for column in report.columns
        if len(column.classes) <= _PANELS and len(data.labels) <= _PANELS
        for number, name in enumerate(column.classes)
        if column.groups.of_bias(number)[1]
    ]


def _records(trainer: Trainer, metrics: Path) -> list[Record]:
    """Return what was recorded at steps, and of the epochs what was measured at their end."""
    steps = [
        {name: value for name, value in record.items() if name != "label_accuracy"}  # of a batch
        for record in read_records(metrics)
        if record["kind"] == "step"
    ]
    if not steps:
        return trainer.history
    taken = steps[0].keys() - {"step"}
    epochs = [
        {name: value for name, value in record.items() if name not in taken}
        for record in trainer.history
    ]
    return [*steps, *epochs]
