"""A probe's information about a bias, with its interval, on samples it has not seen."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lnl_ext.measuring.interval import Interval
from lnl_ext.measuring.probe import true_class
from lnl_ext.ops.types import IGNORE_INDEX

__all__ = [
    "Measurement",
    "Sampling",
    "bootstrap_intervals",
    "entropy_of_counts",
    "measure",
    "permutation_test",
    "plug_in_entropy",
]

_AT_ONCE = 4_000_000  # values of resamples or permutations held together


class Sampling(NamedTuple):
    """How often to resample, with which coverage and seed."""

    permutations: int
    resamples: int
    confidence: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Measurement:
    """How well a probe predicts; `lnl_ext.measuring.ProbeAudit` says what the fields are."""

    accuracy: float
    accuracy_interval: Interval
    cross_entropy: float
    information: float
    information_interval: Interval
    p_value: float
    p_value_within_labels: float


def measure(
    log_probability: Tensor, target: Tensor, labels: Tensor, classes: int, sampling: Sampling
) -> Measurement:
    """Measure a probe on samples that it has not seen; every number is a mean over the heads.

    Parameters
    ----------
    log_probability
        The probe's, shape (N, C, heads, S), C at least ``classes``.
    target
        Shape (N, heads, S) int64, below ``classes``, `IGNORE_INDEX` where ignored.
    labels
        Shape (N,) int64, for the p-value within labels.
    classes
        Number of bias classes that occur.
    sampling
        Of the intervals and p-values.
    """
    known = target != IGNORE_INDEX
    right = (log_probability.argmax(1) == target) & known
    nats = -true_class(log_probability, target).double()
    of_class = torch.stack([(target == c).sum(2) for c in range(classes)], 2).double()
    # What bootstrap draws are whole samples: sums over positions, (n, heads). Those of which
    # nothing is known are not drawn; a head of which nothing was drawn is left out of the mean.
    drawn = known.any(2).any(1)
    counts, right_sum = known.sum(2)[drawn].double(), right.sum(2)[drawn].double()
    nats_sum, of_class = nats.sum(2)[drawn], of_class[drawn]

    def figures(times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return accuracy, cross-entropy (R, heads) and class counts (R, heads, C)."""
        number = times @ counts
        classes_drawn = torch.einsum("rn,nhc->rhc", times, of_class)
        return (times @ right_sum) / number, (times @ nats_sum) / number, classes_drawn

    def resampled(times: Tensor) -> Tensor:
        accuracy, cross_entropy, classes_drawn = figures(times)
        information = plug_in_entropy(classes_drawn) - cross_entropy
        return torch.stack([accuracy.nanmean(1), information.nanmean(1)])

    accuracy, cross_entropy, class_counts = (
        figure.squeeze(0) for figure in figures(torch.ones(1, len(counts), dtype=torch.float64))
    )
    information = (bias_entropy(class_counts) - cross_entropy).mean().item()
    estimates = (accuracy.mean().item(), information)
    accuracy_interval, information_interval = bootstrap_intervals(
        resampled, len(counts), estimates, sampling
    )
    return Measurement(
        accuracy=estimates[0],
        accuracy_interval=_within(accuracy_interval, 0, 1),
        cross_entropy=cross_entropy.mean().item(),
        information=max(information, 0.0),
        information_interval=_within(information_interval, 0, math.log(classes)),
        p_value=permutation_test(log_probability, target, None, sampling),
        p_value_within_labels=permutation_test(log_probability, target, labels, sampling),
    )


def _within(interval: Interval, lowest: float, highest: float) -> Interval:
    return Interval(*(min(max(end, lowest), highest) for end in interval))


def plug_in_entropy(counts: Tensor) -> Tensor:
    """Return the entropy, in nats, of the frequencies of classes along the last dimension."""
    shares = counts / counts.sum(-1, keepdim=True).clamp_min(1e-300)
    entropy: Tensor = -torch.special.xlogy(shares, shares).sum(-1)
    return entropy


def entropy_of_counts(counts: Tensor) -> Tensor:
    """Estimate the entropy, in nats, from counts of the classes along the last dimension.

    The entropy of the frequencies is too small by ``(classes seen - 1) / (2 * samples)`` in
    expectation, which is added (Miller 1955): the estimate is right on average, and may thus be
    above the logarithm of the number of classes.
    """
    seen = (counts > 0).sum(-1)
    bias = (seen - 1).clamp_min(0) / (2 * counts.sum(-1).clamp_min(1e-300))
    return plug_in_entropy(counts) + bias


def bias_entropy(counts: Tensor) -> Tensor:
    """Return H(b), to which the correction of the estimate adds no more than is possible."""
    return entropy_of_counts(counts).clamp_max(math.log(counts.shape[-1]))


