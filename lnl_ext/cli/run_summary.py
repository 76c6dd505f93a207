"""What the page of a training run shows."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torchvision

from lnl_ext.cli.arguments import saved_value
from lnl_ext.cli.leakage import Figures, leaks
from lnl_ext.cli.options import TrainOptions
from lnl_ext.cli.report import Report
from lnl_ext.cli.run_data import RunData
from lnl_ext.measuring.evaluation import Predictions
from lnl_ext.reporting import Confusion, RunSummary, Table, trainer_settings
from lnl_ext.training.distributed import Processes
from lnl_ext.training.trainer import Trainer

__all__ = ["Found", "run_summary"]

_LEAKAGE = (
    "How often a fresh probe on the frozen features predicts the bias of validation images that it "
    "has not seen; it was trained on others of them. The strongest of several kinds of probes. "
    "Before: at the end of pretraining. After: at the end of training. Label alone: predicting "
    "the most frequent bias of the image's label, which features that are good for the label "
    "allow. Majority: always predicting the most frequent bias. Information: H(bias) - CE of the "
    "probe at the end, with its interval."
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
    figures = {
        "method": options.method,
        "network": options.arch,
        "validation accuracy": report.accuracy,
        "worst group": report.worst if report.columns else None,
        "validation images": report.samples,
        "steps": trainer.step,
        "minutes of training": f"{trainer.seconds / 60:.1f}",
    }
    settings = {
        field.name: saved_value(getattr(options, field.name))
        for field in dataclasses.fields(options)
        if field.metadata["saved"]
    }
    label = options.label_column or "folder"
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
        histories={options.method: trainer.history},
        groups={
            f"Accuracy by {label} and {column.name}": column.table() for column in report.columns
        },
        leaks=leaks(found.before, found.after, _end_of_pretraining(trainer)),
        leakage_note=_LEAKAGE,
        confusions=[
            Confusion(
                "validation images",
                found.predictions.labels,
                found.predictions.classes,
                data.labels,
                row_name=label,
            )
        ],
        environment={
            "torchvision": torchvision.__version__,
            "device": str(trainer.device),
            "processes": processes.world_size,
        },
    )


def _end_of_pretraining(trainer: Trainer) -> int:
    steps = [record["step"] for record in trainer.history if record["stage"] == "pretrain"]
    return max(steps, default=0)
