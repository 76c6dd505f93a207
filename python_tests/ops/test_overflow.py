"""Values beyond float32's range are infinite, as in torch.nn.functional.cross_entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import lnl_ext

LARGEST = 3e38
"""Just below the largest float32, 3.4e38."""
FACTOR = 1e39


@pytest.mark.parametrize(
    ("rows", "classes", "space"),
    [(8, 4, ()), (8, 65, ()), (8, 2000, ()), (8, 4, (5,)), (3000, 4, ()), (3000, 12, (4,))],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("top", [LARGEST / 2, LARGEST])
@pytest.mark.parametrize("module", [lnl_ext, lnl_ext.reference], ids=["kernel", "plain"])
def test_sums(module, top: float, reduction: str, rows: int, classes: int, space):
    """Of the sites of one block, of those of many, and the difference of two logits."""
    logits = torch.zeros(rows, classes, *space)
    logits[:, 0], logits[:, 1] = top, -top
    if rows > 100:  # no few of them are too large together
        logits /= 1000
    logits.requires_grad_()
    target = torch.ones(rows, *space, dtype=torch.int64)
    loss = module.fused_bias_loss(logits, target, reduction=reduction)
    wanted = F.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(loss, wanted)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted.sum(), logits)[0])


@pytest.mark.parametrize("classes", [4, 65])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("module", [lnl_ext, lnl_ext.reference], ids=["kernel", "plain"])
def test_coefficients(module, as_tensor: bool, reduction: str, classes: int):
    torch.manual_seed(0)
    factor = torch.tensor(FACTOR, dtype=torch.float64) if as_tensor else FACTOR
    logits = torch.randn(6, classes, requires_grad=True)
    target = torch.randint(classes, (6,))
    loss = module.fused_bias_loss(logits, target, entropy_weight=factor, reduction=reduction)
    assert (loss == -math.inf).all()
    loss = module.fused_bias_loss(logits, target, reversal=factor, reduction=reduction)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, reduction=reduction))
    assert not torch.autograd.grad(loss.sum(), logits)[0].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [4, 65])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_coefficients_of_a_linear_head(reduction: str, classes: int, dtype: torch.dtype):
    torch.manual_seed(0)
    features = torch.randn(6, 8).to(dtype).requires_grad_()
    # Small, so that no entropy is: a site's product with FACTOR is beyond float32.
    weight = (torch.randn(classes, 8) / 8).to(dtype).requires_grad_()
    target = torch.randint(classes, (6,))
    options = {"reduction": reduction}
    loss = lnl_ext.fused_linear_bias_loss
    value = loss(features, weight, target, entropy_weight=FACTOR, **options)
    assert (value == -math.inf).all()
    reversed_ = loss(features, weight, target, reversal=FACTOR, **options).sum()
    plain = loss(features, weight, target, **options).sum()
    for_features, for_weight = torch.autograd.grad(reversed_, (features, weight))
    assert not for_features.isfinite().any()
    torch.testing.assert_close(for_weight, torch.autograd.grad(plain, weight)[0])


@pytest.mark.parametrize(
    "head",
    [nn.Linear(8, 4), nn.Linear(8, 65), nn.Sequential(nn.ReLU(), nn.Linear(8, 4), nn.Identity())],
    ids=str,
)
def test_adversary(head: nn.Module):
    features, target = torch.randn(6, 8, requires_grad=True), torch.randint(4, (6,))
    for options, wanted in (
        ({"entropy_weight": FACTOR}, -math.inf),
        ({"confusion_weight": FACTOR}, math.inf),
    ):
        assert lnl_ext.BiasAdversary(head, **options)(features, target) == wanted
    loss = lnl_ext.BiasAdversary(head, reversal=FACTOR, entropy_weight=0.0)(features, target)
    loss.backward()
    assert loss.isfinite()
    assert not features.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_infinite_cross_entropy_with_given_denominators():
    head = nn.Sequential(nn.Linear(2, 3), nn.Identity())
    with torch.no_grad():
        head[0].bias[1] = -math.inf
    adversary = lnl_ext.BiasAdversary(head)
    given = torch.tensor([[2.0, 2.0]])
    loss = adversary(torch.randn(2, 2), torch.tensor([1, 0]), denominators=given)
    assert loss == math.inf
