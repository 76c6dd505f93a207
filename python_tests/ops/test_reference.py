"""The oracle is PyTorch's cross_entropy and the textbook entropy, in float64 and stable."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from lnl_ext.ops.formula import bias_terms
from lnl_ext.ops.loss_arguments import LossArguments
from lnl_ext.reference import fused_bias_loss

REDUCE = {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}
OPTIONS = list(
    itertools.product(
        [(), (3,), (2, 3)], [1, 3], ["index", "probabilities"], [False, True], [0.0, 0.2], REDUCE
    )
)


def textbook_entropy(logits: torch.Tensor) -> torch.Tensor:
    log_p = F.log_softmax(logits, 1)
    return -(log_p.exp() * log_p).sum(1)


@pytest.mark.parametrize(
    ("space", "heads", "kind", "weighted", "label_smoothing", "reduction"), OPTIONS
)
def test_terms_and_gradients_are_those_of_pytorch(
    space, heads, kind, weighted, label_smoothing, reduction
):
    classes = 5
    z = torch.randn(4, heads * classes, *space, dtype=torch.float64, requires_grad=True)
    if kind == "index":
        target = torch.randint(classes, (4, heads, *space))
        per_head = target.unbind(1)
        target = target if heads > 1 else target.squeeze(1)
        ignore_index = 2
    else:
        target = torch.rand_like(z).detach()
        per_head = target.chunk(heads, 1)
        ignore_index = -100
    weight = torch.rand(classes, dtype=torch.float64) if weighted else None
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss, cross_entropy, entropy = fused_bias_loss(
        z,
        target,
        weight,
        **options,
        reduction=reduction,
        heads=heads,
        entropy_weight=0.3,
        return_terms=True,
    )
    expected_ce = sum(
        F.cross_entropy(part, each, weight, **options, reduction=reduction)
        for part, each in zip(z.chunk(heads, 1), per_head, strict=True)
    )
    expected_entropy = sum(REDUCE[reduction](textbook_entropy(part)) for part in z.chunk(heads, 1))
    torch.testing.assert_close(cross_entropy, expected_ce.detach())
    torch.testing.assert_close(entropy, expected_entropy.detach())
    upstream = torch.rand_like(loss)
    actual = torch.autograd.grad(loss, z, upstream)
    expected = torch.autograd.grad(expected_ce - 0.3 * expected_entropy, z, upstream)
    torch.testing.assert_close(actual, expected)


def test_confusion_is_the_cross_entropy_of_the_uniform_distribution():
    z = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(4, (6, 3))
    weight = torch.rand(4, dtype=torch.float64)
    arguments = LossArguments(target, weight, confusion_weight=torch.ones(()), label_smoothing=0.1)
    terms = bias_terms(z, arguments)
    uniform = F.cross_entropy(z, torch.full_like(z, 0.25))
    torch.testing.assert_close(terms.confusion, uniform)
    torch.testing.assert_close(
        torch.autograd.grad(terms.confusion, z), torch.autograd.grad(uniform, z)
    )


def test_mask_entropy_averages_over_the_sites_that_are_not_ignored():
    z = torch.randn(8, 4, dtype=torch.float64)
    target = torch.tensor([0, 1, -100, 2, -100, 3, 0, -100])
    keep = target != -100
    masked = fused_bias_loss(z, target, mask_entropy=True, return_terms=True).entropy
    everywhere = fused_bias_loss(z, target, return_terms=True).entropy
    torch.testing.assert_close(masked, textbook_entropy(z[keep]).mean())
    torch.testing.assert_close(everywhere, textbook_entropy(z).mean())


def test_each_head_is_reduced_on_its_own():
    z = torch.randn(4, 10, dtype=torch.float64)
    target = torch.tensor([[0, -100], [1, -100], [2, -100], [3, 4]])
    together = fused_bias_loss(z, target, heads=2)
    apart = fused_bias_loss(z[:, :5], target[:, 0]) + fused_bias_loss(z[:, 5:], target[:, 1])
    torch.testing.assert_close(together, apart)


def test_reversal_changes_the_sign_of_the_cross_entropy_only():
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randint(4, (6,))
    loss = fused_bias_loss(z, target, entropy_weight=0.3, reversal=0.7)
    assert torch.equal(loss, fused_bias_loss(z, target, entropy_weight=0.3))
    surrogate = -0.7 * F.cross_entropy(z, target) - 0.3 * textbook_entropy(z).mean()
    (first,) = torch.autograd.grad(loss, z, create_graph=True)
    (expected,) = torch.autograd.grad(surrogate, z, create_graph=True)
    torch.testing.assert_close(first, expected)
    direction = torch.randn_like(z)
    torch.testing.assert_close(
        torch.autograd.grad(first, z, direction), torch.autograd.grad(expected, z, direction)
    )


@pytest.mark.parametrize("certain", [20.0, 40.0, 300.0])
def test_a_certain_row_keeps_its_relative_accuracy(certain):
    # Closed forms of z = [certain, 0, 0, 0], to first order in q = exp(-certain), which is exact
    # to q itself; for the target 0, CE and dCE are 3q and -3q, q, q, q.
    q = torch.tensor(-certain, dtype=torch.float64).exp()
    z = torch.tensor([[certain, 0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    terms = fused_bias_loss(z, torch.tensor([0]), return_terms=True)
    near = {"rtol": 10 * max(q.item(), 1e-15), "atol": 0.0}
    torch.testing.assert_close(terms.cross_entropy, 3 * q, **near)
    torch.testing.assert_close(terms.entropy, 3 * q * (1 + certain), **near)
    (gradient,) = torch.autograd.grad(terms.loss, z)
    torch.testing.assert_close(gradient, q * torch.tensor([[-3.0, 1.0, 1.0, 1.0]]).double(), **near)


@pytest.mark.parametrize("reversal", [None, 0.7])
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_derivatives_hold_numerically(kind, reversal):
    z = torch.randn(3, 6, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randint(3, (3, 2, 2)) if kind == "index" else torch.rand_like(z).detach()

    def loss(z: torch.Tensor) -> torch.Tensor:
        return fused_bias_loss(
            z, target, entropy_weight=0.3, reversal=reversal, label_smoothing=0.1, heads=2
        )

    if reversal is None:
        assert torch.autograd.gradcheck(loss, z, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, z, fast_mode=True)


def test_half_logits_are_computed_in_float32():
    z = torch.randn(5, 7, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(7, (5,))
    loss = fused_bias_loss(z, target, entropy_weight=0.5)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, fused_bias_loss(z.float(), target, entropy_weight=0.5))
    loss.backward()
    assert z.grad is not None
    assert z.grad.dtype == torch.bfloat16
