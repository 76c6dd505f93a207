"""Every backend of the bias loss agrees with the float64 oracle."""

from __future__ import annotations

import torch
from backends import Backend
from bias_loss_cases import Case, assert_matches_oracle, cases, make_inputs
from hypothesis import given, settings


@settings(max_examples=max(600, settings.default.max_examples))
@given(case=cases(confusion=True))
def test_operators_match_the_oracle(backend: Backend, case: Case):
    inputs = make_inputs(case)
    on_device = inputs.to(backend.device)
    before = on_device.logits.clone()
    results = backend.run(on_device)
    for name, value in vars(results).items():
        setattr(results, name, value.cpu())
    assert_matches_oracle(inputs, results)
    assert torch.equal(on_device.logits, before)
