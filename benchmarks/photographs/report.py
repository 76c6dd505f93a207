"""What the benchmarks on photographs tell of a run: a line of results, a table, a page."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lnl_ext.reporting import (
    PAGE,
    Confusion,
    Leak,
    RunSummary,
    Table,
    groups_of,
    trainer_settings,
    write_run_page,
)
from photographs.runs import Measured, Run, Sets

LEAKAGE = (
    "How often a new head on the frozen features names the bias of unbiased images; it learned "
    "from the other half of the unbiased set. Majority: always naming the most frequent class. "
    "Information: what the head knows of the bias, mean of its predictions."
)


@dataclasses.dataclass(frozen=True)
class Names:
    """What the numbers of a benchmark stand for."""

    labels: Sequence[str]
    bias: Mapping[str, Sequence[str]]
    """By target with one class a sample: the groups that accuracy is told of."""
    probed: str
    """What the probe is to name."""


def report(
    measured: Measured,
    sets: Sets,
    names: Names,
    options: argparse.Namespace,
    arguments: Sequence[str] | None,
) -> None:
    """Append a run to the results and print it; with an output folder, write its page."""
    append(options.results, measured.run)
    print(table([measured.run]))
    if options.output is not None:
        given = sys.argv[1:] if arguments is None else arguments
        script = f"benchmarks/{measured.run.benchmark}.py"
        command = shlex.join(["python", script, *given])
        page = options.output / PAGE
        told = write_run_page(page, summary(measured, sets, names, options, command))
        print(told or f"page: {page}")


def summary(
    measured: Measured, sets: Sets, names: Names, options: argparse.Namespace, command: str
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
        ("unbiased set", measured.test, sets.test),
        ("opposite bias", measured.opposite, sets.opposite),
    ):
        for target, classes in names.bias.items():
            column = groups_of(predictions, images.bias[target], target, classes, names.labels)
            if column is not None:
                groups[f"Accuracy by {run.label} and {target}: {title}"] = column.table()
        predicted = predictions.logits.argmax(1)
        confusions.append(
            Confusion(title, predictions.labels, predicted, names.labels, row_name=run.label)
        )
    leak = Leak(
        names.probed,
        accuracy=run.leakage,
        majority=run.leakage_chance,
        information=run.information,
        samples=measured.probe_samples,
    )
    return RunSummary(
        title=f"{run.benchmark}: {run.method}, trained on {run.train_split}, seed {run.seed}",
        about=[
            f"The {run.label} is to be told. Accuracy is that of the last epoch on halves of the "
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
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def append(path: Path, run: Run) -> None:
    """Add a run to a results file, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(dataclasses.asdict(run)) + "\n")
