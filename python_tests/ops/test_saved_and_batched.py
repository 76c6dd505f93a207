"""What surrounds a backward: several factors at once, hooks on saved tensors, and jit's tracer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from lnl_ext import fused_bias_loss, fused_linear_bias_loss

TARGET = torch.tensor([0, 4, 2, 1, 3, 3])


def logits_loss(logits: Tensor) -> Tensor:
    return fused_bias_loss(logits, TARGET, entropy_weight=0.1, reversal=0.3)


def linear_loss(features: Tensor, weight: Tensor) -> Tensor:
    return fused_linear_bias_loss(features, weight, TARGET, entropy_weight=0.1, reversal=0.3)


Loss = Callable[..., Tensor]


def inputs_of(loss: Loss, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = [(6, 5)] if loss is logits_loss else [(6, 3), (5, 3)]
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


@pytest.fixture(params=[logits_loss, linear_loss])
def loss(request: pytest.FixtureRequest) -> Loss:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_several_factors_at_once(loss: Loss, dtype: torch.dtype):
    inputs = inputs_of(loss, dtype)
    factors = torch.tensor([1.0, -2.0, 0.0], dtype=dtype)
    batched = torch.autograd.grad(loss(*inputs), inputs, factors, is_grads_batched=True)
    once = torch.autograd.grad(loss(*inputs), inputs)
    for together, single in zip(batched, once, strict=True):
        expected = factors.reshape(-1, *[1] * single.dim()) * single
        torch.testing.assert_close(together, expected)


def test_vectorised_jacobian(loss: Loss):
    inputs = inputs_of(loss, torch.float64)
    for found, expected in zip(
        jacobian(loss, inputs, vectorize=True),
        torch.autograd.grad(loss(*inputs), inputs),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_what_a_hook_holds_is_not_written_to(loss: Loss):
    inputs = inputs_of(loss, torch.float32)
    held: list[tuple[Tensor, Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append((tensor, tensor.clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(*inputs)
    (3.0 * value).backward()
    assert held
    for tensor, before in held:
        assert torch.equal(tensor, before)
    expected = torch.autograd.grad(3.0 * loss(*inputs), inputs)
    torch.testing.assert_close([t.grad for t in inputs], list(expected))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_traced_loss_is_differentiable(loss: Loss):
    inputs = inputs_of(loss, torch.float32)
    traced = torch.jit.trace(loss, inputs)
    others = tuple((2.0 * t).detach().requires_grad_() for t in inputs)
    torch.testing.assert_close(traced(*others), loss(*others))
    found = torch.autograd.grad(traced(*others), others)
    torch.testing.assert_close(found, torch.autograd.grad(loss(*others), others))
