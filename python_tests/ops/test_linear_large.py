"""fused_linear_bias_loss on features of more than 2^31 elements, and at the ends of its shapes.

Slow: ``python -m pytest -m slow python_tests/ops/test_linear_large.py``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lnl_ext import fused_linear_bias_loss, reference

pytestmark = pytest.mark.slow
OPTIONS = {"reversal": 0.5, "entropy_weight": 0.1}


def needs(gibibytes: float) -> None:
    """Skip where so much memory is not available."""
    table = Path("/proc/meminfo")
    if not table.exists():
        pytest.skip("cannot tell how much memory is available")
    lines = dict(line.split(":") for line in table.read_text(encoding="utf-8").splitlines())
    available = int(lines["MemAvailable"].split()[0]) / 2**20
    if available < gibibytes:
        pytest.skip(f"{available:.1f} GiB of memory are available, {gibibytes} are needed")


@pytest.mark.parametrize("classes", [3, 70])  # the kernel, and products of chunks
def test_features_beyond_32_bits(classes: int):
    """Zeros that take no memory, and numbers in the last rows."""
    needs(10)
    width, tail = 1024, 6
    rows = 2**31 // width + tail
    features = torch.from_numpy(np.zeros((rows, width), np.float16))
    target = torch.from_numpy(np.zeros(rows, np.int64))
    generator = torch.Generator().manual_seed(0)
    features[-tail:] = torch.randn(tail, width, generator=generator)
    target[-tail:] = torch.randint(classes, (tail,), generator=generator)
    weight = (torch.randn(classes, width, generator=generator) / 16).half()

    def run(features: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = (features.requires_grad_(), weight.clone().requires_grad_())
        loss = fused_linear_bias_loss(*leaves, target, reduction="sum", **OPTIONS)
        return torch.autograd.grad(loss, leaves)

    few = run(features[-tail:].clone(), target[-tail:])
    all_ = run(features, target)
    assert features.numel() > 2**31
    torch.testing.assert_close(all_[0][-tail:], few[0])
    torch.testing.assert_close(all_[1], few[1])  # the zeros have no part in it
    # A row of zeros has equal logits: its gradient is known.
    p = torch.full((classes,), 1 / classes, dtype=torch.float64)
    logits_gradient = -0.5 * (p - torch.eye(classes, dtype=torch.float64)[0])
    expected = (logits_gradient @ weight.double()).half()
    for row in (0, rows // 2, rows - tail - 1):
        torch.testing.assert_close(all_[0][row], expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "width", "classes"),
    [
        (1_000_000, 16, 2),
        (1_000_000, 16, 70),
        (300, 8192, 2),
        (300, 8192, 64),
        (300, 8192, 65),
        (40, 8192, 4096),
        (20, 64, 262144),
        (1, 8192, 2),
    ],
)
def test_the_ends_of_its_shapes(rows: int, width: int, classes: int):
    needs(6)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(rows, width, generator=generator)
    weight = torch.randn(classes, width, generator=generator) / width**0.5
    bias = torch.randn(classes, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)

    def run(function, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (features, weight, bias)]
        loss = function(leaves[0], leaves[1], target, leaves[2], **OPTIONS)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    results = run(fused_linear_bias_loss, torch.float32)
    expected = run(reference.fused_linear_bias_loss, torch.float64)
    # float32 sums of up to a million terms, in blocks
    for actual, wanted in zip(results, expected, strict=True):
        assert (actual - wanted).norm() <= 2e-5 * wanted.norm()
