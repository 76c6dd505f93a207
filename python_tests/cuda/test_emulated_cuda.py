"""The CUDA kernels' unmodified source on the CPU emulator, on the cases of every other backend.

What the C++ tests of csrc/tests do with schedules and memory checks, this does with the operators'
own cases and with autograd on top. It says nothing of a GPU's time or of its compiler.
"""

from __future__ import annotations

from collections.abc import Iterator

import emulated_cuda
import pytest
import torch
from bias_loss_cases import Case, Inputs, Results, assert_matches_oracle, cases, make_inputs
from hypothesis import given, settings
from torch import Tensor

import lnl_ext

pytestmark = pytest.mark.skipif(
    emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing())
)
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def run_emulated(inputs: Inputs) -> Results:
    """Values from the forward kernels; gradients from the forward or the backward, as in use."""
    case = inputs.case

    def scalar(value: float | None) -> Tensor | None:
        return None if value is None else torch.tensor(value, dtype=torch.float64)

    arguments = (
        scalar(case.reversal),
        scalar(case.entropy_weight),
        scalar(case.confusion_weight),
        case.ignore_index,
        case.label_smoothing,
        REDUCTIONS[case.reduction],
        case.mask_entropy,
        case.heads,
    )
    tensors = (inputs.logits, inputs.target, inputs.weight)
    early = case.dtype != torch.float16 and case.reduction != "none"
    *values, denominators, gradient, head_gradient = emulated_cuda.bias_loss(
        *tensors, None, *arguments, early, early
    )
    if early:
        for each in (gradient, head_gradient):
            emulated_cuda.scale_gradient_(each, inputs.upstream)
    else:
        gradient, head_gradient = emulated_cuda.bias_loss_backward(
            inputs.upstream, *tensors, denominators, *arguments, True, True
        )
    return Results(*values, gradient, head_gradient)


@settings(max_examples=300)
@given(case=cases(confusion=True))
def test_emulated_kernels_match_the_oracle(case: Case):
    inputs = make_inputs(case)
    before = inputs.logits.clone()
    assert_matches_oracle(inputs, run_emulated(inputs))
    assert torch.equal(inputs.logits, before)


@pytest.mark.parametrize("schedule", emulated_cuda.SCHEDULES)
def test_results_do_not_depend_on_the_order_of_threads(schedule: str):
    inputs = make_inputs(Case(rows=70, classes=12, heads=3, space=(5,), entropy_weight=0.3))
    emulated_cuda.set_schedule("forward")
    expected = run_emulated(inputs)
    emulated_cuda.set_schedule(schedule, seed=7)
    try:
        results = run_emulated(inputs)
    finally:
        emulated_cuda.set_schedule("forward")
    for name, value in vars(expected).items():
        assert torch.equal(getattr(results, name), value), name


@pytest.mark.parametrize("target", [5, -3, 2**40])
def test_a_target_out_of_range_makes_its_own_site_nan(target: int):
    inputs = make_inputs(Case(rows=6, classes=5, reduction="none", entropy_weight=0.2))
    inputs.target[2] = target
    results = run_emulated(inputs)
    others = torch.arange(6) != 2
    assert results.loss[2].isnan()
    assert results.gradient is not None
    assert results.gradient[2].isnan().all()
    assert results.loss[others].isfinite().all()
    assert results.gradient[others].isfinite().all()


@pytest.mark.parametrize("dtype", emulated_cuda.DTYPES)
@pytest.mark.parametrize("factor", [1.0, -0.5])
def test_scale_gradient(dtype: torch.dtype, factor: float):
    gradient = torch.randn(1003).to(dtype)
    expected = (gradient.double() * factor).to(dtype)
    emulated_cuda.scale_gradient_(gradient, torch.tensor(factor))
    assert torch.equal(gradient, expected)


@pytest.fixture
def operators_on_the_emulator() -> Iterator[None]:
    """The operators' CPU kernels are the emulated CUDA kernels for one test."""
    library = torch.library.Library("lnl_ext", "IMPL")
    for name in ("bias_loss", "bias_loss_backward", "scale_gradient_"):
        library.impl(name, getattr(emulated_cuda, name), "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.mark.parametrize("reversal", [None, 0.7])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autograd_on_the_emulated_operators(
    operators_on_the_emulator: None, reversal: float | None, reduction: str
):
    torch.manual_seed(0)
    logits = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(3, (3, 2, 5))
    target[0, 1, 2] = -100

    def loss(module, z: Tensor) -> Tensor:
        return module.fused_bias_loss(
            z, target, entropy_weight=0.3, reversal=reversal, heads=2, reduction=reduction
        ).square()

    value, expected = loss(lnl_ext, logits), loss(lnl_ext.reference, logits)
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(gradient, expected_gradient)
    if reversal is None:
        assert torch.autograd.gradcheck(lambda z: loss(lnl_ext, z), logits)