def bootstrap_intervals(
    figures: Callable[[Tensor], Tensor],
    samples: int,
    estimates: tuple[float, ...],
    sampling: Sampling,
) -> list[Interval]:
    """Return the bias-centred percentile bootstrap intervals of statistics.

    The quantiles of the resampled statistics (Efron 1979), all shifted so that their median is the
    estimate, which thus lies inside. Where the statistic has a bias that grows smaller with the
    number of samples, as an entropy has, that of a resample adds to that of the sample; an
    interval without the shift may lie off the estimate altogether (Efron and Tibshirani,
    *An Introduction to the Bootstrap*, 1993, chapter 10, on the bootstrap estimate of bias).

    Parameters
    ----------
    figures
        Maps how often every sample was drawn, shape (R, N) float64, to the F statistics of each of
        the R resamples, shape (F, R). Whole samples are drawn: the positions of one belong
        together.
    samples
        N.
    estimates
        The F statistics of the samples themselves, corrected for their bias where they have one.
    sampling
        How many times N samples are drawn with replacement, and the coverage. Resamples in which a
        statistic does not exist (NaN) are left out of its interval.
    """
    from scipy import stats

    def of_rows(rows: np.ndarray, axis: int) -> np.ndarray:
        drawn = torch.from_numpy(np.atleast_2d(rows).astype(np.int64))
        times = torch.zeros(len(drawn), samples, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
        found = figures(times).numpy()
        return found if rows.ndim == 2 else found[:, 0]

    with warnings.catch_warnings():
        # Of its own interval, which is not used.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (np.arange(samples),),
            of_rows,
            n_resamples=sampling.resamples,
            batch=max(1, _AT_ONCE // samples),
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(sampling.seed),
        ).bootstrap_distribution
    tails = [(1 - sampling.confidence) / 2, 0.5, (1 + sampling.confidence) / 2]
    return [
        Interval(min(estimate, estimate + low - middle), max(estimate, estimate + high - middle))
        for estimate, (low, middle, high) in zip(
            estimates, np.nanquantile(found, tails, axis=-1).T.tolist(), strict=True
        )
    ]


def permutation_test(
    log_probability: Tensor, target: Tensor, strata: Tensor | None, sampling: Sampling
) -> float:
    """Return the p-value of "the bias cannot be predicted from the features".

    The targets of the test samples are exchanged at random and the probe's cross-entropy is
    computed again; p is the share of permutations with as low a cross-entropy as the true targets
    have, these counted as one permutation (`scipy.stats.permutation_test`). The probe has not seen
    these samples, so that the test is exact for it without training it anew.

    Parameters
    ----------
    log_probability
        The probe's, shape (N, C, heads, S).
    target
        Shape (N, heads, S), `IGNORE_INDEX` where ignored. Whole samples are exchanged.
    strata
        Shape (N,): exchange within these groups only. With the labels: the test of whether the
        features say more about the bias than the label does. None: exchange all.
    sampling
        How many permutations, and which.
    """
    from scipy import stats

    samples, classes = log_probability.shape[:2]
    # (N, C + 1, heads * S): class C is that of ignored targets and costs nothing.
    nats = torch.cat(
        [-log_probability.flatten(2), log_probability.new_zeros(samples, 1, target[0].numel())], 1
    )
    numbers = torch.where(target == IGNORE_INDEX, classes, target).flatten(1)
    groups = None if strata is None else strata.numpy()
    by_group = None if groups is None else np.argsort(groups, kind="stable")

    def cross_entropy(shuffled: np.ndarray, axis: int) -> np.ndarray:
        source = np.atleast_2d(shuffled)
        if groups is not None:
            # Within a group: its places in order get its samples in the order they were drawn in.
            drawn = np.take_along_axis(
                source, np.argsort(groups[source], axis=1, kind="stable"), axis=1
            )
            source = np.empty_like(drawn)
            source[:, by_group] = drawn
        exchanged = numbers[torch.from_numpy(source.astype(np.int64))]  # (R, N, heads * S)
        costs = nats.expand(len(source), -1, -1, -1).gather(2, exchanged.unsqueeze(2))
        found = costs.sum((1, 2, 3), dtype=torch.float64).numpy()
        return found if shuffled.ndim == 2 else found[0]

    return float(
        stats.permutation_test(
            (np.arange(samples),),
            cross_entropy,
            permutation_type="pairings",
            alternative="less",
            n_resamples=sampling.permutations,
            batch=max(1, _AT_ONCE // numbers.numel()),
            vectorized=True,
            rng=np.random.default_rng(sampling.seed),
        ).pvalue
    )
