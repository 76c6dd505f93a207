"""The demo: `baseline` and `lnl` side by side, one table, one figure."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib as mpl
import torch
from recording import records
from torch import Tensor

from digits.protocol import MNIST, PAPER
from digits.runs import Data, Run, measure

METHODS = ("baseline", "lnl")
VARIANCE = 0.02


def train(
    method: str, seed: int, epochs: float | None, train_samples: int | None, threads: int
) -> Run:
    """Train and measure one method, in a process of its own."""
    torch.set_num_threads(threads)
    data = Data.load(MNIST, VARIANCE, seed, train_samples)
    # Two progress bars on one terminal would overwrite each other.
    show = method == METHODS[-1]
    return measure(method, "digits", data, seed, epochs=epochs, progress=show, before=False).run


def train_all(seed: int, epochs: float | None, train_samples: int | None) -> list[Run]:
    """Train the methods side by side, one process each.

    The networks are small: one batch does not fill two cores, two runs do.
    """
    threads = max(1, (os.cpu_count() or 1) // len(METHODS))
    # Spawned, not forked: a forked process inherits OpenMP's state without its threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(METHODS), mp_context=context) as pool:
        jobs = [
            pool.submit(train, method, seed, epochs, train_samples, threads) for method in METHODS
        ]
        return [job.result() for job in jobs]


def table(runs: Sequence[Run]) -> str:
    """Set the runs out as text: colour leakage before (baseline) and after unlearning."""
    baseline, lnl = runs
    header = ("method", "test accuracy", "paper's", "colour leakage", "minutes")
    rows = [
        (
            result.method,
            f"{result.test_accuracy:.4f}",
            f"{PAPER[result.method][VARIANCE]:.4f}",
            f"{result.leakage:.4f}",
            f"{result.minutes:.1f}",
        )
        for result in runs
    ]
    gain = lnl.test_accuracy - baseline.test_accuracy
    return "\n".join(
        [
            f"coloured MNIST, variance {VARIANCE}, seed {lnl.seed}, {lnl.train_samples:,} training "
            f"digits, {lnl.epoch:g} epochs (baseline {baseline.epoch:g})",
            "",
            records.text(header, rows),
            "",
            f"lnl against baseline on the unbiased test set: {gain:+.4f}",
            f"colour leakage before unlearning (baseline) {baseline.leakage:.4f}, "
            f"after {lnl.leakage:.4f}, without any colour in the features {lnl.leakage_chance:.4f}",
            "(leakage: how often a fresh probe on the frozen features finds the right one of 8",
            "bins of the digit's colour; test set, mean of red, green and blue)",
        ]
    )


def _examples(colored: Tensor, labels: Tensor) -> Tensor:
    """Give two digits of each class, classes side by side, as one picture (H, W, 3)."""
    rows = []
    for row in range(2):
        picked = [colored[(labels == digit).nonzero()[row, 0]] for digit in range(10)]
        rows.append(torch.cat(picked, dim=2))
    return torch.cat(rows, dim=1).permute(1, 2, 0)


def draw(runs: Sequence[Run], data: Data, path: Path) -> None:
    """Write the figure: digits as trained on and as tested on, accuracy, leakage."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(10, 6), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(1, 1, 2.6))
    for row, (dataset, title) in enumerate(
        (
            (data.train, "training set: the colour determines the digit"),
            (data.test, "test set: the colour says nothing"),
        )
    ):
        axes = figure.add_subplot(grid[row, :])
        axes.imshow(_examples(dataset.colored, dataset.labels).numpy())
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    panels: list[tuple[str, str, list[tuple[float, str]]]] = [
        ("test_accuracy", "accuracy on the unbiased test set", [(0.1, "chance")]),
        (
            "leakage",
            "colour leakage: accuracy of a fresh probe",
            [(runs[-1].leakage_chance, "no colour in the features")],
        ),
    ]
    palette = ["#9a9a9a", "#1f6fb4"]
    names = [result.method for result in runs]
    for column, (field, title, lines) in enumerate(panels):
        axes = figure.add_subplot(grid[2, column])
        values = [getattr(result, field) for result in runs]
        bars = axes.bar(names, values, color=palette, width=0.55)
        axes.bar_label(bars, fmt="%.3f", padding=2)
        for height, label in lines:
            axes.axhline(height, color="black", linewidth=1, linestyle=":", label=label)
        if field == "test_accuracy":
            papers = [PAPER[name][VARIANCE] for name in names]
            axes.plot(names, papers, "_", markersize=24, color="#d1495b", label="the paper's")
        axes.set_title(title, fontsize=10)
        axes.set_ylim(0, 1.25)
        axes.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
        axes.legend(fontsize=8, loc="upper left", ncols=2, markerscale=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def show(seed: int, quick: bool, output: Path) -> None:
    """Train, print one table, write the figure."""
    epochs, train_samples = (2.0, 6_000) if quick else (None, None)
    started = time.monotonic()
    runs = train_all(seed, epochs, train_samples)
    for result in runs:
        records.append(output / "runs.jsonl", result)
    figure = output / "demo.png"
    draw(runs, Data.load(MNIST, VARIANCE, seed, train_samples), figure)
    print(table(runs))
    if quick:
        print("--quick only shows that everything runs: it is too short to unlearn anything")
    print(f"figure: {figure}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes in all")
