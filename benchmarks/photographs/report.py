"""What the benchmarks on photographs report of a run: a line of results, a table, a page."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from recording import records

from lnl_ext.reporting import (
    Confusion,
    Leak,
    RunSummary,
    Table,
    groups_of,
    trainer_settings,
)
from photographs import table as recorded
from photographs.runs import Measured, Run, Task, choose, measure, ready

LEAKAGE = (
    "How often a new head on the frozen features predicts the bias of unbiased images; it was "
    "trained on the other half of the unbiased set. Majority: always predicting the most frequent "
    "class. Information about the bias: H(bias) - CE of the head, mean of its predictions."
)


def carry_out(
    benchmark: str,
    make: Callable[[argparse.Namespace], Task],
    options: argparse.Namespace,
    arguments: Sequence[str] | None,
) -> None:
    """Train, measure, print and append; or only print, as the options say."""
    if options.table:
        print(recorded.tables(records.read(options.results)))
        return
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    started = time.monotonic()
    task = ready(options, make(options))
    if options.choose:
        print(choose(options, task))
        return
    measured = measure(benchmark, options, task)
    records.append(options.results, measured.run)
    print(table([measured.run]))
    if options.output is not None:
        command = records.command_line(benchmark, arguments)
        records.write_page(options.output, summary(measured, task, options, command))
    print(f"{(time.monotonic() - started) / 60:.1f} minutes in all; appended to {options.results}")


def summary(
    measured: Measured, task: Task, options: argparse.Namespace, command: str
) -> RunSummary:
    """Return what the page of a run is to show."""
    run = measured.run
    figures = {
        "method": run.method,
        "unbiased set": run.test_accuracy,
        "opposite bias": run.opposite_accuracy,
        "epochs": f"{run.epoch:g}",
        "training images": run.train_samples,
        "minutes of training": f"{run.minutes:.1f}",
    }
    groups, confusions = {}, []
    for title, predictions, images in (
        ("unbiased set", measured.test, task.sets.test),
        ("opposite bias", measured.opposite, task.sets.opposite),
    ):
        for target, classes in task.groups.items():
            column = groups_of(predictions, images.bias[target], target, classes, task.classes)
            if column is not None:
                groups[f"Accuracy by {run.label} and {target}: {title}"] = column.table()
        predicted = predictions.classes
        confusions.append(
            Confusion(title, predictions.labels, predicted, task.classes, row_name=run.label)
        )
    leak = Leak(
        task.probe.name,
        accuracy=run.leakage,
        majority=run.leakage_chance,
        information=run.information,
        samples=measured.probe_samples,
    )
    return RunSummary(
        title=f"{run.benchmark}: {run.method}, trained on {run.train_split}, seed {run.seed}",
        about=[
            f"The label is the {run.label}. Accuracy is that of the last epoch on halves of the "
            "unbiased set and of the set that is biased the other way round."
        ],
        results=Table(tuple(figures), [tuple(figures.values())]),
        command=command,
        configuration={**vars(options), "trainer": trainer_settings(measured.trainer)},
        histories={run.method: measured.trainer.history},
        groups=groups,
        leaks=[leak],
        leakage_note=LEAKAGE,
        confusions=confusions,
    )


def table(runs: Sequence[Run]) -> str:
    """Set runs out as text."""
    header = (
        "method",
        "trained on",
        "label",
        "seed",
        "epochs",
        "test acc.",
        "opposite",
        "leakage",
        "chance",
        "minutes",
    )
    rows = [
        (
            run.method,
            run.train_split,
            run.label,
            str(run.seed),
            f"{run.epoch:g}",
            f"{run.test_accuracy:.4f}",
            f"{run.opposite_accuracy:.4f}",
            f"{run.leakage:.4f}",
            f"{run.leakage_chance:.4f}",
            f"{run.minutes:.1f}",
        )
        for run in runs
    ]
    return records.text(header, rows)
