"""How well scores rank the samples of a class before the others: the area under the ROC curve."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lnl_ext.measuring.information import Sampling, bootstrap_intervals
from lnl_ext.measuring.interval import Interval

__all__ = ["auc"]


def auc(
    logits: Tensor,
    labels: Tensor,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, Interval]:
    """Return the AUC of a classifier and its bootstrap interval.

    Of two classes the probability of the second ranks the samples; of more classes it is the mean
    over those that occur, each against the rest (`sklearn.metrics.roc_auc_score` with
    ``multi_class="ovr"``). The resampling needs it for many weights of the samples at once.

    Parameters
    ----------
    logits
        Shape (N, C).
    labels
        Shape (N,), int64.
    resamples, confidence, seed
        Of the bootstrap; none without resamples.

    Returns
    -------
    float, Interval
        NaN where there are not two classes among the labels, or a score is NaN.
    """
    nothing = Interval(math.nan, math.nan)
    scores = logits.double().softmax(1)
    present = torch.unique(labels).tolist()
    if len(present) < 2 or scores.isnan().any():
        return math.nan, nothing
    chosen = [1] if logits.shape[1] == 2 else present
    ranks = [torch.unique(scores[:, number], return_inverse=True) for number in chosen]

    def of_weights(times: Tensor) -> Tensor:
        areas = [
            _area(times, places, len(values), labels == number)
            for number, (values, places) in zip(chosen, ranks, strict=True)
        ]
        return torch.stack(areas).nanmean(0)[None]

    found = of_weights(torch.ones(1, len(labels), dtype=torch.float64)).item()
    if not resamples:
        return found, nothing
    sampling = Sampling(0, resamples, confidence, seed)
    (interval,) = bootstrap_intervals(of_weights, len(labels), (found,), sampling)
    return found, Interval(max(0.0, interval.low), min(1.0, interval.high))


def _area(times: Tensor, places: Tensor, size: int, positive: Tensor) -> Tensor:
    """Return the AUC under weights ``times`` (R, N); NaN without one of the two kinds.

    ``places`` are the positions of the scores among the ``size`` different ones, in rising order.
    """
    counts = [
        times.new_zeros(len(times), size).index_add_(1, places[kind], times[:, kind])
        for kind in (positive, ~positive)
    ]
    below = counts[1].cumsum(1) - counts[1] / 2  # of equal scores half
    pairs = counts[0].sum(1) * counts[1].sum(1)
    return (counts[0] * below).sum(1) / pairs
