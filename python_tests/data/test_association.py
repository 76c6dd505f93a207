"""What a set of samples says about how label and bias go together."""

from __future__ import annotations

import pytest
import torch

from lnl_ext.data.association import Association


def of(counts: list[list[int]], missing: int = 0) -> tuple[Association, torch.Tensor, torch.Tensor]:
    table = torch.tensor(counts)
    labels, bias = (table > 0).nonzero().T
    repeats = table[labels, bias]
    labels, bias = labels.repeat_interleave(repeats), bias.repeat_interleave(repeats)
    labels = torch.cat([labels, torch.zeros(missing, dtype=torch.long)])
    bias = torch.cat([bias, torch.full((missing,), -100)])
    return Association.of(labels, bias, (len(counts), len(counts[0]))), labels, bias


def test_counts_and_exceptions():
    found, labels, bias = of([[600, 50], [40, 596]], missing=7)
    assert found.counts.tolist() == [[600, 50], [40, 596]]
    assert (found.samples, found.missing) == (1286, 7)
    assert found.groups.tolist() == [[True, False], [False, True]]
    assert (found.aligned, found.exceptions) == (1196, 90)
    assert found.text("digit", "colour").startswith("93 % aligned, 90 exceptions (50 % if digit")
    aligned = found.is_aligned(labels, bias)
    assert int(aligned.sum()) == 1196
    assert not aligned[-7:].any()


@pytest.mark.parametrize(
    ("counts", "groups"),
    [
        # A frequent label is not aligned with every bias.
        ([[900, 60], [10, 30]], [[True, False], [False, True]]),
        # Two labels go with one bias: neither is an exception.
        ([[50, 0], [50, 0], [0, 50]], [[True, False], [True, False], [False, True]]),
        # Bins that nobody is in.
        ([[50, 0, 10], [10, 0, 50]], [[True, False, False], [False, False, True]]),
    ],
)
def test_groups_with_more_than_independence_gives_are_aligned(counts, groups):
    assert of(counts)[0].groups.tolist() == groups


@pytest.mark.parametrize("counts", [[[25, 25], [25, 25]], [[2, 4, 6], [1, 2, 3]]])
def test_nothing_is_aligned_where_label_and_bias_are_independent(counts):
    found, *_ = of(counts)
    assert found.aligned == 0
    assert found.text("label", "site") == "label and site are independent"


def test_one_exception_is_not_a_hundred_percent():
    assert of([[5000, 1], [0, 5000]])[0].text("a", "b").startswith("99 % aligned, 1 exceptions")
    assert of([[5000, 0], [0, 5000]])[0].text("a", "b").startswith("100 % aligned, 0 exceptions")
    assert of([[0, 0], [0, 0]], missing=2)[0].text("a", "b") == "b is not known of any"
