"""Batches in which a head has no target: it is not updated, and its metrics leave them out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from linear_run import BATCH, BINS, HEADS, SAMPLES, Problem
from tiny_run import differences
from torch.nn import functional as F  # noqa: N812

from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.schedules import Linear


@pytest.mark.parametrize("update", ["joint", "two_step"])
@pytest.mark.parametrize("strength", [1.0, Linear(begin=0.5)])
def test_a_head_without_any_target_is_as_if_it_were_not_there(
    update: str, strength: float | Linear
) -> None:
    results = []
    for with_head in (True, False):
        problem = Problem()
        problem.one.fill_(IGNORE_INDEX)
        before = {k: v.clone() for k, v in problem.heads["one"].state_dict().items()}
        adversaries = {"many": problem.adversary("many")}
        if with_head:  # else its entropy, which needs no target, still counts
            adversaries["one"] = problem.adversary("one", mask_entropy=True)
        problem.images = problem.images[: 2 * BATCH]
        problem.labels, problem.one = problem.labels[: 2 * BATCH], problem.one[: 2 * BATCH]
        problem.many = problem.many[: 2 * BATCH]
        record = problem.fit(adversaries, update=update, strength=strength)
        if with_head:
            assert math.isnan(record["one_cross_entropy"])
            assert math.isnan(record["one_entropy"])
            assert differences(before, problem.heads["one"].state_dict()) == []
        assert math.isfinite(record["many_cross_entropy"])
        results.append(problem.weights())
    assert differences(*results) == []


@pytest.mark.parametrize("update", ["joint", "two_step"])
def test_a_head_beside_others_that_has_no_target_leaves_them_alone(update: str) -> None:
    """One of three heads side by side: its rows of the weight stay, the others learn as before."""
    results = []
    for missing in (True, False):
        problem = Problem()
        if missing:
            problem.many[:, 1] = IGNORE_INDEX
        before = problem.heads["many"].weight.detach().clone()
        adversary = problem.adversary("many", reversal=0.0, entropy_weight=0.0)
        record = problem.fit({"many": adversary}, update=update)
        moved = (problem.heads["many"].weight - before).view(HEADS, BINS, 4)
        results.append([moved[0], moved[2]])
        assert (moved[1] == 0).all() == missing
        assert math.isnan(record["many_cross_entropy"]) == missing
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("update", ["joint", "two_step"])
@pytest.mark.parametrize("batch", [BATCH, SAMPLES])
@pytest.mark.parametrize("mask_entropy", [False, True])
@pytest.mark.parametrize("weight", [None, [0.5, 1.0, 2.0, 0.25, 4.0], [0.5, 1.0, 2.0, 0.0, 4.0]])
def test_the_figures_of_an_epoch_are_those_of_its_sites(
    weight: list[float] | None, mask_entropy: bool, batch: int, update: str
) -> None:
    """Whatever the batches are: of 20 samples at once, or of 4, one of them without a target."""
    problem = Problem()
    classes = None if weight is None else torch.tensor(weight).double()
    hidden = problem.features(problem.images)
    logits = problem.heads["one"](hidden)
    expected = F.cross_entropy(logits, problem.one, classes)
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
    if mask_entropy:
        entropy = entropy[problem.one != IGNORE_INDEX]
    label_loss = F.cross_entropy(problem.classifier(hidden), problem.labels)
    adversary = problem.adversary("one", weight=classes, mask_entropy=mask_entropy)
    # The weights hardly move, so that the figures of all batches are those of the same networks.
    record = problem.fit({"one": adversary}, rate=1e-12, batch=batch, update=update)
    assert record["one_cross_entropy"] == pytest.approx(expected.item(), rel=1e-9)
    assert record["one_entropy"] == pytest.approx(entropy.mean().item(), rel=1e-9)
    assert record["label_loss"] == pytest.approx(label_loss.item(), rel=1e-9)


@pytest.mark.parametrize("update", ["joint", "two_step"])
def test_a_batch_of_a_class_of_weight_zero_is_no_step_either(update: str) -> None:
    """Its gradient would be 0 / 0, which is NaN in PyTorch too."""
    problem = Problem()
    problem.one.fill_(3)
    before = {k: v.clone() for k, v in problem.heads["one"].state_dict().items()}
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0, 4.0]).double()
    record = problem.fit({"one": problem.adversary("one", weight=weight)}, update=update)
    assert math.isnan(record["one_cross_entropy"])
    assert math.isfinite(record["one_entropy"])
    assert differences(before, problem.heads["one"].state_dict()) == []
    assert all(p.isfinite().all() for p in problem.features.parameters())


def test_an_epoch_without_any_target_is_null_in_the_metrics_file(tmp_path: Path) -> None:
    problem = Problem()
    problem.one.fill_(IGNORE_INDEX)
    problem.fit({"one": problem.adversary("one")}, output=tmp_path)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["one_cross_entropy"] is None
    assert record["one_entropy"] > 0


def test_no_adversary_can_take_the_name_of_the_tasks_figures() -> None:
    problem = Problem()
    with pytest.raises(ValueError, match="an adversary is called 'label', as the task is"):
        problem.fit({"label": problem.adversary("one")})
