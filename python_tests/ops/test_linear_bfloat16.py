"""fused_linear_bias_loss in bfloat16 where the processor multiplies it, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lnl_ext import _C, fused_linear_bias_loss, reference


def test_the_kernel_is_chosen_by_the_processor():
    table = Path("/proc/cpuinfo")
    if not table.exists():
        pytest.skip("the processor's instructions are read from Linux's /proc/cpuinfo")
    avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    has = "avx512_bf16" in table.read_text(encoding="utf-8").split()
    assert _C.multiplies_bfloat16() == (avx512 and has)


@pytest.mark.parametrize("classes", [2, 3, 12, 13, 31, 64])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (35, 32), (64, 33), (131, 96), (67, 2080)])
@pytest.mark.parametrize("kind", ["one gradient", "two gradients", "probabilities"])
def test_values_and_gradients(rows, width, classes, kind):
    generator = torch.Generator().manual_seed(rows + classes)
    features = torch.randn(rows, width, generator=generator).bfloat16()
    weight = (torch.randn(classes, width, generator=generator) / width**0.5).bfloat16()
    bias = torch.randn(classes, generator=generator).bfloat16()
    options: dict = {"reduction": "sum"}
    if kind == "two gradients":
        options |= {"reversal": 0.5, "entropy_weight": 0.2}
    target = torch.randint(classes, (rows,), generator=generator)
    if kind == "probabilities":
        target = torch.rand(rows, classes, generator=generator).softmax(1).bfloat16()

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (features, weight, bias)]
        to = target.to(dtype) if kind == "probabilities" else target
        loss = function(leaves[0], leaves[1], to, leaves[2], **options)
        return loss.detach().double(), *torch.autograd.grad(loss, leaves)

    loss, *gradients = run(fused_linear_bias_loss, torch.bfloat16)
    exact_loss, *exact = run(reference.fused_linear_bias_loss, torch.float64)
    torch.testing.assert_close(loss, exact_loss, rtol=1e-5, atol=1e-5)

    # Each gradient is a product of the logits' gradient, which is rounded once, and rounded itself.
    logits = torch.addmm(bias.double(), features.double(), weight.double().T).requires_grad_()
    to = target.double() if kind == "probabilities" else target
    (of_features,) = torch.autograd.grad(reference.fused_bias_loss(logits, to, **options), logits)
    (of_head,) = torch.autograd.grad(reference.fused_bias_loss(logits, to, reduction="sum"), logits)
    bounds = [
        of_features.abs() @ weight.double().abs(),
        of_head.abs().T @ features.double().abs(),
        of_head.abs().sum(0),
    ]
    half_unit = 2.0**-8  # of numbers of 8 bits
    for actual, wanted, bound in zip(gradients, exact, bounds, strict=True):
        allowed = half_unit * (bound + wanted.abs()) + 1e-5 * bound
        assert ((actual.double() - wanted).abs() <= allowed).all()
