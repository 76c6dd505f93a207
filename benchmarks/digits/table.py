"""The paper's table on coloured MNIST: its runs, in processes of their own, and their results."""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from recording import records

from digits.protocol import PAPER
from lnl_ext.paper.recipes import RECIPES
from lnl_ext.reporting.tables import markdown
from lnl_ext.training.methods import METHODS

SCRIPT = Path(__file__).resolve().parent.parent / "colored_mnist.py"


class Cell(NamedTuple):
    """One run of the table."""

    method: str
    variance: float
    seed: int

    def __str__(self) -> str:
        """Name the run, for people and files."""
        return f"{self.method}-{self.variance:.3f}-{self.seed}"


def cells(
    methods: Sequence[str], variances: Sequence[float], seeds: Mapping[float, Sequence[int]]
) -> list[Cell]:
    """Return the runs of the table: seed 0 of all, then the other ``seeds`` of a variance."""
    first = [Cell(method, variance, 0) for variance in variances for method in methods]
    return first + [
        Cell(method, variance, seed)
        for variance in variances
        for seed in seeds.get(variance, ())[1:]
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
    for number, run in enumerate(records.read(results), 1):
        try:
            if run["benchmark"] == "colored_mnist" and run["recipe"] == recipe:
                cell = Cell(run["method"], run["variance"], run["seed"])
                if run["epoch"] == passes(cell.method, recipe, epochs):
                    accuracy[cell] = run["test_accuracy"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {results} is not a run: {error!r}") from error
    return accuracy


def table(accuracy: dict[Cell, float], methods: Sequence[str], variances: Sequence[float]) -> str:
    """Set the runs out as Markdown: the mean over seeds, the paper's number below it."""
    rows = []
    for method in methods:
        measured = []
        for variance in variances:
            seeds = [a for c, a in accuracy.items() if c[:2] == (method, variance)]
            mean = f"{sum(seeds) / len(seeds):.4f}" if seeds else "-"
            measured.append(mean + (f" ({len(seeds)} seeds)" if len(seeds) > 1 else ""))
        rows.append([method, *measured])
        paper = [PAPER.get(method, {}).get(variance) for variance in variances]
        if any(figure is not None for figure in paper):
            figures = ["-" if figure is None else f"{figure:.4f}" for figure in paper]
            rows.append(["the paper's", *figures])
    return markdown(["method", *(f"{variance:.3f}" for variance in variances)], rows)


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
    """Runs cells as processes, and ends them all when it is stopped."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, cell: Cell) -> None:
        """Train and measure one cell, which appends its line to the results."""
        options = self.options
        # Runs of another recipe or length do not resume from each other's checkpoints.
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


def run_all(runner: Runner, missing: Sequence[Cell], jobs: int) -> None:
    """Run cells, so many at a time, and print how far it is."""
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
        finally:  # one failed, or Ctrl-C: what runs is ended, and resumes the next time
            runner.stop()
            pool.shutdown(cancel_futures=True)
