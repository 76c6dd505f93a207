"""Scorers against group accuracy, fairlearn's definition and the audit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from biased_table import biased_table
from sklearn.linear_model import LogisticRegression

import lnl_ext
from lnl_ext.estimators import (
    AdversarialClassifier,
    neg_bias_information,
    neg_demographic_parity_difference,
    worst_group_accuracy,
)
from lnl_ext.measuring import demographic_parity_difference

TABLE = biased_table(600, aligned=0.8, seed=0)
NAMES = np.array(["blue", "red"])


class Says:
    """Predicts what it is told to."""

    def __init__(self, *predicted: str) -> None:
        self.predicted = np.array(predicted)

    def predict(self, rows: object) -> object:
        return self.predicted


def test_worst_group_accuracy_counts_by_class_and_bias() -> None:
    y = ["yes", "yes", "yes", "no", "no", "no"]
    model = Says("yes", "no", "yes", "no", "no", "yes")
    # Right: (yes, a) 1 of 2, (yes, b) 1 of 1, (no, a) 2 of 2; the last has no known bias.
    bias = ["a", "a", "b", "a", "a", None]
    assert worst_group_accuracy(model, None, y, bias=bias) == 0.5


def test_a_class_that_is_never_right_scores_zero() -> None:
    assert worst_group_accuracy(Says("c", "c"), None, ["a", "c"], bias=[0, 1]) == 0.0


@pytest.mark.parametrize(
    ("predicted", "bias", "gap"),
    [
        ("yyynnn", "aaabbb", 1.0),
        ("yynnyn", "aaaabb", 0.0),
        ("yynnnn", "aaaabb", 0.5),
        ("yzznnn", "aabbcc", 1.0),  # n: 0, 1/2 and 1
        ("yyynnn", "aaab--", 1.0),
    ],
)
def test_demographic_parity(predicted: str, bias: str, gap: float) -> None:
    groups = [None if b == "-" else b for b in bias]
    score = neg_demographic_parity_difference(Says(*predicted), None, [*predicted], bias=groups)
    assert score == -gap


def test_demographic_parity_is_fairlearns() -> None:
    metrics = pytest.importorskip("fairlearn.metrics")
    model = LogisticRegression().fit(TABLE.rows, TABLE.labels)
    predicted = model.predict(TABLE.rows)
    theirs = metrics.demographic_parity_difference(
        TABLE.labels, predicted, sensitive_features=TABLE.bias
    )
    score = neg_demographic_parity_difference(model, TABLE.rows, TABLE.labels, bias=TABLE.bias)
    assert score == pytest.approx(-theirs, abs=1e-12)


@pytest.mark.parametrize(
    ("predicted", "bias", "message"),
    [([0, 1], [0], r"bias has shape \(1,\), expected \(2,\)"), ([0], [-1], "no sample in a group")],
)
def test_demographic_parity_needs_groups(
    predicted: list[int], bias: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        demographic_parity_difference(torch.tensor(predicted), torch.tensor(bias))


def test_information_is_the_audits() -> None:
    model = AdversarialClassifier(epochs=2, random_state=0)
    model.fit(TABLE.rows, NAMES[TABLE.labels], bias=TABLE.bias)
    score = neg_bias_information(model, TABLE.rows, NAMES[TABLE.labels], bias=TABLE.bias)
    report = lnl_ext.audit(
        model.transform(TABLE.rows), TABLE.labels, TABLE.bias, permutations=1, resamples=10
    )
    assert score == -report.biases["bias"].leakage.information < -0.1
