"""Try a recipe for coloured MNIST on held-out training digits; the test set stays unseen.

    python benchmarks/colored_mnist_trial.py --adjust --head color_and_digit:0.03:0.003

trains on the first 55,000 training digits and measures accuracy and leakage on the last 5,000,
coloured like the test set. Appends a line with the settings to
``benchmarks/results/colored_mnist_trials.jsonl``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from colored_mnist import (
    MNIST,
    PROBE_SAMPLES,
    RESULTS,
    Data,
    accuracy,
    probe_color,
    train_method,
)
from torch import nn

from lnl_ext.data import ColoredMNIST
from lnl_ext.measuring.evaluation import predict
from lnl_ext.paper.networks import GlobalColorHead
from lnl_ext.paper.recipes import RECIPES, HeadRecipe, Recipe
from lnl_ext.schedules import Linear

TRIALS = RESULTS.with_name("colored_mnist_trials.jsonl")
HELD_OUT = 5_000
RAMP = 0.05  # of the training, over which the pressure rises
# Bias targets of the data, and how many predictions they are for.
TARGETS = {"color": 3, "color_within_digit": 30, "color_and_digit": 33}


def head(text: str) -> HeadRecipe:
    """Read ``TARGET:REVERSAL:ENTROPY_WEIGHT[:weighed]``."""
    parts = re.fullmatch(rf"({'|'.join(TARGETS)}):([\d.]+):([\d.]+)(:weighed)?", text)
    if parts is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not TARGET:REVERSAL:ENTROPY_WEIGHT[:weighed] with a target of "
            f"{', '.join(TARGETS)}"
        )
    target, reversal, entropy_weight, weighed = parts.groups()
    return HeadRecipe(
        target,
        functools.partial(GlobalColorHead, heads=TARGETS[target]),
        heads=TARGETS[target],
        reversal=float(reversal),
        entropy_weight=float(entropy_weight),
        confusion_weight=0.0,
        over_batch=True,
        sample_weight="color_weight" if weighed else None,
    )


def recipe(options: argparse.Namespace) -> Recipe:
    """Return the default recipe with the settings of the command line."""
    default = RECIPES["default"]
    unlearning = default.unlearning
    optimizer = dataclasses.replace(
        unlearning.optimizer, learning_rate=options.rate, final_rate=options.final * options.rate
    )
    heads = dataclasses.replace(unlearning.head_optimizer, learning_rate=options.head_rate)
    return dataclasses.replace(
        default,
        baseline=dataclasses.replace(
            default.baseline,
            classifier_rate=options.classifier_rate,
            optimizer=optimizer,
            average_decay=options.average,
        ),
        unlearning=dataclasses.replace(
            unlearning,
            update=options.update,
            classifier_rate=options.classifier_rate,
            optimizer=optimizer,
            head_optimizer=heads,
            average_decay=options.average,
            ramp_steps=None,
        ),
        heads=tuple(options.head),
        logit_adjustment=default.logit_adjustment if options.adjust else None,
        pressure=Linear(finish=RAMP),
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--variance", type=float, default=0.02, help="of the colours, the paper's sigma^2")
    add(
        "--head",
        type=head,
        action="append",
        default=[],
        help="TARGET:REVERSAL:ENTROPY_WEIGHT[:weighed], once per adversary; TARGET is "
        + ", ".join(TARGETS),
    )
    add("--adjust", action="store_true", help="adjust the logits by what the colour tells")
    add("--update", choices=("joint", "two_step"), default="joint", help="two_step: the authors'")
    add("--samples", type=int, default=100_000, help="training samples seen")
    add("--rate", type=float, default=1e-3, help="of features and classifier, at first")
    add("--final", type=float, default=0.3, help="of the rate, what is left at the end (cosine)")
    add("--classifier-rate", type=float, default=1.0, help="of --rate, the classifier's multiple")
    add("--head-rate", type=float, default=3e-3)
    add("--average", type=float, default=0.999, help="decay of the averaged weights")
    add("--seed", type=int, default=0)
    add("--data-root", type=Path, default=MNIST, help="a folder with MNIST's IDX files")
    add("--results", type=Path, default=TRIALS, help="file to append the trial to")
    add("--train-samples", type=int, help="training digits; all but those held out by default")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, print and append."""
    options = parse(arguments)
    torch.set_num_threads(1)
    digits = len(ColoredMNIST(options.data_root))
    rows = range(options.train_samples or digits - HELD_OUT)
    load = functools.partial(
        ColoredMNIST, options.data_root, variance=options.variance, seed=options.seed
    )
    held_out = load(indices=range(digits - HELD_OUT, digits), biased=False)
    probed = load(indices=rows[:PROBE_SAMPLES], biased=False)
    data = Data(load(indices=rows), held_out, probed, held_out)
    without_heads = "adjusted" if options.adjust else "baseline"
    trainer = train_method(
        "lnl" if options.head else without_heads,
        recipe(options),
        data,
        options.seed,
        epochs=options.samples / len(rows),
        progress=False,
        evaluate=lambda trainer: {},
    )[-1]
    last = nn.Sequential(trainer.features, trainer.classifier)
    leaks = probe_color(trainer.inference_modules()[0], data, options.seed)
    settings = {
        "variance": options.variance,
        "heads": [
            [h.target, h.reversal, h.entropy_weight, h.sample_weight is not None]
            for h in options.head
        ],
        "adjusted": options.adjust,
        "update": options.update,
        "samples": options.samples,
        "rate": options.rate,
        "final": options.final,
        "classifier_rate": options.classifier_rate,
        "head_rate": options.head_rate,
        "average": options.average,
        "seed": options.seed,
        "held_out_last": round(predict(last, held_out.batches(500)).accuracy, 4),
        "held_out_averaged": round(accuracy(trainer, held_out), 4),
        "leakage": round(leaks.accuracy, 4),
        "leakage_chance": round(leaks.majority, 4),
        "information": round(leaks.information, 4),
        "minutes": round(trainer.seconds / 60, 2),
    }
    line = json.dumps(settings)
    print(line)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


if __name__ == "__main__":
    main()
