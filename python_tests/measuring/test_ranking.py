"""AUC and the intervals of shares."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from lnl_ext.measuring.interval import proportion_interval
from lnl_ext.measuring.ranking import auc


def draw(classes: int, samples: int = 300, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (samples,), generator=generator)
    logits = torch.randn(samples, classes, generator=generator)
    logits += torch.nn.functional.one_hot(labels, classes)
    return (logits.round() if ties else logits), labels


@pytest.mark.parametrize("ties", [False, True])
def test_two_classes_as_scikit_learn_has_it(ties):
    logits, labels = draw(2, ties=ties)
    found, interval = auc(logits, labels)
    expected = roc_auc_score(labels, logits.double().softmax(1)[:, 1])
    assert found == pytest.approx(expected, abs=1e-12)
    assert interval.low < found < interval.high
    # Hanley and McNeil's standard error (1982).
    positive, negative = int(labels.sum()), int((1 - labels).sum())
    first, second = found / (2 - found), 2 * found**2 / (1 + found)
    variance = found * (1 - found) + (positive - 1) * (first - found**2)
    variance += (negative - 1) * (second - found**2)
    width = 2 * 1.96 * math.sqrt(variance / positive / negative)
    assert interval.high - interval.low == pytest.approx(width, rel=0.15)


def test_several_classes_as_scikit_learn_has_it():
    logits, labels = draw(5)
    expected = roc_auc_score(labels, logits.double().softmax(1), multi_class="ovr")
    assert auc(logits, labels, resamples=0)[0] == pytest.approx(expected, abs=1e-12)
    # A class that does not occur has no part in it.
    wider = torch.cat([logits, logits.new_full((len(logits), 1), -torch.inf)], 1)
    assert auc(wider, labels, resamples=0)[0] == pytest.approx(expected, abs=1e-12)


def test_where_there_is_no_area():
    assert all(map(math.isnan, (auc(torch.randn(4, 2), torch.ones(4).long())[0],)))
    found, interval = auc(torch.full((4, 2), torch.nan), torch.tensor([0, 1, 0, 1]))
    assert math.isnan(found)
    assert math.isnan(interval.low)


def test_few_samples_of_a_class_have_an_interval_all_the_same():
    logits, labels = draw(2, 40)
    labels[:] = 0
    labels[:2] = 1
    found, interval = auc(logits, labels)
    assert interval.low <= found <= interval.high
    assert all(map(math.isfinite, interval))


@pytest.mark.parametrize(("right", "samples"), [(0, 2), (2, 2), (5, 7), (931, 1000)])
def test_wilsons_interval(right, samples):
    low, high = proportion_interval(right / samples, samples)
    z, share = stats.norm.ppf(0.975), right / samples
    middle = (share + z**2 / (2 * samples)) / (1 + z**2 / samples)
    half = z / (1 + z**2 / samples)
    half *= math.sqrt(share * (1 - share) / samples + z**2 / (4 * samples**2))
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-12)


def test_no_samples_have_no_interval():
    assert all(map(math.isnan, proportion_interval(math.nan, 0)))
