"""Recorded runs as the tables of benchmarks/README.md."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lnl_ext.reporting.tables import markdown

Recorded = dict[str, Any]
"""A line of a results file: the fields of `photographs.runs.Run`."""

HEADER = (
    *("method", "heads", "arch", "pixels", "epochs", "seed"),
    *("opposite", "unbiased", "leakage", "minutes"),
)


def setting(run: Recorded) -> tuple[Any, ...]:
    """Return what two runs must agree in to be compared."""
    names = ("arch", "train_split", "label", "image_size", "batch_size", "epoch", "seed")
    return tuple(run[name] for name in names)


def called(run: Recorded) -> str:
    """Name the network and the heads of a run."""
    return f"{run['arch']}, {' '.join(run['heads'])}"


def all_runs(runs: Sequence[Recorded]) -> str:
    """Return a Markdown table of all runs."""
    rows = [
        (
            run["method"],
            " ".join(run["heads"]) or "-",
            run["arch"],
            str(run["image_size"]),
            f"{run['epoch']:g}",
            str(run["seed"]),
            f"{run['opposite_accuracy']:.4f}",
            f"{run['test_accuracy']:.4f}",
            f"{run['leakage']:.3f}",
            f"{run['minutes']:.1f}",
        )
        for run in runs
    ]
    return markdown(HEADER, rows)


def gains(runs: Sequence[Recorded]) -> list[tuple[Recorded, float, float]]:
    """Return the `lnl` runs with a baseline of their setting, and what each gains on both sets.

    In points: on the set of the opposite bias, and on the unbiased set.
    """
    baselines = {setting(run): run for run in runs if run["method"] == "baseline"}
    gained = []
    for run in runs:
        if run["method"] == "lnl" and setting(run) in baselines:
            baseline = baselines[setting(run)]
            opposite, test = (
                100 * (run[name] - baseline[name])
                for name in ("opposite_accuracy", "test_accuracy")
            )
            gained.append((run, opposite, test))
    return gained


def differences(runs: Sequence[Recorded]) -> list[str]:
    """Return a line for each of the `gains`, and one for each setting with several seeds."""
    lines = []
    seeds = defaultdict(list)
    for run, opposite, test in gains(runs):
        lines.append(
            f"* {called(run)}, seed {run['seed']}: {opposite:+.1f} points on the opposite set, "
            f"{test:+.1f} on the unbiased one"
        )
        *but_the_seed, _ = setting(run)
        group = (called(run), *but_the_seed)
        seeds[group].append((opposite, test))
    for (name, *_), gained in seeds.items():
        if len(gained) > 1:
            of_opposite, of_test = map(mean_and_error, zip(*gained, strict=True))
            lines.append(
                f"* {name}, mean of {len(gained)} seeds: {of_opposite} points on the opposite set, "
                f"{of_test} on the unbiased one"
            )
    return lines


def mean_and_error(values: Sequence[float]) -> str:
    """Return the mean of at least two values, and its standard error from their spread."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.1f} (standard error {error:.1f})"


def tables(runs: Sequence[Recorded]) -> str:
    """Set runs out, and what `lnl` gains on the baseline of its setting."""
    order = ("train_split", "arch", "method", "heads", "seed")
    runs = sorted(runs, key=lambda run: [run[name] for name in order])
    return "\n".join([all_runs(runs), "", "`lnl` less the baseline:", "", *differences(runs)])


def means(runs: Sequence[Recorded]) -> str:
    """Return a Markdown table of means over seeds, by training set and method.

    Gains are in points, means over the seeds that the baseline has as well.
    """
    by: dict[tuple[str, str], dict[int, Recorded]] = defaultdict(dict)
    for run in runs:
        by[run["train_split"], run["method"]][run["seed"]] = run
    rows = []
    for (split, method), own in by.items():
        baseline = by.get((split, "baseline"), {})
        shared = [(own[seed], baseline[seed]) for seed in own if seed in baseline]
        cells = []
        for name in ("opposite_accuracy", "test_accuracy"):
            gained = [100 * (run[name] - other[name]) for run, other in shared]
            of_baseline = method == "baseline" or not gained
            gain = "" if of_baseline else f" ({statistics.mean(gained):+.1f})"
            cells.append(f"{statistics.mean(run[name] for run in own.values()):.3f}{gain}")
        rest = [
            f"{statistics.mean(run[name] for run in own.values()):.{digits}f}"
            for name, digits in (("information", 3), ("leakage", 3), ("minutes", 1))
        ]
        rows.append((split, method, str(len(own)), *cells, *rest))
    header = ("trained on", "method", "seeds", "opposite", "unbiased", "nats", "leakage", "minutes")
    return markdown(header, rows)
