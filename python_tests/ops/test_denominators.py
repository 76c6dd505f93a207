"""A batch in parts: given denominators make the parts' gradients add up to those of the whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lnl_ext.adversary import loss_gradients
from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.training.denominators import Counter, count_sites

HEADS, CLASSES = 3, 5

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"mask_entropy": True},
    "weighted": {"weight": torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5]).double()},
    "smoothed": {"label_smoothing": 0.1, "mask_entropy": True},
    "confused": {"confusion_weight": 0.7},
    "cross entropy only": {"entropy_weight": 0.0},
    "sum": {"reduction": "sum"},
}


def problem(heads: int, **options: Any) -> tuple[BiasAdversary, Tensor, Tensor]:
    """An adversary, features (8, 4, 3, 3), and targets of which the parts lack different shares."""
    generator = torch.Generator().manual_seed(2)
    torch.manual_seed(3)
    head = nn.Conv2d(4, heads * CLASSES, 1).double()
    coefficients = {"reversal": 0.3, "entropy_weight": 0.2, **options}
    adversary = BiasAdversary(head, heads=heads, **coefficients)
    features = torch.randn(8, 4, 3, 3, generator=generator).double()
    target = torch.randint(CLASSES, (8, heads, 3, 3), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = -100
    target[:2] = -100  # the first part has nothing
    if heads == 3:
        target[2:5, 1] = -100  # and the second nothing for one head
    return adversary, features, target if heads > 1 else target[:, 0]


def gradients(
    adversary: BiasAdversary, features: Tensor, target: Tensor, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradients of features and head."""
    features = features.clone().requires_grad_()
    loss = adversary(features, target, **options)
    return loss.detach(), list(torch.autograd.grad(loss, [features, *adversary.parameters()]))


@pytest.mark.parametrize("path", ["kernel", "plain PyTorch"])
@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("case", CASES)
def test_parts_with_the_denominators_of_the_whole_add_up(
    monkeypatch: pytest.MonkeyPatch, case: str, heads: int, path: str
) -> None:
    if path != "kernel":
        monkeypatch.setattr(loss_gradients.ops, "has_kernel", lambda _: False)
    adversary, features, target = problem(heads, **CASES[case])
    expected, whole = gradients(adversary, features, target)
    given = count_sites(adversary, target, torch.float64)
    if case == "sum":
        given = torch.ones_like(given)
    parts = [slice(0, 2), slice(2, 5), slice(5, 8)]
    results = [
        gradients(adversary, features[part], target[part], denominators=given) for part in parts
    ]
    torch.testing.assert_close(sum(loss for loss, _ in results), expected)
    torch.testing.assert_close(torch.cat([part[0] for _, part in results]), whole[0])
    for number, gradient in enumerate(whole[1:], 1):
        torch.testing.assert_close(sum(part[number] for _, part in results), gradient)


def test_parts_add_up_with_probabilities_and_after_a_second_backward() -> None:
    adversary, features, _ = problem(HEADS)
    target = torch.rand(8, HEADS, CLASSES, 3, 3).double().softmax(2).flatten(1, 2)
    given = count_sites(adversary, target, torch.float64)
    assert given.tolist() == [[72, 72]] * HEADS
    _, expected = gradients(adversary, features, target)
    features = features.requires_grad_()
    loss = adversary(features, target, denominators=given)
    for _ in range(2):
        found = torch.autograd.grad(loss, [features, *adversary.parameters()], retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_counts_are_the_operators_own() -> None:
    for options in CASES.values():
        for heads in (1, HEADS):
            adversary, features, target = problem(heads, **options)
            logits = adversary.head(features).detach()
            *_, denominators, _, _ = torch.ops.lnl_ext.bias_loss(
                logits, target, adversary.weight, *[None] * 4, -100, 0.0, 1,
                adversary.mask_entropy, heads, False, False,
            )  # fmt: skip
            torch.testing.assert_close(count_sites(adversary, target, torch.float64), denominators)


def test_denominators_are_checked() -> None:
    adversary, features, target = problem(HEADS)
    with pytest.raises(ValueError, match=r"denominators has shape \(2,\), expected \(3, 2\)"):
        adversary(features, target, denominators=torch.ones(2))
    with pytest.raises(ValueError, match=r"target has shape \(8, 9\), expected \(N, 3, \.\.\.\)"):
        count_sites(adversary, target[:, 0].flatten(1), torch.float64)
    adversary = copy.deepcopy(adversary)
    adversary.reduction = "none"
    with pytest.raises(ValueError, match='nothing to divide with reduction="none"'):
        adversary(features, target, denominators=torch.ones(3, 2))


def test_a_step_of_one_part_divides_by_its_own_numbers() -> None:
    adversary, features, target = problem(1)
    counter = Counter({"a": adversary})
    batch = (features, torch.zeros(8), {"a": target, "b": target})
    counts = counter.count([batch])
    assert (counts.samples.item(), counts.parts, list(counts.sites)) == (8, 1, ["a"])
    assert counter.denominators(counts) == (None, {})
    counts = counter.count([batch, batch])
    samples, sites = counter.denominators(counts)
    assert samples == 16
    torch.testing.assert_close(sites["a"], 2 * count_sites(adversary, target, torch.float64))
