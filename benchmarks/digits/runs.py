"""A run on coloured MNIST: its sets, its training and what is measured of it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recording import records
from torch import nn

from digits.protocol import PAPER
from lnl_ext.data import ColoredMNIST
from lnl_ext.measuring import BiasAudit, audit
from lnl_ext.measuring.evaluation import Predictions, predict
from lnl_ext.paper.colored_mnist import IMAGE_MEAN, IMAGE_STD, normalize
from lnl_ext.paper.networks import DigitNetwork, GlobalColorHead
from lnl_ext.paper.recipes import Recipe, get_recipe
from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.methods import METHODS, Method, get_method
from lnl_ext.training.trainer import Evaluate, Trainer

PROBE_SAMPLES = 10_000
HELD_OUT = 5_000
"""The last training digits, on which settings are chosen."""


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

    @classmethod
    def held_out(cls, root: Path, variance: float, seed: int) -> Data:
        """Read and colour the training digits alone, the last ones for tests."""
        load = functools.partial(ColoredMNIST, root, variance=variance, seed=seed)
        digits = len(load())
        rows = range(digits - HELD_OUT)
        test = load(indices=range(len(rows), digits), biased=False)
        probe = load(indices=rows[:PROBE_SAMPLES], biased=False)
        return cls(load(indices=rows), test, probe, test)


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
    """The probe's information about the colour, in nats a channel: H(colour) - CE(probe)."""
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


def probe_color(features: nn.Module, data: Data, seed: int) -> BiasAudit:
    """Measure the colour leakage of ``features`` on the unbiased test set."""
    sets = (data.probe_train, data.probe_test)
    return audit(
        features,
        torch.cat([part.labels for part in sets]),
        {"color": torch.cat([part.bias["color"] for part in sets]).long()},
        inputs=itertools.chain.from_iterable(part.batches(500) for part in sets),
        test=torch.arange(sum(map(len, sets))) >= len(data.probe_train),
        probes=(),
        head=GlobalColorHead(),
        heads=3,
        seed=seed,
    ).biases["color"]


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
        Folder for metrics and checkpoints, from which an interrupted run resumes.
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
    if method.adversarial:
        config = recipe.unlearning_for(len(data.train), epochs)
    else:
        config = dataclasses.replace(recipe.baseline, epochs=epochs or recipe.baseline.epochs)
    config = dataclasses.replace(config, seed=seed)
    if config.update == "two_step" and method.confusion_weight:
        # The authors' procedure has no confusion loss; BlindEye trains in one step.
        config = dataclasses.replace(config, update="joint")
    adversaries = recipe.adversaries(method)
    adjustment = recipe.adjustment(method)
    targets = [*adversaries, *([adjustment] if adjustment else [])]
    trainer = Trainer(
        network.features,
        network.classifier,
        adversaries,
        config,
        image_transform=method.image_transform(IMAGE_MEAN, IMAGE_STD),
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
    coefficients: Mapping[str, Any] | None = None,
) -> Measured:
    """Train and measure one method.

    Parameters
    ----------
    before
        Whether to probe the features before the last stage as well.
    coefficients
        ``reversal`` and ``entropy_weight`` of the heads, instead of the recipe's.
    epochs, output, progress
        As in `train_method`.
    """
    probed: list[float] = []

    def probe_before(features: nn.Module) -> None:
        if before:
            probed.append(round(probe_color(features, data, seed).leakage.accuracy, 4))

    settings = get_recipe(recipe, get_method(method))
    heads = tuple(dataclasses.replace(head, **(coefficients or {})) for head in settings.heads)
    trainers = train_method(
        method,
        dataclasses.replace(settings, heads=heads),
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
        epoch=sum(config.epochs for config in configs),
        test_accuracy=round(predicted.accuracy, 4),
        leakage=round(after.leakage.accuracy, 4),
        leakage_before=probed[0] if probed else None,
        leakage_chance=round(after.majority, 4),
        information=round(after.leakage.information, 4),
        minutes=round(sum(trainer.seconds for trainer in trainers) / 60, 2),
        train_samples=len(data.train),
        threads=torch.get_num_threads(),
        paper_accuracy=PAPER.get(method, {}).get(data.train.variance),
    )
    return Measured(result, trainers, predicted)


def table(runs: Sequence[Run]) -> str:
    """Set runs out as text, the paper's number beside the measured one."""
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
    return records.text(header, rows)
