"""fused_linear_bias_loss agrees with the float64 reference, for every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bias_loss_cases import Case
from hypothesis import given, settings
from linear_cases import (
    LinearCase,
    assert_linear_matches,
    linear_cases,
    make_linear_inputs,
    run,
)

from lnl_ext import fused_linear_bias_loss, reference


def check(case: LinearCase) -> None:
    inputs = make_linear_inputs(case)
    before = [t.clone() for t in inputs.differentiable]
    results = run(fused_linear_bias_loss, inputs)
    expected = run(reference.fused_linear_bias_loss, inputs, torch.float64)
    assert_linear_matches(inputs, results, expected)
    assert all(map(torch.equal, before, inputs.differentiable))


@settings(max_examples=max(600, settings.default.max_examples))
@given(case=linear_cases())
def test_value_and_gradients_match_the_reference(case: LinearCase):
    check(case)


# Over the borders of the kernels: parts, blocks of rows, chunks of the width, products instead.
SHAPES = [
    (5000, 24, 3, 1),
    (1300, 520, 12, 1),
    (700, 1040, 5, 4),
    (200, 2000, 64, 1),
    (200, 64, 65, 1),
    (129, 48, 33, 2),
    (300, 16, 5000, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.2])
def test_larger_shapes(shape, dtype, entropy_weight):
    rows, width, classes, heads = shape
    loss = Case(
        rows,
        classes,
        heads=heads,
        dtype=dtype,
        entropy_weight=entropy_weight,
        reversal=0.5,
        ignored=0.1,
    )
    check(LinearCase(loss, width))


def test_the_plain_gradients_of_a_linear_layer_and_cross_entropy():
    # Against PyTorch alone: the reference shares its terms with nothing here.
    x = torch.randn(50, 24, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(24, 7, dtype=torch.float64)
    target = torch.randint(7, (50,))
    loss = fused_linear_bias_loss(
        x, head.weight, target, head.bias, reversal=0.3, entropy_weight=0.2
    )
    actual = torch.autograd.grad(loss, [x, *head.parameters()])
    logits = head(x)
    log_p = torch.log_softmax(logits, 1)
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    cross_entropy = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(loss, cross_entropy - 0.2 * entropy)
    for_head = torch.autograd.grad(cross_entropy, list(head.parameters()), retain_graph=True)
    for_x = torch.autograd.grad(-0.3 * cross_entropy - 0.2 * entropy, x)
    torch.testing.assert_close(actual, for_x + for_head)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str):
    if capability != "default" and capability not in supported():
        pytest.skip(f"this processor has no {capability}")
    script = (
        "import sys; sys.path[:0] = ['python_tests', 'python_tests/support', 'python_tests/ops']\n"
        "import conftest, lnl_ext, test_linear_parity as t, torch\n"
        f"assert lnl_ext.build_info()['cpu_capability'].lower() == {capability!r}\n"
        "for shape in t.SHAPES:\n"
        "    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):\n"
        "        t.test_larger_shapes(shape, dtype, 0.2)\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def supported() -> tuple[str, ...]:
    best = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": ("avx2", "avx512"), "AVX2": ("avx2",)}.get(best, ())
