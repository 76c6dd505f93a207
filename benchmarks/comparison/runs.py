"""A run: one way on one data set with one seed, and what is measured of it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from recording import records
from torch import Tensor

from comparison.data_sets import Data, Part, load
from comparison.protocol import TABLES, TABLES_ONLY
from comparison.ways import Trained, train
from lnl_ext.measuring import audit
from lnl_ext.measuring.evaluation import outputs
from lnl_ext.measuring.groups import GroupAccuracy

PROBES = ("linear", "mlp")
PERMUTATIONS = 999


@dataclasses.dataclass(frozen=True)
class Run:
    """The fields of a line of the results file."""

    benchmark: str
    data: str
    alignment: float
    """Share of the training samples with the usual bias of their label."""
    method: str
    seed: int
    accuracy: float
    worst_group: float
    """Accuracy in the worst group of label and bias."""
    conflicting: float
    """Accuracy on the samples whose bias is not the usual one."""
    parity_gap: float | None
    """Difference between the bias classes in the share of the second label; None: more labels."""
    nats: float
    """Information about the bias of the strongest probe, trained to convergence."""
    nats_low: float
    nats_high: float
    probe_accuracy: float
    chance: float
    """Accuracy of always predicting the most frequent bias."""
    entropy: float
    """Of the bias, in nats: what could be known."""
    p_value: float
    """Of "the bias cannot be predicted from the features"."""
    steps: int
    train_samples: int
    minutes: float
    threads: int


def run_missing(
    options: argparse.Namespace, done: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Train and measure the runs asked for that are not ``done``; append each, but not to choose.

    Prints which data sets are left out, and each run as it ends, to the standard error.

    Parameters
    ----------
    options
        The command's: data, methods, seeds, files by data set, results, choose, no_progress.
    done
        Recorded runs.
    """
    recorded = {(run["data"], run["method"], run["seed"]) for run in done}
    found = []
    for name in options.data:
        if (file := getattr(options, name)) is None:
            print(f"{name} is left out: its file is not given (--{name})", file=sys.stderr)
            continue
        missing = [
            (seed, way)
            for seed in options.seeds
            for way in options.methods
            if (name, way, seed) not in recorded and (way not in TABLES_ONLY or name in TABLES)
        ]
        data = load(name, file) if missing else None
        for number, (seed, way) in enumerate(missing, 1):
            assert data is not None
            run = measure(data, way, seed, choose=options.choose, progress=not options.no_progress)
            if not options.choose:
                records.append(options.results, run)
            found.append(dataclasses.asdict(run))
            print(
                f"{name} {number}/{len(missing)}: {way}, seed {seed}, worst group "
                f"{run.worst_group:.3f}, {run.nats:.3f} nats, {run.minutes:.1f} minutes",
                file=sys.stderr,
                flush=True,
            )
    return found


def measure(data: Data, way: str, seed: int, *, choose: bool = False, progress: bool = True) -> Run:
    """Train one way from new weights and measure it on the test part.

    Parameters
    ----------
    choose
        Measure on the validation part, see `judge`.
    """
    return judge(train(data, way, seed, progress=progress), data, way, seed, choose=choose)


def judge(
    trained: Trained, data: Data, name: str, seed: int, *, choose: bool, benchmark: str = "compare"
) -> Run:
    """Measure what was trained.

    Probes learn from the features of the validation part, on which nothing was trained, and are
    measured on those of the test part, which nothing has seen. With ``choose`` the test part is not
    looked at: each fifth of the validation part is measured by probes that learn from the rest, and
    the figures are their means.
    """
    judged = data.validation if choose else data.test
    parts = [data.validation] if choose else [data.validation, data.test]
    features = torch.cat([_features(trained, data, part) for part in parts])
    with torch.no_grad():
        predicted = trained.classifier(features).argmax(1)
    labels = torch.cat([part.labels for part in parts])
    bias = torch.cat([part.bias for part in parts])
    last = torch.arange(len(labels)) >= len(labels) - len(judged)
    fifth = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)) % 5
    audits = [
        audit(
            features,
            labels,
            bias,
            probes=PROBES,
            test=test,
            permutations=PERMUTATIONS,
            seed=seed,
        ).biases["bias"]
        for test in ([fifth == number for number in range(5)] if choose else [last])
    ]
    probes = max(
        ([found.probes[name] for found in audits] for name in PROBES),
        key=lambda probes: fmean(probe.information for probe in probes),
    )
    lows, highs = zip(*(probe.information_interval for probe in probes), strict=True)
    groups = GroupAccuracy.of(predicted[last], judged.labels, judged.bias, judged.aligned)
    return Run(
        benchmark=benchmark,
        data=data.name,
        alignment=round(data.alignment, 4),
        method=name,
        seed=seed,
        accuracy=round(groups.overall, 4),
        worst_group=round(groups.worst, 4),
        conflicting=round(groups.conflicting or 0.0, 4),
        parity_gap=parity_gap(predicted[last], judged),
        nats=round(fmean(probe.information for probe in probes), 4),
        nats_low=round(fmean(lows), 4),
        nats_high=round(fmean(highs), 4),
        probe_accuracy=round(fmean(probe.accuracy for probe in probes), 4),
        chance=round(fmean(found.majority for found in audits), 4),
        entropy=round(fmean(found.entropy for found in audits), 4),
        p_value=round(fmean(probe.p_value for probe in probes), 4),
        steps=trained.steps,
        train_samples=len(data.train),
        minutes=round(trained.seconds / 60, 2),
        threads=torch.get_num_threads(),
    )


def parity_gap(predicted: Tensor, part: Part) -> float | None:
    """Return how much more often one bias class than the other is given the second label."""
    if int(part.labels.max()) > 1 or int(part.bias.max()) > 1:
        return None
    shares = [(predicted[part.bias == bias] == 1).double().mean().item() for bias in (0, 1)]
    return round(abs(shares[1] - shares[0]), 4)


def _features(trained: Trained, data: Data, part: Part) -> Tensor:
    batches = (data.prepare(inputs) for inputs in torch.split(part.inputs, 500))
    return outputs(trained.features, batches)
