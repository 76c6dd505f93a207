"""The paper's table on coloured MNIST: every method at every variance, by one command.

    python benchmarks/reproduce_table.py

It may be stopped at any moment and started again: runs that stand in the results file are not
repeated, and a run that was interrupted goes on from its last checkpoint (one an epoch). Each run
is `benchmarks/colored_mnist.py` with one thread in a process of its own, two at a time. The
default recipe is run for longer here than by default: for `EPOCHS` epochs instead of three.

Lines of the results file name their recipe, not its version: after a change of
`lnl_ext/paper/recipes.py`, start another file (`--results`).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from colored_mnist import MNIST, PAPER, RESULTS, check_recipe

from lnl_ext.paper.colored_mnist import VARIANCES
from lnl_ext.paper.recipes import RECIPES
from lnl_ext.training.methods import METHODS

SCRIPT = Path(__file__).resolve().parent / "colored_mnist.py"
# Three seeds where the paper's figures differ most, and in the middle; one elsewhere.
SEEDS = {0.02: (0, 1, 2), 0.03: (0, 1, 2)}
EPOCHS = 5.0
# The paper's, and what the default recipe of `lnl` adds to them alone.
ROWS = ("baseline", "blindeye", "gray", "adjusted", "lnl")


class Cell(NamedTuple):
    """One run of the table."""

    method: str
    variance: float
    seed: int

    def __str__(self) -> str:
        """Name the run, for people and files."""
        return f"{self.method}-{self.variance:.3f}-{self.seed}"


def cells(methods: Sequence[str], variances: Sequence[float], more_seeds: bool) -> list[Cell]:
    """Return the runs of the table, seed 0 of every method and variance first."""
    first = [Cell(method, variance, 0) for variance in variances for method in methods]
    if not more_seeds:
        return first
    return first + [
        Cell(method, variance, seed)
        for variance in variances
        for seed in SEEDS.get(variance, ())[1:]
        for method in methods
    ]


def passes(method: str, recipe: str, epochs: float | None) -> float:
    """Return how often a run sees the training set in all, as its line in the results says."""
    trained = RECIPES[recipe]
    baseline = epochs or trained.baseline.epochs
    if not METHODS[method].adversarial:
        return baseline
    unlearning = epochs or trained.unlearning.epochs
    return baseline + unlearning if trained.from_baseline else unlearning


def finished(results: Path, recipe: str, epochs: float | None) -> dict[Cell, float]:
    """Return the accuracies in a results file of runs of this length; of repeated runs the last."""
    if not results.exists():
        return {}
    accuracy = {}
    for number, line in enumerate(results.read_text(encoding="utf-8").splitlines(), 1):
        try:
            run = json.loads(line)
            if run["benchmark"] == "colored_mnist" and run["recipe"] == recipe:
                cell = Cell(run["method"], run["variance"], run["seed"])
                if run["epoch"] == passes(cell.method, recipe, epochs):
                    accuracy[cell] = run["test_accuracy"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {results} is not a run: {error!r}") from error
    return accuracy


def table(accuracy: dict[Cell, float], methods: Sequence[str], variances: Sequence[float]) -> str:
    """Set the runs out as Markdown: the mean over seeds, the paper's figure below it."""
    lines = [
        "| method | " + " | ".join(f"{variance:.3f}" for variance in variances) + " |",
        "|---" * (len(variances) + 1) + "|",
    ]
    for method in methods:
        measured = []
        for variance in variances:
            seeds = [a for c, a in accuracy.items() if c[:2] == (method, variance)]
            mean = f"{sum(seeds) / len(seeds):.4f}" if seeds else "-"
            measured.append(mean + (f" ({len(seeds)} seeds)" if len(seeds) > 1 else ""))
        lines.append(f"| {method} | " + " | ".join(measured) + " |")
        paper = [PAPER.get(method, {}).get(variance) for variance in variances]
        if any(figure is not None for figure in paper):
            cells_of_paper = ["-" if figure is None else f"{figure:.4f}" for figure in paper]
            lines.append("| the paper's | " + " | ".join(cells_of_paper) + " |")
    return "\n".join(lines)


