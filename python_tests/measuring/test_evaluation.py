"""Accuracy, per group and of the worst group, without a trace in the model."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import nn

from lnl_ext.measuring.evaluation import Predictions, evaluating, outputs, predict
from lnl_ext.measuring.groups import GroupAccuracy

LOGITS = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0], [5.0, 4.0]])
LABELS = torch.tensor([0, 1, 1, 0, 0])  # right, right, wrong, wrong, right


def test_predictions_are_those_of_evaluation_mode_over_all_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    images, labels = torch.randn(10, 4), torch.randint(3, (10,))
    batches = [(images[:7], labels[:7], {"bias": None}), (images[7:], labels[7:])]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predictions = predict(model, batches)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.eval()
    assert torch.equal(predictions.logits, model(images).detach())
    assert not predictions.logits.requires_grad
    assert torch.equal(predictions.labels, labels)


def test_nothing_to_evaluate_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        predict(nn.Identity(), [])
    with pytest.raises(ValueError, match="inputs has no batch"):
        outputs(nn.Identity(), [])


def test_every_submodule_returns_to_its_own_mode() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    model[0].eval()  # frozen statistics
    with contextlib.suppress(KeyError), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert [m.training for m in model.modules()] == [True, False, True]


def test_accuracy() -> None:
    assert Predictions(LOGITS, LABELS).accuracy == pytest.approx(0.6)
    assert math.isnan(Predictions(LOGITS[:0], LABELS[:0]).accuracy)


def test_accuracy_per_group_and_of_the_worst() -> None:
    predicted, bias = LOGITS.argmax(1), torch.tensor([7, 7, 3, 3, -1])
    result = GroupAccuracy.of(predicted, LABELS, bias, aligned=bias == 7)
    assert result.overall == pytest.approx(0.6)
    assert result.accuracy == {(0, 7): 1, (1, 7): 1, (1, 3): 0, (0, 3): 0}
    assert result.samples == dict.fromkeys(result.accuracy, 1)
    assert (result.worst, result.difference) == (0, 1)
    assert result.worst_group in ((0, 3), (1, 3))
    assert (result.aligned, result.conflicting) == (1, 0)
    assert result.of_bias(7) == (1, 2)
    assert result.of_bias(3) == (0, 2)
    assert math.isnan(result.of_bias(5)[0])
    unknown = GroupAccuracy.of(predicted, LABELS, bias)
    assert unknown.aligned is unknown.conflicting is None


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(4), r"bias has shape \(4,\), expected \(5,\)"),
        (torch.full((5,), -1), "bias puts no sample in a group"),
    ],
)
def test_groups_that_cannot_be_used_are_refused(bias: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupAccuracy.of(LOGITS.argmax(1), LABELS, bias)
