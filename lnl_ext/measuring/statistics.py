"""How sure a figure is: bootstrap intervals and a permutation test, on the test samples alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lnl_ext.measuring.audit_probes import IGNORED, chosen


def bootstrap_interval(
    figure: Callable[[Tensor], Tensor],
    samples: int,
    *,
    estimate: float,
    resamples: int,
    confidence: float,
    seed: int,
) -> tuple[float, float]:
    """Return the bias-centred percentile bootstrap interval of a figure.

    The quantiles of the resampled figures (Efron 1979), all shifted so that their median is the
    estimate, which thus lies inside. Where the figure has a bias that grows smaller with the
    number of samples, as an entropy has, that of a resample adds to that of the sample; an
    interval without the shift may lie off the estimate altogether (Efron and Tibshirani,
    *An Introduction to the Bootstrap*, 1993, chapter 10, on the bootstrap estimate of bias).

    Parameters
    ----------
    figure
        Maps how often every sample was drawn, shape (R, N) float64, to the figure of each of the
        R resamples, shape (R,). Whole samples are drawn: the positions of one belong together.
    samples
        N.
    estimate
        The figure of the samples themselves, corrected for its bias where it has one.
    resamples
        How many times N samples are drawn with replacement.
    confidence
        Coverage, in (0, 1).
    seed
        Of the drawing.
    """
    generator = torch.Generator().manual_seed(seed)
    values = []
    at_once = max(1, min(resamples, 4_000_000 // max(1, samples)))
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = torch.randint(samples, (count, samples), generator=generator)
        times = torch.zeros(count, samples, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(times))
        values.append(figure(times))
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    drawn_figures = torch.cat(values).double()
    low, middle, high = torch.quantile(
        drawn_figures, torch.cat([tails, tails.new_tensor([0.5])]).sort().values
    ).tolist()
    return min(estimate, estimate + low - middle), max(estimate, estimate + high - middle)


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


def permutation_test(
    log_probability: Tensor,
    target: Tensor,
    strata: Tensor | None,
    *,
    permutations: int,
    seed: int,
) -> float:
    """Return the p-value of "the bias cannot be predicted from the features".

    The targets of the test samples are exchanged at random and the probe's cross-entropy is
    computed again; p is the share of permutations with as low a cross-entropy as the true targets
    have, these counted as one permutation (so p is at least ``1 / (permutations + 1)``). The probe
    has not seen these samples, so that the test is exact for it without training it anew.

    Parameters
    ----------
    log_probability
        The probe's, shape (N, C, heads, S).
    target
        Shape (N, heads, S), -100 where ignored. Whole samples are exchanged.
    strata
        Shape (N,): exchange within these groups only. With the labels: the test of whether the
        features tell more about the bias than the label does. None: exchange all.
    permutations, seed
        How many, and which.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = len(target)
    groups = torch.zeros(samples) if strata is None else strata
    by_group = torch.argsort(groups, stable=True)

    def cross_entropy(exchanged: Tensor) -> Tensor:
        known = (exchanged != IGNORED).sum()
        return -chosen(log_probability, exchanged).double().sum() / known

    observed = cross_entropy(target)
    as_low = 1
    for _ in range(permutations):
        shuffled = torch.randperm(samples, generator=generator)
        source = shuffled[torch.argsort(groups[shuffled], stable=True)]
        exchanged = torch.empty_like(target)
        exchanged[by_group] = target[source]
        # Rounding: a permutation within equal targets is as low, not lower.
        as_low += int(cross_entropy(exchanged) <= observed + 1e-12)
    return as_low / (permutations + 1)
