"""The coloured-MNIST benchmark: train one method, test it where colour tells nothing, probe it.

    python benchmarks/colored_mnist.py --variance 0.02 --method lnl

prints a table with the paper's figure beside the measured one and appends a line to
``benchmarks/results/colored_mnist.jsonl``. With ``--output`` the run also gets a page,
``METHOD/report.html`` in that folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from digits.page import summary
from torch import nn

from lnl_ext.data import ColoredMNIST
from lnl_ext.measuring.evaluation import Predictions, predict
from lnl_ext.measuring.probe import ProbeResult, fresh_probe
from lnl_ext.paper.colored_mnist import IMAGE_MEAN, IMAGE_STD, VARIANCES, normalize
from lnl_ext.paper.networks import DigitNetwork, GlobalColorHead
from lnl_ext.paper.recipes import RECIPES, Recipe, get_recipe
from lnl_ext.reporting import PAGE, write_run_page
from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.methods import METHODS, Method, get_method
from lnl_ext.training.trainer import Evaluate, Trainer

HERE = Path(__file__).resolve().parent
MNIST = HERE / "data" / "mnist"
RESULTS = HERE / "results" / "colored_mnist.jsonl"
# Kim et al., CVPR 2019, table 1: accuracy on the unbiased test set by variance.
PAPER = {
    method: dict(zip(VARIANCES, accuracies, strict=True))
    for method, accuracies in {
        "baseline": (0.4055, 0.4813, 0.5996, 0.6626, 0.7333, 0.7973, 0.8450),
        "blindeye": (0.6741, 0.7123, 0.7883, 0.8203, 0.8638, 0.8927, 0.9159),
        "gray": (0.8374, 0.8751, 0.8996, 0.9166, 0.9325, 0.9472, 0.9596),
        "lnl": (0.8185, 0.8854, 0.9137, 0.9306, 0.9406, 0.9555, 0.9618),
    }.items()
}
PROBE_SAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Data:
    """The sets of one run."""

    train: ColoredMNIST
    """Biased training digits."""
    test: ColoredMNIST
    """Unbiased: another digit's colour as likely as the own."""
    probe_train: ColoredMNIST
    """Unbiased, for probes to learn from."""
    probe_test: ColoredMNIST
    """Unbiased, none of them in ``probe_train``."""

    @classmethod
    def load(cls, root: Path, variance: float, seed: int, train_samples: int | None = None) -> Data:
        """Read and colour the digits, the first ``train_samples`` of the training set."""
        keep = None if train_samples is None else range(train_samples)
        train = ColoredMNIST(root, variance=variance, seed=seed, indices=keep)
        test = ColoredMNIST(root, split="test", variance=variance, seed=seed)
        if train.source.suffix == ".npy":
            # The authors' file has no unbiased training digits: halve its test set.
            half = len(test) // 2
            halves = [
                ColoredMNIST(root, split="test", variance=variance, indices=rows)
                for rows in (range(half), range(half, len(test)))
            ]
            return cls(train, test, *halves)
        rows = range(min(PROBE_SAMPLES, len(train)))
        probe = ColoredMNIST(root, variance=variance, seed=seed, biased=False, indices=rows)
        return cls(train, test, probe, test)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run measured; the fields of a line of the results file."""

    benchmark: str
    method: str
    recipe: str
    variance: float
    seed: int
    epoch: float
    """Passes over the training set, all stages together; the accuracy is that of the last."""
    test_accuracy: float
    leakage: float
    """Accuracy of a fresh probe for the digit's colour (8 bins, mean of red, green and blue)."""
    leakage_before: float | None
    """The same of the features from which the last stage started; None: not measured."""
    leakage_chance: float
    """The same of predicting the most frequent bin."""
    information: float
    """What the probe tells about the colour, in nats a channel: H(colour) - CE(probe)."""
    minutes: float
    """Of training, without probes."""
    train_samples: int
    threads: int
    paper_accuracy: float | None


class Measured(NamedTuple):
    """A run, and what it was measured on."""

    run: Run
    trainers: list[Trainer]
    """One for every stage."""
    predictions: Predictions
    """On the test set."""


