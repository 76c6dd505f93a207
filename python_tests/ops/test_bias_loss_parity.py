"""Every backend of the bias loss agrees with the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from backends import Backend
from bias_loss_cases import Case, assert_matches_oracle, cases, make_inputs
from hypothesis import given, settings


def check(backend: Backend, case: Case) -> None:
    inputs = make_inputs(case)
    on_device = inputs.to(backend.device)
    before = on_device.logits.clone()
    results = backend.run(on_device)
    for name, value in vars(results).items():
        setattr(results, name, value.cpu())
    assert_matches_oracle(inputs, results)
    assert torch.equal(on_device.logits, before)


@settings(max_examples=max(600, settings.default.max_examples))
@given(case=cases(confusion=True))
def test_operators_match_the_oracle(backend: Backend, case: Case):
    check(backend, case)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_planes_that_are_no_whole_blocks(backend: Backend, dtype: torch.dtype, reduction: str):
    """Planes of 196 positions, cut into pieces of work also before a plane's last four."""
    case = Case(40, 8, (14, 14), dtype=dtype, reduction=reduction, entropy_weight=0.2, ignored=0.1)
    check(backend, case)
