"""torch.compile and torch.export: one graph, for every value of the coefficients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from lnl_ext import fused_bias_loss, reference


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


def example(dtype=torch.float32):
    return torch.randn(6, 4, 3, dtype=dtype), torch.randint(4, (6, 3))


def gradient_and_value(loss, z, *arguments):
    leaf = z.detach().requires_grad_()
    value = loss(leaf, *arguments)
    value.sum().backward()
    return leaf.grad, value.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tensor_coefficients_never_recompile(dtype):
    z, target = example(dtype)
    weight = torch.rand(4)

    def loss(z, target, reversal, entropy_weight):
        return fused_bias_loss(
            z, target, weight, reversal=reversal, entropy_weight=entropy_weight, ignore_index=2
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for step, value in enumerate((0.0, 0.1, 0.5, 1.0)):
        coefficients = (torch.tensor(value), torch.tensor(value / 2))
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            actual = gradient_and_value(compiled, z, target, *coefficients)
        torch.testing.assert_close(actual, gradient_and_value(loss, z, target, *coefficients))


def test_numbers_that_change_every_step_compile_once_more_and_no_further():
    z, target = example()

    def loss(z, target, reversal):
        return fused_bias_loss(z, target, reversal=reversal, entropy_weight=0.01)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for step in range(12):
        reversal = 0.05 * (step + 1)
        actual = gradient_and_value(compiled, z, target, reversal)
        torch.testing.assert_close(actual, gradient_and_value(loss, z, target, reversal))
    # The first number is a constant, the second makes numbers an input of the graph.
    assert counters["stats"]["unique_graphs"] <= 2


def test_inductor_and_options():
    z, target = example()

    def loss(z, target, reversal):
        result = fused_bias_loss(
            z * 2.0,
            target,
            reversal=reversal,
            entropy_weight=0.1,
            label_smoothing=0.1,
            mask_entropy=True,
            return_terms=True,
        )
        return result.loss + 0.0 * result.entropy

    compiled = torch.compile(loss, fullgraph=True)
    reversal = torch.tensor(0.3)
    torch.testing.assert_close(
        gradient_and_value(compiled, z, target, reversal),
        gradient_and_value(loss, z, target, reversal),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batches_of_any_size_share_a_graph(reduction):
    def loss(z, target):
        return fused_bias_loss(z, target, entropy_weight=0.1, reversal=0.5, reduction=reduction)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, rows in enumerate((4, 7, 9)):
        z, target = torch.randn(rows, 5), torch.randint(5, (rows,))
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            actual = gradient_and_value(compiled, z, target)
        torch.testing.assert_close(actual, gradient_and_value(loss, z, target))


def test_two_losses_on_one_logits_tensor():
    z, target = example()

    def loss(z, target):
        z = z * 1.5
        first = fused_bias_loss(z, target, entropy_weight=0.1)
        return first + 2.0 * fused_bias_loss(z, target.flip(0), reversal=0.5)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        gradient_and_value(compiled, z, target), gradient_and_value(loss, z, target)
    )


def test_a_bad_argument_is_an_error_there_too():
    z, target = example()
    compiled = torch.compile(fused_bias_loss, backend="aot_eager")
    with pytest.raises(ValueError, match=r"target has shape \(5, 3\), expected \(6, 3\)"):
        compiled(z, target[:5])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, x, target, reversal):
        return fused_bias_loss(self.head(x), target, reversal=reversal, entropy_weight=0.1)


def test_export():
    model = Model()
    x, target, reversal = torch.randn(4, 3), torch.randint(5, (4,)), torch.tensor(0.5)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        model,
        (x, target, reversal),
        dynamic_shapes={"x": {0: rows}, "target": {0: rows}, "reversal": None},
    )
    x, target = torch.randn(9, 3), torch.randint(5, (9,))
    torch.testing.assert_close(
        program.module()(x, target, reversal),
        reference.fused_bias_loss(model.head(x), target, entropy_weight=0.1),
    )