def probe_color(features: nn.Module, data: Data, seed: int) -> ProbeResult:
    """Measure the colour leakage of ``features`` on the unbiased test set."""
    return fresh_probe(
        features,
        GlobalColorHead(),
        data.probe_train.batches(500),
        data.probe_test.batches(500),
        "color",
        heads=3,
        seed=seed,
    )


def train_method(
    name: str,
    recipe: Recipe,
    data: Data,
    seed: int,
    *,
    epochs: float | None = None,
    output: Path | None = None,
    progress: bool = True,
    on_stage: Callable[[nn.Module], None] = lambda features: None,
    evaluate: Evaluate | None = None,
    log_every: int | None = None,
) -> list[Trainer]:
    """Train one method from new weights.

    Parameters
    ----------
    name
        One of `lnl_ext.training.methods.METHODS`.
    epochs
        Length of every stage, that of the recipe by default.
    output
        Folder for metrics and checkpoints, from which an interrupted run goes on.
    on_stage
        Called with the feature network before the last stage.
    evaluate, log_every
        As in `Trainer.fit`; by default the accuracy on the test set.

    Returns
    -------
    list of Trainer
        One for every stage, the last one last.
    """
    method = get_method(name)
    torch.manual_seed(seed)
    network = DigitNetwork()
    if evaluate is None:
        evaluate = functools.partial(_test_accuracy, data.test)
    stages: list[tuple[str, Method]] = [(name, method)]
    if method.adversarial and recipe.from_baseline:
        stages.insert(0, ("baseline", METHODS["baseline"]))
    trainers = []
    for position, (stage, stage_method) in enumerate(stages):
        if position == len(stages) - 1:
            on_stage(network.features)
        trainer, batches, folder = _stage(
            stage, stage_method, recipe, network, data, seed, epochs, output
        )
        trainer.fit(
            batches, output=folder, evaluate=evaluate, log_every=log_every, progress=progress
        )
        trainers.append(trainer)
    return trainers


def _test_accuracy(test: ColoredMNIST, trainer: Trainer) -> Mapping[str, float]:
    return {"test_accuracy": accuracy(trainer, test)}


def _stage(
    stage: str,
    method: Method,
    recipe: Recipe,
    network: DigitNetwork,
    data: Data,
    seed: int,
    epochs: float | None,
    output: Path | None,
) -> tuple[Trainer, TensorBatches, Path | None]:
    """Set up a stage, from its checkpoint where there is one."""
    config = recipe.unlearning if method.adversarial else recipe.baseline
    config = dataclasses.replace(config, seed=seed, epochs=epochs or config.epochs)
    if config.update == "two_step" and method.confusion_weight:
        # The authors' procedure has no confusion loss; BlindEye trains in one step.
        config = dataclasses.replace(config, update="joint")
    adversaries = recipe.adversaries(method)
    weights = recipe.sample_weights(method)
    adjustment = recipe.adjustment(method)
    targets = [*adversaries, *weights.values(), *([adjustment] if adjustment else [])]
    trainer = Trainer(
        network.features,
        network.classifier,
        adversaries,
        config,
        image_transform=method.image_transform(IMAGE_MEAN, IMAGE_STD),
        sample_weights=weights,
        logit_adjustment=adjustment,
    )
    batches = TensorBatches(
        data.train.colored,
        data.train.labels,
        {name: data.train.bias[name] for name in targets},
        batch_size=recipe.batch_size,
        drop_last=True,
        prepare=normalize,
    )
    folder = None if output is None else output / stage
    if folder is not None and (folder / "checkpoint.pt").exists():
        trainer.load(folder / "checkpoint.pt")
    return trainer, batches, folder


def accuracy(trainer: Trainer, dataset: ColoredMNIST) -> float:
    """Measure the accuracy of what was trained (its averaged weights, where it keeps them)."""
    return predictions(trainer, dataset).accuracy


def predictions(trainer: Trainer, dataset: ColoredMNIST) -> Predictions:
    """Run what was trained over a set."""
    return predict(nn.Sequential(*trainer.inference_modules()), dataset.batches(500))


