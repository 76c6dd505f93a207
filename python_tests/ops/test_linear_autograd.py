"""fused_linear_bias_loss under autograd, torch.func, autocast, torch.compile and torch.export."""

from __future__ import annotations

import itertools

import pytest
import torch
from bias_loss_cases import Case
from linear_cases import LinearCase, make_linear_inputs
from torch import nn

from lnl_ext import fused_linear_bias_loss, reference

OPTIONS = [
    {},
    {"heads": 2, "mask_entropy": True, "ignored": 0.3},
    {"weighted": True, "ignored": 0.3, "label_smoothing": 0.2},
    {"target": "probabilities", "weighted": True},
]


def loss_of(inputs, function=fused_linear_bias_loss):
    def loss(x, w, b=None):
        return function(x, w, inputs.target, b, inputs.weight, **inputs.options)

    return loss


def float64_case(options: dict, reduction: str, reversal: float | None, biased: bool) -> LinearCase:
    loss = Case(
        **{
            "rows": 4,
            "classes": 3,
            "dtype": torch.float64,
            "reduction": reduction,
            "entropy_weight": 0.4,
            "reversal": reversal,
            **options,
        }
    )
    return LinearCase(loss, width=5, biased=biased)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_first_and_second_derivatives(options, reduction, biased):
    inputs = make_linear_inputs(float64_case(options, reduction, None, biased))
    leaves = tuple(t.requires_grad_() for t in inputs.differentiable)
    assert torch.autograd.gradcheck(loss_of(inputs), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss_of(inputs), leaves, fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_second_derivatives_of_the_split_gradient(options, reduction):
    # Features and head each see the other as a constant, so each is checked with the other fixed.
    inputs = make_linear_inputs(float64_case(options, reduction, 0.3, True))
    x, w, b = inputs.differentiable
    loss = loss_of(inputs)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: loss(x, w, b), (leaf,), fast_mode=True)
    head = (w.clone().requires_grad_(), b.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(lambda w, b: loss(x, w, b), head, fast_mode=True)


@pytest.mark.parametrize("reversal", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_penalty_matches_the_reference(dtype, reduction, reversal):
    case = Case(
        9, 4, dtype=dtype, reduction=reduction, reversal=reversal, entropy_weight=0.5, scale=1.0
    )
    inputs = make_linear_inputs(LinearCase(case, width=6))
    results = []
    for function in (fused_linear_bias_loss, reference.fused_linear_bias_loss):
        wanted = torch.float64 if function is reference.fused_linear_bias_loss else dtype
        leaves = [t.to(wanted).clone().requires_grad_() for t in inputs.differentiable]
        value = loss_of(inputs, function)(*leaves).sum()
        first = torch.autograd.grad(value, leaves, create_graph=True)
        penalty = sum(g.double().square().sum() for g in first)
        second = torch.autograd.grad(value.double() + penalty, leaves)
        results.append([g.double() for g in second])
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= bound[dtype] * expected.norm()


@pytest.mark.parametrize(
    "needing", [c for n in (1, 2, 3) for c in itertools.combinations(range(3), n)], ids=str
)
@pytest.mark.parametrize("reversal", [None, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("classes", [4, 70])
def test_only_what_is_asked_for(needing, reversal, reduction, classes):
    case = Case(
        9, classes, dtype=torch.float64, reversal=reversal, entropy_weight=0.2, reduction=reduction
    )
    inputs = make_linear_inputs(LinearCase(case))
    results = []
    for function in (fused_linear_bias_loss, reference.fused_linear_bias_loss):
        tensors = [
            t.clone().requires_grad_(i in needing) for i, t in enumerate(inputs.differentiable)
        ]
        loss_of(inputs, function)(*tensors).sum().backward()
        results.append([t.grad for t in tensors])
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert (actual is not None) == (i in needing)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-13)


def test_no_gradient_is_made_where_none_is_needed():
    x, w, target = torch.randn(6, 3), torch.randn(4, 3), torch.randint(4, (6,))
    assert not fused_linear_bias_loss(x, w, target).requires_grad
    with torch.no_grad():
        assert not fused_linear_bias_loss(x.requires_grad_(), w, target).requires_grad


@pytest.mark.parametrize("classes", [4, 70])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_retain_graph_gives_the_same_gradients_again(dtype, reduction, classes):
    case = Case(9, classes, dtype=dtype, reduction=reduction, reversal=0.5, entropy_weight=0.2)
    inputs = make_linear_inputs(LinearCase(case))
    leaves = [t.requires_grad_() for t in inputs.differentiable]
    loss = loss_of(inputs)(*leaves)
    upstream = torch.full_like(loss, 3.0)
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, upstream, retain_graph=True)]
    again = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    last = torch.autograd.grad(loss, leaves, upstream)
    torch.testing.assert_close(list(again), first)
    torch.testing.assert_close(list(last), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves, upstream)


def test_functional_gradient():
    inputs = make_linear_inputs(LinearCase(Case(6, 4, entropy_weight=0.3, reversal=0.5)))
    leaves = [t.clone().requires_grad_() for t in inputs.differentiable]
    expected = torch.autograd.grad(
        loss_of(inputs, reference.fused_linear_bias_loss)(*leaves), leaves
    )
    actual = torch.func.grad(loss_of(inputs), argnums=(0, 1, 2))(*inputs.differentiable)
    torch.testing.assert_close(actual, expected)


def test_functional_second_derivative():
    inputs = make_linear_inputs(LinearCase(Case(5, 3, dtype=torch.float64, entropy_weight=0.3)))

    def penalty(loss):
        return lambda *leaves: sum(
            g.square().sum() for g in torch.func.grad(loss, argnums=(0, 1, 2))(*leaves)
        )

    for argument in range(3):
        actual, expected = (
            torch.func.grad(penalty(loss_of(inputs, f)), argnums=argument)(*inputs.differentiable)
            for f in (fused_linear_bias_loss, reference.fused_linear_bias_loss)
        )
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "transform",
    [
        lambda loss, x: torch.func.jvp(loss, (x,), (torch.ones_like(x),)),
        lambda loss, x: torch.func.vmap(loss)(x.expand(2, *x.shape)),
    ],
    ids=["jvp", "vmap"],
)
def test_forward_mode_and_vmap_say_that_they_are_missing(transform):
    w, target = torch.randn(4, 3), torch.randint(4, (5,))
    with pytest.raises((RuntimeError, NotImplementedError), match=r"vmap|jvp"):
        transform(lambda x: fused_linear_bias_loss(x, w, target), torch.randn(5, 3))


