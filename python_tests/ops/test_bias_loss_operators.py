"""The operators keep PyTorch's contracts: schema, fake kernels, autograd registration, AOT."""

from __future__ import annotations

import pytest
import torch
from backends import REDUCTIONS, scalar
from bias_loss_cases import Case, make_inputs

CASES = [
    Case(rows=6, classes=4, reversal=0.5, entropy_weight=0.1),
    Case(rows=6, classes=4, space=(3,), reduction="none", weighted=True, ignored=0.3),
    Case(rows=2, classes=4, space=(3, 2), layout="channels_last", reversal=0.5),
    Case(rows=2, classes=4, heads=2, space=(3,), confusion_weight=0.5, mask_entropy=True),
    Case(rows=4, classes=5, target="probabilities", label_smoothing=0.1, reduction="sum"),
    Case(rows=4, classes=5, dtype=torch.float16, entropy_weight=0.1),
    Case(rows=4, classes=5, dtype=torch.float64, layout="transposed"),
]


def arguments(case: Case, device: torch.device, requires_grad: bool):
    inputs = make_inputs(case).to(device)
    logits = inputs.logits.requires_grad_(requires_grad)
    coefficients = [
        scalar(c, device) for c in (case.reversal, case.entropy_weight, case.confusion_weight)
    ]
    options = (
        case.ignore_index,
        case.label_smoothing,
        REDUCTIONS[case.reduction],
        case.mask_entropy,
        case.heads,
    )
    return inputs, (logits, inputs.target, inputs.weight), coefficients, options


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward(device: torch.device, case: Case, requires_grad: bool):
    _, tensors, coefficients, options = arguments(case, device, requires_grad)
    early = case.dtype != torch.float16 and case.reduction != "none"
    # One differentiable input: opcheck differentiates by every output that may have a gradient.
    torch.library.opcheck(
        torch.ops.lnl_ext.bias_loss.default,
        (*tensors, None, *coefficients, *options, early, early and not requires_grad),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_backward(device: torch.device, case: Case, requires_grad: bool):
    inputs, tensors, coefficients, options = arguments(case, device, requires_grad)
    denominators = torch.ops.lnl_ext.bias_loss(
        tensors[0].detach(), *tensors[1:], None, *coefficients, *options, False, False
    )[3]
    torch.library.opcheck(
        torch.ops.lnl_ext.bias_loss_backward.default,
        (inputs.upstream, *tensors, denominators, *coefficients, *options, True, not requires_grad),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_scale(device: torch.device, dtype: torch.dtype):
    for factor in (1.0, 3.0):
        torch.library.opcheck(
            torch.ops.lnl_ext.scale_gradient_.default,
            (torch.randn(5, 3, device=device, dtype=dtype), scalar(factor, device)),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.0, 1.0, 0.1, -65536.0])
@pytest.mark.parametrize("size", [0, 1, 37, 100_000])
def test_scale_multiplies_in_the_accumulation_dtype(device, dtype, factor, size):
    values = torch.randn(size, device=device).to(dtype)
    expected = (values.double() * torch.tensor(factor, dtype=torch.float64)).to(dtype)
    torch.ops.lnl_ext.scale_gradient_(values, scalar(factor, device))
    # float32 in between: a second rounding, of half a unit in the last place
    torch.testing.assert_close(values, expected, rtol=torch.finfo(dtype).eps, atol=0.0)


def test_the_gradient_that_the_operator_returns_stays_as_it_was(device: torch.device):
    _, tensors, coefficients, options = arguments(CASES[0], device, requires_grad=True)
    result = torch.ops.lnl_ext.bias_loss(*tensors, None, *coefficients, *options, True, False)
    before = result[4].clone()
    (3.0 * result[0]).backward()
    assert torch.equal(result[4], before)
    torch.testing.assert_close(tensors[0].grad, 3.0 * before)
