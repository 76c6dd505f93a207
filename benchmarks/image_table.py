"""Set the recorded runs of a benchmark on photographs out as the tables of benchmarks/README.md.

python benchmarks/image_table.py benchmarks/results/dogs_and_cats.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Recorded = dict[str, Any]
"""A line of a results file: the fields of `image_runs.Run`."""

HEADER = """\
| method | arch | pixels | epochs | seed | opposite | unbiased | leakage | minutes |
|---|---|---|---|---|---|---|---|---|"""


def setting(run: Recorded) -> tuple[Any, ...]:
    """Return what two runs must agree in to be compared."""
    names = ("arch", "train_split", "label", "image_size", "batch_size", "epoch", "seed")
    return tuple(run[name] for name in names)


def rows(runs: Sequence[Recorded]) -> list[str]:
    """Return a Markdown table of all runs."""
    lines = [HEADER]
    for run in runs:
        cells = [run["method"], run["arch"], run["image_size"], f"{run['epoch']:g}", run["seed"]]
        cells += [f"{run['opposite_accuracy']:.4f}", f"{run['test_accuracy']:.4f}"]
        cells += [f"{run['leakage']:.3f}", f"{run['minutes']:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def differences(runs: Sequence[Recorded]) -> list[str]:
    """Return a line for each `lnl` run with a baseline of its setting: its gain in points."""
    baselines = {setting(run): run for run in runs if run["method"] == "baseline"}
    lines = []
    for run in runs:
        if run["method"] != "lnl" or setting(run) not in baselines:
            continue
        baseline = baselines[setting(run)]
        opposite, test = (
            100 * (run[name] - baseline[name]) for name in ("opposite_accuracy", "test_accuracy")
        )
        lines.append(
            f"* {run['arch']}, seed {run['seed']}: {opposite:+.1f} points on the opposite set, "
            f"{test:+.1f} on the unbiased one"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("results", type=Path, help="a file that the benchmark appends to")
    lines = made.parse_args(arguments).results.read_text(encoding="utf-8").splitlines()
    runs = [json.loads(line) for line in lines]
    runs.sort(key=lambda run: (run["train_split"], run["arch"], run["method"], run["seed"]))
    print("\n".join([*rows(runs), "", "`lnl` less the baseline:", "", *differences(runs)]))


if __name__ == "__main__":
    main()
