"""What the page of a run on coloured MNIST shows."""

from __future__ import annotations

import argparse

from digits.runs import Data, Measured
from lnl_ext.measuring.groups import GroupAccuracy
from lnl_ext.paper.colored_mnist import MEAN_COLORS
from lnl_ext.reporting import (
    Confusion,
    Leak,
    RunSummary,
    Table,
    groups_of,
    trainer_settings,
)

DIGITS = [str(digit) for digit in range(10)]
COLORS = [[value / 255 for value in color] for color in MEAN_COLORS]
LEAKAGE = (
    "How often a new head on the frozen features predicts the right one of 8 bins of the digit's "
    "colour, mean of red, green and blue, on the test set; it was trained on training digits "
    "coloured like the test set. Before: on the features from which the last stage began, "
    "new weights where nothing was trained before. Majority: always predicting the most frequent "
    "bin. Information about the colour: H(colour) - CE of the head after the training, a channel."
)


def summary(
    measured: Measured, data: Data, options: argparse.Namespace, command: str
) -> RunSummary:
    """Return what the page of a run is to show."""
    run, trainers, predictions = measured
    labels, owner = predictions.labels, data.test.mean_color
    predicted = predictions.classes
    figures = {
        "method": run.method,
        "test accuracy": run.test_accuracy,
        "the paper's": run.paper_accuracy,
        "epochs": f"{run.epoch:g}",
        "training digits": run.train_samples,
        "minutes of training": f"{run.minutes:.1f}",
    }
    groups = {}
    confusions = [Confusion("by digit", labels, predicted, DIGITS, "digit", COLORS)]
    if column := groups_of(predictions, owner, "whose colour", DIGITS, DIGITS):
        found = GroupAccuracy.of(predicted, labels, owner, aligned=owner == labels)
        figures["its own colour"] = found.aligned
        figures["another's colour"] = found.conflicting
        figures["worst group"] = found.worst
        groups["Accuracy by the digit whose colour it has (rows) and digit"] = column.table()
        confusions.append(
            Confusion("by colour", owner, predicted, DIGITS, "whose colour it has", COLORS)
        )
    leak = Leak(
        "colour",
        accuracy=run.leakage,
        majority=run.leakage_chance,
        before=run.leakage_before,
        information=run.information,
        samples=len(data.probe_test),
    )
    # The stages before the last one are of another method.
    names = [*("baseline" for _ in trainers[:-1]), run.method]
    stages = dict(zip(names, trainers, strict=True))
    return RunSummary(
        title=f"Coloured MNIST: {run.method}, variance {run.variance:g}, seed {run.seed}",
        about=[
            "Trained on digits whose colour determines them, measured on test digits whose colour "
            "is that of a digit drawn at random. All numbers are of the last epoch."
        ],
        results=Table(tuple(figures), [tuple(figures.values())]),
        command=command,
        configuration={
            **vars(options),
            **{f"trainer of {name}": trainer_settings(stage) for name, stage in stages.items()},
        },
        histories={name: stage.history for name, stage in stages.items()},
        groups=groups,
        leaks=[leak],
        leakage_note=LEAKAGE,
        confusions=confusions,
    )
