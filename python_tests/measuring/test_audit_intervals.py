"""The intervals of an audit lie about their estimates, and the information is at most log C."""

import math

import pytest
import torch

import lnl_ext
from lnl_ext.measuring.information import Sampling, measure


def measured(samples: int, classes: int, right: float, seed: int):
    """Measure the best probe of a class that is shown rightly with a given probability."""
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randint(classes, (samples,), generator=generator)
    other = (bias + torch.randint(1, classes, (samples,), generator=generator)) % classes
    wrong = torch.rand(samples, generator=generator) > right
    shown = torch.where(wrong, other, bias)
    known = torch.full((samples, classes), (1 - right) / (classes - 1)).log()
    known[torch.arange(samples), shown] = math.log(right)
    return measure(
        known[:, :, None, None],
        bias[:, None, None],
        torch.zeros(samples),
        classes,
        Sampling(1, 300, 0.95, seed),
    )


def test_intervals_of_known_information():
    known = math.log(4) + 0.8 * math.log(0.8) + 0.2 * math.log(0.2 / 3)
    intervals = [measured(120, 4, 0.8, seed).information_interval for seed in range(100)]
    # 95 expected; fewer than 88 once in 700 times.
    assert sum(low < known < high for low, high in intervals) >= 88


@pytest.mark.parametrize("right", [0.3, 1 - 1e-9])
def test_intervals_hold_their_estimates_with_many_classes(right):
    for seed in range(5):
        probe = measured(90, 30, right, seed)
        low, high = probe.information_interval
        assert low <= probe.information <= high <= math.log(30)
        low, high = probe.accuracy_interval
        assert 0 <= low <= probe.accuracy <= high <= 1


def test_two_balanced_classes_have_no_more_than_ln_2():
    features = torch.zeros(200, 1)
    bias = torch.arange(200) % 2
    report = lnl_ext.audit(features, bias, bias, probes="linear", permutations=9, resamples=9)
    assert report.biases["bias"].entropy <= math.log(2)
    assert "nats (Miller-Madow)" in report.to_markdown()