def measure(
    method: str,
    recipe: str,
    data: Data,
    seed: int,
    *,
    epochs: float | None = None,
    output: Path | None = None,
    progress: bool = True,
    before: bool = True,
) -> Measured:
    """Train and measure one method.

    Parameters
    ----------
    before
        Whether to probe the features before the last stage as well.
    epochs, output, progress
        As in `train_method`.
    """
    probed: list[float] = []

    def probe_before(features: nn.Module) -> None:
        if before:
            probed.append(round(probe_color(features, data, seed).accuracy, 4))

    trainers = train_method(
        method,
        get_recipe(recipe, get_method(method)),
        data,
        seed,
        epochs=epochs,
        output=output,
        progress=progress,
        on_stage=probe_before,
    )
    last = trainers[-1]
    after = probe_color(last.inference_modules()[0], data, seed)
    configs = [trainer.config for trainer in trainers]
    predicted = predictions(last, data.test)
    result = Run(
        benchmark="colored_mnist",
        method=method,
        recipe=recipe,
        variance=data.train.variance,
        seed=seed,
        epoch=sum(config.epochs + config.pretrain_epochs for config in configs),
        test_accuracy=round(predicted.accuracy, 4),
        leakage=round(after.accuracy, 4),
        leakage_before=probed[0] if probed else None,
        leakage_chance=round(after.majority, 4),
        information=round(after.information, 4),
        minutes=round(sum(trainer.seconds for trainer in trainers) / 60, 2),
        train_samples=len(data.train),
        threads=torch.get_num_threads(),
        paper_accuracy=PAPER.get(method, {}).get(data.train.variance),
    )
    return Measured(result, trainers, predicted)


def run(method: str, recipe: str, data: Data, seed: int, **options: Any) -> Run:
    """Return the figures alone of `measure`, which takes the same options."""
    return measure(method, recipe, data, seed, **options).run


def table(runs: Sequence[Run]) -> str:
    """Set runs out as text, the paper's figure beside the measured one."""
    header = (
        "method",
        "recipe",
        "variance",
        "seed",
        "epochs",
        "test acc.",
        "paper's",
        "leakage before",
        "after",
        "chance",
        "minutes",
    )
    rows = [
        (
            run.method,
            run.recipe,
            f"{run.variance:.3f}",
            str(run.seed),
            f"{run.epoch:g}",
            f"{run.test_accuracy:.4f}",
            "-" if run.paper_accuracy is None else f"{run.paper_accuracy:.4f}",
            "-" if run.leakage_before is None else f"{run.leakage_before:.4f}",
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


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=list(METHODS), default="lnl")
    parser.add_argument("--recipe", choices=list(RECIPES), default="default")
    parser.add_argument(
        "--variance", type=float, default=0.02, help="of the colours, the paper's sigma^2"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, help="of every stage; the recipe's by default")
    parser.add_argument(
        "--data-root", type=Path, default=MNIST, help="a folder with MNIST's IDX files"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for checkpoints, from which it goes on, and the page"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to append the run to")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--no-progress", action="store_true")
    options = parser.parse_args(arguments)
    check_recipe(parser, options.recipe, [options.method])
    return options


def check_recipe(parser: argparse.ArgumentParser, recipe: str, methods: Sequence[str]) -> None:
    """Exit with a message where a method cannot have the recipe."""
    try:
        for method in map(get_method, methods):
            get_recipe(recipe, method).adjustment(method)
    except ValueError as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, print and append."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    started = time.monotonic()
    data = Data.load(options.data_root, options.variance, options.seed)
    measured = measure(
        options.method,
        options.recipe,
        data,
        options.seed,
        epochs=options.epochs,
        output=options.output,
        progress=not options.no_progress,
    )
    append(options.results, measured.run)
    print(table([measured.run]))
    print(f"{(time.monotonic() - started) / 60:.1f} minutes in all; appended to {options.results}")
    if options.output is not None:
        given = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["python", "benchmarks/colored_mnist.py", *given])
        page = options.output / options.method / PAGE
        print(write_run_page(page, summary(measured, data, options, command)) or f"page: {page}")


if __name__ == "__main__":
    main()
