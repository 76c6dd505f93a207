"""The gradient reversal layer: identity forward, any number of derivatives times -scale."""

from __future__ import annotations

import math

import pytest
import torch
from nested import nested
from torch.utils.checkpoint import checkpoint

from lnl_ext import GradientReversal, grad_reverse
from lnl_ext.schedules import Linear

SCALES = [0.0, 0.5, 2, torch.tensor(0.5), torch.tensor(0.25, dtype=torch.float64)]


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_stays_and_gradient_is_reversed(scale, dtype):
    x = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    y = grad_reverse(x, scale)
    assert torch.equal(y, x)
    assert y.dtype == dtype
    upstream = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(gradient, upstream * -float(scale))


def test_a_scalar_keeps_its_dtype():
    x = torch.tensor(2.0, requires_grad=True)
    grad_reverse(x, torch.tensor(0.5, dtype=torch.float64)).backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5, dtype=torch.float64)], ids=str)
def test_second_derivatives_are_those_of_a_multiple_of_the_loss(scale):
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    # y^3 of y = grad_reverse(x): first derivative -s 3x^2, which is differentiated through the
    # layer again: s^2 6x.
    (first,) = torch.autograd.grad((grad_reverse(x, scale) ** 3).sum(), x, create_graph=True)
    torch.testing.assert_close(first, -0.5 * 3 * x**2)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 0.25 * 6 * x)
    # after the nonlinearity it is a factor of the whole: s enters once
    (first,) = torch.autograd.grad(grad_reverse((x**3).sum(), scale), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, -0.5 * 6 * x)


def test_functional_transforms():
    x = torch.randn(4)
    gradient = torch.func.grad(lambda x: (grad_reverse(x, 0.5) ** 2).sum())(x)
    torch.testing.assert_close(gradient, -x)
    rows = torch.randn(3, 4)
    per_row = torch.func.vmap(torch.func.grad(lambda x: (grad_reverse(x, 0.5) ** 2).sum()))(rows)
    torch.testing.assert_close(per_row, -rows)


def test_forward_mode_is_a_clear_error():
    x = torch.randn(4)
    with pytest.raises(RuntimeError, match=r"forward AD|jvp"):
        torch.func.jvp(lambda x: grad_reverse(x, 0.5), (x,), (torch.ones(4),))


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (-1.0, ValueError, "scale is -1.0, expected a finite number >= 0"),
        (math.nan, ValueError, "scale is nan"),
        (math.inf, ValueError, "scale is inf"),
        (torch.ones(2), ValueError, r"scale has shape \(2,\), expected a 0-dim"),
        (None, TypeError, "scale is None, expected a number"),
    ],
    ids=str,
)
def test_bad_scales_are_refused(scale, error, message):
    with pytest.raises(error, match=message):
        grad_reverse(torch.ones(2), scale)
    with pytest.raises(error, match=message):
        GradientReversal(scale)


def test_what_has_no_gradient_is_refused():
    with pytest.raises(
        TypeError, match=r"x has dtype torch.int64, which has no gradient to reverse"
    ):
        grad_reverse(torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="x: expected a Tensor, got float"):
        grad_reverse(1.0)


def test_the_module_takes_schedules_and_a_later_progress_changes_no_earlier_forward():
    layer = GradientReversal(Linear(1.0))
    layer.set_progress(0.25)
    x = torch.randn(3, requires_grad=True)
    y = layer(x)
    layer.set_progress(1.0)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), -0.25))
    other = GradientReversal(Linear(1.0))
    other.load_state_dict(layer.state_dict())
    assert other.scale == 1.0


def test_one_graph_for_every_scale_of_the_module():
    torch._dynamo.reset()
    layer = GradientReversal("linear")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in (0.0, 0.2, 0.7, 1.0):
            layer.set_progress(t)
            x = torch.randn(3, requires_grad=True)
            compiled(x).sum().backward()
            torch.testing.assert_close(x.grad, torch.full((3,), -t))


@pytest.mark.xfail(
    torch.__version__.startswith("2.11."),
    reason="torch 2.11 compiles an autograd Function again for every number",
    strict=True,
)
def test_the_function_compiles_with_numbers_that_change():
    torch._dynamo.reset()
    compiled = torch.compile(grad_reverse, fullgraph=True, backend="aot_eager")
    counters = torch._dynamo.utils.counters
    counters.clear()
    for scale in (0.1, 0.2, 0.3, 0.4, 0.5):
        x = torch.randn(3, requires_grad=True)
        compiled(x, scale).sum().backward()
        torch.testing.assert_close(x.grad, torch.full((3,), -scale))
    assert counters["stats"]["unique_graphs"] <= 2  # the first value, then any


def test_a_checkpoint_around_the_layer():
    layer = GradientReversal(0.3)
    x = torch.randn(4, requires_grad=True)
    checkpoint(lambda x: layer(x).sin(), x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, -0.3 * x.detach().cos())


@pytest.mark.parametrize(
    "layer",
    [torch.nn.ReLU(inplace=True), torch.nn.Dropout(0.5, inplace=True), torch.nn.SiLU(inplace=True)],
    ids=str,
)
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_a_layer_in_place_may_follow_and_does_not_reach_the_others(layer, needs_gradient):
    features = torch.randn(4, 3)
    x = features.clone().requires_grad_(needs_gradient)
    head = torch.nn.Sequential(GradientReversal(0.5), layer)
    torch.manual_seed(0)
    result = head(x)
    assert torch.equal(x, features)
    torch.manual_seed(0)
    plain = features.clone().requires_grad_()
    expected = layer(plain.clone())
    assert torch.equal(result, expected)
    if needs_gradient:
        result.sum().backward()
        expected.sum().backward()
        assert torch.equal(x.grad, -0.5 * plain.grad)


def test_nested_tensors():
    rows = torch.randn(4, 3)
    x = nested(rows, torch.jagged).requires_grad_()
    grad_reverse(x, 0.5).values().sum().backward()
    assert torch.equal(x.grad.values(), torch.full((4, 3), -0.5))
    with pytest.raises(TypeError, match=r"x is a nested tensor of layout torch.strided, expected"):
        grad_reverse(nested(rows, torch.strided))
