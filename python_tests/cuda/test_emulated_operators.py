"""fused_bias_loss as on CUDA tensors: csrc/cuda/bias_loss_cuda.cpp itself, on the shared cases."""

from __future__ import annotations

import emulated_cuda
import emulated_operators
import pytest
import torch
from backends import run_operators
from bias_loss_cases import Case, assert_matches_oracle, cases, make_inputs
from hypothesis import given, settings

pytestmark = pytest.mark.skipif(
    emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing())
)


@settings(max_examples=200)
@given(case=cases(confusion=True))
def test_operators_match_the_oracle(case: Case):
    emulated_operators.load()
    inputs = make_inputs(case)
    before = inputs.logits.clone()
    assert_matches_oracle(inputs, run_operators(inputs, torch.ops.lnl_emulated))
    assert torch.equal(inputs.logits, before)


def test_what_is_wrong_with_a_backward_call_is_named():
    emulated_operators.load()
    logits, target = torch.randn(4, 6), torch.randint(6, (4,))

    def backward(denominators: torch.Tensor, upstream: torch.Tensor) -> None:
        torch.ops.lnl_emulated.bias_loss_backward(
            upstream, logits, target, None, denominators, *[None] * 3, -100, 0.0, 1, False, 1,
            True, False,
        )  # fmt: skip

    backward(torch.ones(1, 2), torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"denominators has shape \(2, 2\), expected \(1, 2\)"):
        backward(torch.ones(2, 2), torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"grad_loss has shape \(4,\), expected \(\)"):
        backward(torch.ones(1, 2), torch.ones(4))
    with pytest.raises(RuntimeError, match="factor has shape"):
        torch.ops.lnl_emulated.scale_gradient_(logits, torch.ones(2))
