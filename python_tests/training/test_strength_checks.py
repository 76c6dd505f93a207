"""Warnings of adversaries that are too strong."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from linear_run import Problem
from torch import nn

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.schedules import Linear
from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.config import OptimizerConfig, TrainerConfig
from lnl_ext.training.recipe import LNL
from lnl_ext.training.strength_checks import STRENGTH_LIMIT
from lnl_ext.training.trainer import Trainer


def fit(problem: Problem, head: nn.Module, config: dict[str, Any], **options: Any) -> list[str]:
    """The warnings of a run."""
    name = "many" if options.get("heads", 1) > 1 else "one"
    adversary = BiasAdversary(head.double(), **options)
    bias = {name: getattr(problem, name)}
    batches = TensorBatches(problem.images, problem.labels, bias, batch_size=20)
    trainer = Trainer(
        problem.features, problem.classifier, {name: adversary}, TrainerConfig(**config)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(batches, progress=False)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("options", "strength", "total"),
    [
        ({"reversal": 1.0, "entropy_weight": 0.1}, 1.0, None),
        ({"reversal": 1.6, "entropy_weight": 0.16}, 1.0, "1.76"),
        ({"reversal": 1.6, "entropy_weight": 0.16}, Linear(end=0.5), None),
        ({"reversal": Linear(2.0), "entropy_weight": 0.0}, 1.0, "2"),
        ({"reversal": torch.tensor(2.0), "entropy_weight": 0.0}, 1.0, "2"),
        ({"reversal": 0.6, "entropy_weight": 0.0, "heads": 3}, 1.0, "1.8"),
        ({"reversal": "ramp", "entropy_weight": "ramp"}, 1.0, None),
        ({"reversal": 6.0, "reduction": "sum"}, 1.0, None),
    ],
)
def test_a_sum_of_coefficients_above_the_limit_is_said(
    options: dict[str, Any], strength: Any, total: str | None
) -> None:
    head = nn.Linear(4, 5 * options.get("heads", 1))
    said = fit(Problem(), head, {"strength": strength}, **options)
    said = [text for text in said if "summed over all bias heads" in text]
    assert len(said) == (total is not None)
    assert all(f"is {total}, summed" in text and str(STRENGTH_LIMIT) in text for text in said)


def test_the_recipe_is_below_the_limit_for_any_number_of_columns() -> None:
    for columns in (1, 2, 5):
        made = LNL.adversaries((16,), {str(number): 3 for number in range(columns)})
        total = sum(a.final("reversal") + a.final("entropy_weight") for a in made.values())
        assert total == pytest.approx(LNL.reversal + LNL.entropy_weight)
        assert total <= STRENGTH_LIMIT


def wrong_head(problem: Problem) -> nn.Linear:
    """A head that is sure of a class that no sample has."""
    head = nn.Linear(4, 6)
    with torch.no_grad():
        head.bias[5] += 5.0
    problem.one[3] = IGNORE_INDEX
    return head


@pytest.mark.parametrize(("rate", "count"), [(1e-6, 1), (0.5, 0)])
def test_a_head_that_is_worse_than_knowing_nothing_is_said_once(rate: float, count: int) -> None:
    problem = Problem()
    config = {
        "epochs": 30,
        "strength": Linear(begin=0.9),
        "head_optimizer": OptimizerConfig(learning_rate=rate),
    }
    said = [t for t in fit(problem, wrong_head(problem), config) if "above H(b)" in t]
    assert len(said) == count
    known = problem.one[problem.one != IGNORE_INDEX]
    share = torch.bincount(known) / len(known)
    assert all(f"H(b) = {-torch.xlogy(share, share).sum():.3g}" in text for text in said)


def test_heads_side_by_side_are_compared_with_the_sum_of_their_entropies() -> None:
    problem = Problem()
    config = {"epochs": 30, "head_optimizer": OptimizerConfig(learning_rate=0.05)}
    said = fit(problem, nn.Linear(4, 15), config, heads=3)  # a head's CE is above a third of H(b)
    assert not [text for text in said if "above H(b)" in text]


def test_a_weighted_head_that_knows_nothing_is_not_said_to_know_less() -> None:
    """Samples of large weight are drawn now more, now less, and the mean follows them."""
    bias = torch.arange(60) % 2
    weight = torch.where(torch.arange(60) < 12, 10.0, 0.1)
    batches = TensorBatches(
        torch.randn(60, 3),
        bias,
        {"bias": bias, "weight": weight},
        batch_size=20,
        weights=torch.ones(60),
    )
    head = nn.Linear(4, 2)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    frozen = OptimizerConfig("sgd", learning_rate=1e-9)
    trainer = Trainer(
        nn.Linear(3, 4),
        nn.Linear(4, 2),
        {"bias": BiasAdversary(head)},
        TrainerConfig(epochs=20, head_optimizer=frozen),
        sample_weights={"bias": "weight"},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = trainer.fit(batches, progress=False)
    found = [record["bias_cross_entropy"] for record in history]
    assert max(found) > 1.5 * min(found)
