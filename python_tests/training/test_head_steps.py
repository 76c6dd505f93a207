"""Further steps of the heads, on what they saw in the last steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from linear_run import HEADS, Problem
from processes import in_processes, needs_gloo
from tiny_run import differences, tiny_batches, tiny_data, tiny_trainer
from torch import nn
from torch.nn import functional as F  # noqa: N812
from trainer_runs import Kill, killing

from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.config import OptimizerConfig, TrainerConfig
from lnl_ext.training.head_steps import KEPT
from lnl_ext.training.trainer import Trainer


def one_step(head_steps: int, **config: Any) -> Trainer:
    """A trainer after one step on the whole tiny data, without anything random in its networks."""
    trainer = tiny_trainer(average_decay=None, strength=1.0, head_steps=head_steps, **config)
    for module in (trainer.features, *trainer.adversaries.values()):
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    batches = TensorBatches(*tiny_data(), batch_size=22, shuffle=False)
    with pytest.raises(Kill):
        trainer.fit(killing(batches, trainer, 1), progress=False)
    return trainer


@pytest.mark.parametrize("update", ["joint", "two_step"])
def test_they_leave_features_and_classifier_alone_and_lower_the_heads_loss(update: str) -> None:
    plain, more = one_step(0, update=update), one_step(20, update=update)
    for name in ("features", "classifier"):
        parts = [getattr(trainer, name).state_dict() for trainer in (plain, more)]
        assert differences(*parts) == []
    images, _, bias = tiny_data()
    hidden = plain.features.train()(images).detach()
    for name, adversary in plain.adversaries.items():
        losses = [
            t.adversaries[name](hidden, bias[name], return_terms=True).cross_entropy.item()
            for t in (plain, more)
        ]
        assert losses[1] < losses[0] - 0.01, adversary


def test_they_are_those_of_a_loop_by_hand() -> None:
    """SGD on the mean over the known targets of the one step there is; momentum goes on."""
    problem = Problem()
    target, images = problem.one[:8], problem.images[:8]
    head = copy.deepcopy(problem.heads["one"])
    optimizer = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9)
    hidden = problem.features(images).detach()
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(head(hidden), target, ignore_index=IGNORE_INDEX).backward()
        optimizer.step()
    config = TrainerConfig(
        head_optimizer=OptimizerConfig("sgd", learning_rate=0.1, momentum=0.9), head_steps=3
    )
    batches = TensorBatches(images, problem.labels[:8], {"one": target}, batch_size=8)
    adversaries = {"one": problem.adversary("one")}
    trainer = Trainer(problem.features, problem.classifier, adversaries, config)
    trainer.fit(batches, progress=False)
    for expected, found in zip(head.parameters(), problem.heads["one"].parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_they_see_the_last_steps_only() -> None:
    trainer = tiny_trainer(head_steps=2, epochs=3.0)
    seen: list[torch.Tensor] = []
    trainer.features.register_forward_hook(lambda *args: seen.append(args[2].detach()))
    trainer.fit(tiny_batches(), progress=False)
    kept = trainer.update.recent_state()["recent"]
    assert len(kept) == KEPT
    for step, hidden in zip(kept, seen[-KEPT:], strict=True):
        assert torch.equal(step["parts"][0][0], hidden)


def test_features_are_not_kept_without_them() -> None:
    trainer = tiny_trainer()
    trainer.fit(tiny_batches(), progress=False)
    assert trainer.update.recent_state()["recent"] == []


def test_heads_without_a_target_stay() -> None:
    problem = Problem()
    problem.many[:, 1] = IGNORE_INDEX
    before = problem.heads["many"].weight.detach().clone()
    problem.fit({"many": problem.adversary("many")}, head_steps=3)
    moved = (problem.heads["many"].weight - before).view(HEADS, -1)
    assert [bool((head == 0).all()) for head in moved] == [False, True, False]


def test_a_run_whose_heads_do_not_learn_has_none() -> None:
    problem = Problem()
    adversary = problem.adversary("one")
    adversary.head.requires_grad_(False)
    problem.fit({"one": adversary}, head_steps=3)  # nothing to step
    Problem().fit({}, head_steps=3)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_they_run_in_mixed_precision(amp: str) -> None:
    trainer = one_step(5, amp=amp)
    assert all(p.isfinite().all() for p in trainer.adversaries["image"].head.parameters())
    (recent,) = trainer.update.recent_state()["recent"]
    assert recent["parts"][0][0].dtype == getattr(torch, amp)


def run(update: str, batch: int, accumulate: int) -> dict[str, Any]:
    """Weights after an epoch of a linear problem with missing targets and further head steps."""
    problem = Problem()
    problem.many[:7, 1] = IGNORE_INDEX
    adversaries = {name: problem.adversary(name) for name in ("one", "many")}
    problem.fit(adversaries, batch=batch, update=update, accumulate=accumulate, head_steps=3)
    heads = {name: head.state_dict() for name, head in problem.heads.items()}
    return {**problem.weights(), **heads}


@pytest.mark.parametrize("update", ["joint", "two_step"])
def test_accumulated_batches_are_one_large_batch(update: str) -> None:
    torch.testing.assert_close(run(update, 4, 2), run(update, 8, 1), rtol=1e-12, atol=1e-12)


@needs_gloo
@pytest.mark.parametrize("update", ["joint", "two_step"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_train_as_one(update: str, accumulate: int) -> None:
    whole = run(update, 8, 1)
    for found in in_processes(run, update, 8 // accumulate, accumulate):
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


def test_a_head_keeps_up_with_features_that_change() -> None:
    """The reason for them: at a small learning rate the head's loss is lower at every step."""
    losses = []
    for head_steps in (0, 4):
        problem = Problem()
        problem.one = (problem.images[:, 0] > 0).long()
        record = problem.fit({"one": problem.adversary("one")}, epochs=20, head_steps=head_steps)
        losses.append(record["one_cross_entropy"])
    assert losses[1] < losses[0]
