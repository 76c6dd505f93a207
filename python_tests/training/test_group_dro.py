"""Weights of the samples in the task loss: given ones, and those of group DRO."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_run import Problem
from processes import in_processes, needs_gloo
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from trainer_runs import SGD

from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.config import TrainerConfig
from lnl_ext.training.group_dro import GroupDRO
from lnl_ext.training.trainer import Trainer


def groups() -> Tensor:
    """Three groups, of which one is absent from the first batches, and samples without one."""
    numbers = torch.tensor([0, 0, 1, 0, 1, 1, 0, 0, -100, 1])
    return torch.cat([numbers, numbers.where(numbers != 1, 2)])


def by_hand(batch: int, step_size: float) -> tuple[nn.Linear, nn.Linear, Tensor]:
    """Algorithm 1 of the paper, a loop over groups; samples without one as in the plain loss."""
    problem = Problem()
    f, g = problem.features, problem.classifier
    optimizer = torch.optim.SGD([*f.parameters(), *g.parameters()], SGD.learning_rate)
    q = torch.full((3,), 1 / 3, dtype=torch.float64)
    for rows in torch.arange(20).split(batch):
        losses = F.cross_entropy(g(f(problem.images[rows])), problem.labels[rows], reduction="none")
        own = groups()[rows]
        means = [
            losses[own == k].mean() if (own == k).any() else losses.sum() * 0 for k in range(3)
        ]
        q = q * torch.stack(means).detach().mul(step_size).exp()
        q = q / q.sum()
        known = (own >= 0).double().mean()
        loss = known * sum(w * mean for w, mean in zip(q, means, strict=True))
        loss = loss + losses[own < 0].sum() / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return f, g, q


def run(batch: int, step_size: float, accumulate: int = 1) -> dict[str, Any]:
    problem = Problem()
    dro = GroupDRO(3, step_size=step_size)
    batches = TensorBatches(
        problem.images, problem.labels, {"group": groups()}, batch_size=batch, shuffle=False
    )
    config = TrainerConfig(optimizer=SGD, accumulate=accumulate)
    trainer = Trainer(problem.features, problem.classifier, None, config, task_weights=dro)
    trainer.fit(batches, progress=False)
    return {**problem.weights(), "q": dro.group_weights}


@pytest.mark.parametrize("step_size", [0.01, 1.0])
def test_group_dro_is_the_papers_algorithm(step_size: float) -> None:
    f, g, q = by_hand(4, step_size)
    found = run(4, step_size)
    expected = {"f": f.state_dict(), "g": g.state_dict(), "q": q.float()}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # q is float32
    assert (q - 1 / 3).abs().max() > 0.005


@needs_gloo
def test_group_dro_in_processes_is_that_of_the_whole_batch() -> None:
    whole = run(7, 0.5)  # shares of 4 and 3
    for found in in_processes(run, 7, 0.5):
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_given_weights_are_those_of_the_mean(accumulate: int) -> None:
    problem = Problem()
    weights = torch.rand(20, generator=torch.Generator().manual_seed(3)).double()
    logits = problem.classifier(problem.features(problem.images))
    loss = (weights * F.cross_entropy(logits, problem.labels, reduction="none")).mean()
    expected = torch.autograd.grad(loss, list(problem.features.parameters()))
    batches = TensorBatches(
        problem.images,
        problem.labels,
        {"weight": weights},
        batch_size=20 // accumulate,
        shuffle=False,
    )
    config = TrainerConfig(optimizer=SGD, accumulate=accumulate)
    trainer = Trainer(problem.features, problem.classifier, None, config, task_weights="weight")
    (record,) = trainer.fit(batches, progress=False)
    for parameter, gradient in zip(problem.features.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
    assert record["label_loss"] == pytest.approx(loss.item())


def test_what_cannot_be_weighed_is_refused() -> None:
    with pytest.raises(ValueError, match="groups is 0, expected an int of at least 1"):
        GroupDRO(0)
    with pytest.raises(ValueError, match="step_size"):
        GroupDRO(2, step_size=0.0)
    problem = Problem()
    for bias, message in (
        ({"other": groups()}, "no bias target for 'group'"),
        ({"group": torch.zeros(20, 2)}, r"'group' have shape \(20, 2\), expected \(20,\)"),
    ):
        batches = TensorBatches(problem.images, problem.labels, bias, batch_size=20)
        trainer = Trainer(problem.features, problem.classifier, task_weights=GroupDRO(3))
        with pytest.raises((KeyError, ValueError), match=message):
            trainer.fit(batches, progress=False)
