"""The evidence of one variance: trained methods, their audits, figures and one page."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from digits.protocol import PAPER
from digits.runs import Data, accuracy, probe_color, train_method
from lnl_ext import AuditReport, audit
from lnl_ext.measuring.evaluation import evaluating, outputs, predict
from lnl_ext.paper.colored_mnist import MEAN_COLORS
from lnl_ext.paper.networks import GlobalColorHead
from lnl_ext.paper.recipes import RECIPES, get_recipe
from lnl_ext.reporting import (
    Page,
    confusion_figure,
    embedding_figure,
    environment,
    history_figure,
    png,
)
from lnl_ext.training.methods import METHODS
from lnl_ext.training.trainer import Trainer

EMBEDDED = 1500
CURVES = {
    "label loss": ("label_loss",),
    "bias cross-entropy of the head": sorted(
        {f"{head.target}_cross_entropy" for recipe in RECIPES.values() for head in recipe.heads}
    ),
    "accuracy on the unbiased test set": ("test_accuracy",),
    "colour leakage: accuracy of a fresh probe": ("leakage",),
}


class Outcome(NamedTuple):
    """A trained method and what was measured on the unbiased test set."""

    trainer: Trainer
    records: list[dict[str, Any]]
    predicted: Tensor
    test_accuracy: float
    report: AuditReport


def outcome(method: str, data: Data, options: argparse.Namespace) -> Outcome:
    """Train one method, or load it, and audit its features."""
    folder = options.output / "runs" / method

    def evaluate(trainer: Trainer) -> Mapping[str, float]:
        features = trainer.inference_modules()[0]
        return {
            "test_accuracy": accuracy(trainer, data.test),
            "leakage": probe_color(features, data, options.seed).leakage.accuracy,
        }

    trainer = train_method(
        method,
        get_recipe(options.recipe, METHODS[method]),
        data,
        options.seed,
        epochs=options.epochs,
        output=folder,
        progress=not options.no_progress,
        evaluate=evaluate,
        log_every=options.log_every,
    )[-1]
    features, classifier = trainer.inference_modules()
    prediction = predict(nn.Sequential(features, classifier), data.test.batches(500))
    hidden = outputs(features, data.test.batches(500))  # once for both audits
    report = audit(
        hidden,
        data.test.labels,
        {"colour": data.test.bias["color"].long()},
        probes=("linear",),
        head=GlobalColorHead(),
        heads=3,
        seed=options.seed,
    )
    groups = audit(
        hidden,
        data.test.labels,
        {"whose colour": data.test.mean_color},
        predictions=prediction.logits,
        aligned=data.test.mean_color == data.test.labels,
        probes=(),
        head=GlobalColorHead(bins=10, heads=1),
        seed=options.seed,
    )
    merged = dataclasses.replace(groups, biases=report.biases | groups.biases)
    log = folder / method / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return Outcome(trainer, records, prediction.classes, prediction.accuracy, merged)


def embedded(features: nn.Module, data: Data, rows: Tensor) -> Tensor:
    """Return the features (n, D) of test digits."""
    with evaluating(features):
        hidden: Tensor = features(data.test.batch(rows)[0])
    return hidden.flatten(1)


def figures(outcomes: Mapping[str, Outcome], data: Data, seed: int) -> dict[str, tuple[Any, str]]:
    """Draw the figures of a page, by file name, with their captions."""
    test = data.test
    colors = [[value / 255 for value in color] for color in MEAN_COLORS]
    rows = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:EMBEDDED]
    drawn = test.colored[rows].flatten(2).amax(2).float() / 255
    return {
        "confusion_digit": (
            confusion_figure(
                {name: (test.labels, o.predicted) for name, o in outcomes.items()},
                classes=10,
                colors=colors,
                row_name="digit",
            ),
            "What each digit is taken for, whatever its colour. Squares: the colour that the digit "
            "has in the training set.",
        ),
        "confusion_color": (
            confusion_figure(
                {name: (test.mean_color, o.predicted) for name, o in outcomes.items()},
                classes=10,
                colors=colors,
                row_name="whose colour it has",
            ),
            "Predictions by colour: on the diagonal, the digit whose colour it is. "
            "Without bias every row is the same.",
        ),
        "training": (
            history_figure({name: o.records for name, o in outcomes.items()}, CURVES),
            "Training: losses of single steps; accuracy and a fresh probe's accuracy at the "
            "end of every epoch.",
        ),
        "embedding": (
            embedding_figure(
                {
                    name: embedded(o.trainer.inference_modules()[0], data, rows)
                    for name, o in outcomes.items()
                },
                test.labels[rows],
                drawn,
                color_name="colour",
                seed=seed,
            ),
            f"t-SNE of the features of {len(rows)} test digits: above by digit, below in the "
            "digit's own colour.",
        ),
    }


def page(
    outcomes: Mapping[str, Outcome],
    drawn: Mapping[str, tuple[Any, str]],
    options: argparse.Namespace,
) -> Page:
    """Put everything on one page."""
    result = Page(f"Coloured MNIST, variance {options.variance:g}, seed {options.seed}")
    result.text(
        "Trained on digits whose colour determines them, measured on test digits whose colour is "
        "random. All numbers are of the last epoch."
    )
    result.heading("Results").table(
        (
            "method",
            "test accuracy",
            "the paper's",
            "bias-aligned",
            "bias-conflicting",
            "worst group",
        ),
        [
            (
                name,
                o.test_accuracy,
                PAPER.get(name, {}).get(options.variance),
                o.report.biases["whose colour"].groups.aligned,  # type: ignore[union-attr]
                o.report.biases["whose colour"].groups.conflicting,  # type: ignore[union-attr]
                o.report.biases["whose colour"].groups.worst,  # type: ignore[union-attr]
            )
            for name, o in outcomes.items()
        ],
    )
    result.heading("How well fresh probes predict the colour").text(
        "Trained to convergence on frozen features. 'colour': 8 bins of red, green and blue, means "
        "over the three; 'whose colour': which digit's mean colour was taken."
    )
    result.table(
        ("method", "bias", "probe", "accuracy", "most frequent", "I(b; f) >= (nats)", "95 %", "p"),
        [
            (
                name,
                bias_name,
                probe_name,
                probe.accuracy,
                bias.majority,
                probe.information,
                "{:.3f} to {:.3f}".format(*probe.information_interval),
                probe.p_value,
            )
            for name, o in outcomes.items()
            for bias_name, bias in o.report.biases.items()
            for probe_name, probe in bias.probes.items()
        ],
    )
    result.heading("Figures")
    for figure, caption in drawn.values():
        result.figure(figure, caption)
    for name, o in outcomes.items():
        result.heading(f"Configuration: {name}").mapping(o.trainer.config.to_dict())
    return result.heading("Environment").mapping(environment())


def write(options: argparse.Namespace) -> None:
    """Train what is not trained, measure, draw, write."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data = Data.load(options.data_root, options.variance, options.seed, options.train_samples)
    outcomes = {name: outcome(name, data, options) for name in options.methods}
    drawn = figures(outcomes, data, options.seed)
    for name, (figure, _) in drawn.items():
        (options.output / f"{name}.png").write_bytes(png(figure))
    page(outcomes, drawn, options).write(options.output / "report.html")
    for name, o in outcomes.items():
        print(f"## {name}: test accuracy {o.test_accuracy:.4f}\n\n{o.report.to_markdown()}")
    print(f"written: {options.output / 'report.html'}")