def test_autocast_casts_as_a_linear_layer_does():
    x = torch.randn(64, 24, requires_grad=True)
    head = nn.Linear(24, 5)
    target = torch.randint(5, (64,))
    leaves = [x, *head.parameters()]

    def loss(x, w, b):
        return fused_linear_bias_loss(
            x, w, target, b, torch.ones(5), entropy_weight=0.1, reversal=0.5
        )

    with torch.autocast("cpu", torch.bfloat16):
        value = loss(x, head.weight, head.bias)
    assert value.dtype == torch.float32
    actual = torch.autograd.grad(value, leaves)
    assert all(g.dtype == torch.float32 for g in actual)
    # the same from inputs that are cast by hand: nothing else is
    cast = [t.detach().bfloat16().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(loss(*cast), cast)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e.float())
    with torch.autocast("cpu", torch.bfloat16):
        doubles = [t.detach().double() for t in leaves]
        assert fused_linear_bias_loss(doubles[0], doubles[1], target).dtype == torch.float64


def test_products_inside_are_not_autocast():
    x, w, target = torch.randn(40, 24), torch.randn(100, 24), torch.randint(100, (40,))
    expected = torch.ops.lnl_ext.linear_bias_loss(
        x, w, None, target, *[None] * 5, -100, 0.0, 1, False, 1, True, True
    )
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.ops.lnl_ext.linear_bias_loss(
            x, w, None, target, *[None] * 5, -100, 0.0, 1, False, 1, True, True
        )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_float16_survives_the_mean_of_many_rows_and_a_loss_scaler():
    x = torch.randn(4096, 32, dtype=torch.float16)
    w = torch.randn(64, 32, dtype=torch.float16) / 8
    target = torch.randint(64, (4096,))
    gradients = []
    for dtype in (torch.float16, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        loss = fused_linear_bias_loss(*leaves, target, reversal=0.3, entropy_weight=0.1)
        gradients.append(torch.autograd.grad(loss * 2.0**16, leaves))
    for actual, expected in zip(*gradients, strict=True):
        assert (actual.double() - expected).norm() <= 2.0**-11 * expected.norm()


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compile_is_one_graph_for_every_value(fresh_dynamo, backend, dtype):
    def loss(x, w, b, target, reversal, entropy_weight):
        return fused_linear_bias_loss(
            torch.relu(x), w, target, b, reversal=reversal, entropy_weight=entropy_weight
        )

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    x, head = torch.randn(6, 4, dtype=dtype, requires_grad=True), nn.Linear(4, 3).to(dtype)
    target = torch.randint(3, (6,))
    for step, value in enumerate((0.0, 0.5, 1.0)):
        coefficients = (torch.tensor(value), torch.tensor(value / 2))
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            results = []
            for function in (loss, compiled):
                result = function(x, head.weight, head.bias, target, *coefficients)
                leaves = [x, *head.parameters()]
                results.append([result.detach(), *torch.autograd.grad(result, leaves)])
        torch.testing.assert_close(results[1], results[0])


def test_compile_with_autocast_and_batches_of_any_size(fresh_dynamo):
    def loss(x, w, target):
        with torch.autocast("cpu", torch.bfloat16):
            return fused_linear_bias_loss(x, w, target, reversal=0.5, entropy_weight=0.1)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    w = torch.randn(5, 3, requires_grad=True)
    for step, rows in enumerate((4, 7, 9)):
        x, target = torch.randn(rows, 3), torch.randint(5, (rows,))
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            actual = torch.autograd.grad(compiled(x, w, target), w)
        torch.testing.assert_close(actual, torch.autograd.grad(loss(x, w, target), w))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, x, target, reversal):
        return fused_linear_bias_loss(
            x, self.head.weight, target, self.head.bias, reversal=reversal, entropy_weight=0.1
        )


def test_export(fresh_dynamo):
    model = Model()
    arguments = torch.randn(4, 3), torch.randint(5, (4,)), torch.tensor(0.5)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        model, arguments, dynamic_shapes={"x": {0: rows}, "target": {0: rows}, "reversal": None}
    )
    x, target, reversal = torch.randn(9, 3), torch.randint(5, (9,)), torch.tensor(0.5)
    torch.testing.assert_close(program.module()(x, target, reversal), model(x, target, reversal))