def draw(accuracy: dict[Cell, float], methods: Sequence[str], path: Path) -> None:
    """Draw accuracy against variance (the paper's figure 4): means and ranges over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, method in enumerate(methods):
        found: dict[float, list[float]] = {}
        for cell, value in sorted(accuracy.items()):
            if cell.method == method:
                found.setdefault(cell.variance, []).append(value)
        color = f"C{number}"
        if found:
            means = [sum(values) / len(values) for values in found.values()]
            below = [m - min(v) for m, v in zip(means, found.values(), strict=True)]
            above = [max(v) - m for m, v in zip(means, found.values(), strict=True)]
            axes.errorbar(
                list(found), means, [below, above], color=color, marker="o", capsize=3, label=method
            )
        if method in PAPER:
            paper = PAPER[method]
            axes.plot(list(paper), list(paper.values()), ":", color=color, label=f"{method}, paper")
    axes.set(xlabel="variance of the colour", ylabel="accuracy on the unbiased test set")
    axes.legend(fontsize=7, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


class Runner:
    """Runs cells as processes, and ends them all when it is told to stop."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, cell: Cell) -> None:
        """Train and measure one cell, which appends its line to the results."""
        options = self.options
        # Runs of another recipe or length do not go on from each other's checkpoints.
        length = "" if options.epochs is None else f"-{options.epochs:g}"
        folder = options.output / f"{cell}-{options.recipe}{length}"
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            str(SCRIPT),
            f"--method={cell.method}",
            f"--variance={cell.variance}",
            f"--seed={cell.seed}",
            f"--recipe={options.recipe}",
            f"--data-root={options.data_root}",
            f"--output={folder}",
            f"--results={options.results}",
            "--threads=1",
            "--no-progress",
        ]
        if options.epochs is not None:
            command.append(f"--epochs={options.epochs}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (folder / "output.txt").open("w", encoding="utf-8") as log:
            with self._lock:
                if self._stopped:
                    return
                process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment
                )
                self._running.add(process)
            status = process.wait()
            with self._lock:
                self._running.discard(process)
        if self._stopped:
            return
        if status != 0:
            raise RuntimeError(f"{cell} ended with status {status}: see {folder / 'output.txt'}")
        # Its line stands in the results; the checkpoints have served.
        shutil.rmtree(folder)

    def stop(self) -> None:
        """Start nothing more, and end what runs."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--variances", nargs="+", type=float, default=list(VARIANCES))
    parser.add_argument("--recipe", choices=list(RECIPES), default="default")
    parser.add_argument(
        "--epochs",
        type=float,
        help=f"of every stage; by default {EPOCHS:g}, and the recipe's own with --recipe paper",
    )
    parser.add_argument(
        "--more-seeds",
        action="store_true",
        help="seeds 1 and 2 as well, at the variances "
        + ", ".join(f"{variance:.3f}" for variance in SEEDS),
    )
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--data-root", type=Path, default=MNIST)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--output", type=Path, default=Path("table_output"), help="folder for checkpoints"
    )
    parser.add_argument("--figure", type=Path, help="draw accuracy against variance into this file")
    parser.add_argument("--table", action="store_true", help="print what there is, run nothing")
    options = parser.parse_args(arguments)
    adjusts = RECIPES[options.recipe].logit_adjustment is not None
    if options.methods is None:
        options.methods = [name for name in ROWS if adjusts or not METHODS[name].adjusted]
    check_recipe(parser, options.recipe, options.methods)
    if options.epochs is None and options.recipe != "paper":
        options.epochs = EPOCHS
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and print the table."""
    options = parse(arguments)
    done = finished(options.results, options.recipe, options.epochs)
    wanted = cells(options.methods, options.variances, options.more_seeds)
    missing = [] if options.table else [cell for cell in wanted if cell not in done]
    if missing:
        print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are there", flush=True)
        # As Ctrl-C: the runs are ended, too.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        _run_all(Runner(options), missing, options.jobs)
    accuracy = finished(options.results, options.recipe, options.epochs)
    print(table(accuracy, options.methods, options.variances))
    if options.figure is not None:
        draw(accuracy, options.methods, options.figure)


def _run_all(runner: Runner, missing: Sequence[Cell], jobs: int) -> None:
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(runner.run, cell): cell for cell in missing}
        try:
            for count, future in enumerate(concurrent.futures.as_completed(futures), 1):
                future.result()
                minutes = (time.monotonic() - began) / 60
                left = minutes / count * (len(missing) - count)
                print(
                    f"{count}/{len(missing)} {futures[future]}: {minutes:.1f} minutes, "
                    f"about {left:.0f} to go",
                    flush=True,
                )
        finally:  # one failed, or Ctrl-C: what runs is ended, and goes on the next time
            runner.stop()
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
