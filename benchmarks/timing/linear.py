"""The bias head's last linear layer with the loss: ours, PyTorch's ways, and the floor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import lnl_ext

from .losses import ENTROPY_WEIGHT, plain_loss
from .settings import Settings
from .turns import row, take_turns

TITLE = "`fused_linear_bias_loss`, forward and backward for features, weight and bias"
LARGE_TITLE = "`fused_linear_bias_loss` with very many classes"
NOTES = [
    "Cases are (N, D, C). `eager` and `compile` are `F.linear` and the loss in plain PyTorch. "
    "`F.linear_cross_entropy` is PyTorch's own, as it is and with its chunks "
    "(`LinearCrossEntropyOptions()`): it has no entropy and no reversal layer, so it computes "
    "less than the others.",
    "Beside them: `products` are the three matrix products by torch's own matmul, by chunks of "
    "rows into tensors that exist (not a floor: other kernels can be faster); `exp` is one "
    "exponential a logit, likewise; "
    "`copy` is one read of the features and one write of their size.",
]
LARGE_NOTES = [
    "As above, without `products`: a round takes about a minute, so there are two, and only what "
    "compiles has run before the first. The products are 6 N D C = 1.6e12 operations, and nearly "
    "all of the time.",
]
FLOOR_LOGITS = 2**23  # of one chunk of the floor, 32 MB in float32


class Case(NamedTuple):
    """Shape and dtype of a measurement: features (n, d), weight (c, d)."""

    n: int
    d: int
    c: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.n}x{self.d}x{self.c} {str(self.dtype).removeprefix('torch.')}"


CASES = [
    Case(65536, 512, 12),
    Case(65536, 512, 12, torch.bfloat16),
    Case(4096, 2048, 64),
    Case(4096, 2048, 64, torch.bfloat16),
]
LARGE_CASE = Case(8192, 1024, 32000)
QUICK_CASES = [Case(1024, 64, 12), Case(256, 32, 500)]
QUICK_LARGE_CASE = Case(64, 32, 2000)


class Inputs(NamedTuple):
    """Features (N, D), weight (C, D) and bias (C,), which want gradients; target (N,)."""

    features: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def fused(features: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """One operation of this package."""
    return lnl_ext.fused_linear_bias_loss(
        features, weight, target, bias, entropy_weight=ENTROPY_WEIGHT
    )


def eager(features: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """Plain PyTorch; the loss in float32, as under autocast."""
    return plain_loss(functional.linear(features, weight, bias).float(), target)


def _torch_own(options: Any) -> Loss:
    def loss(features: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        result: Tensor = functional.linear_cross_entropy(
            features, weight, target, linear_bias=bias, options=options
        )
        return result

    return loss


def make_loss(name: str) -> Loss:
    """Return the candidate called ``name``, one of :func:`names`."""
    if name == "linear_cross_entropy":
        return _torch_own(None)
    if name == "linear_cross_entropy, chunked":
        return _torch_own(torch.nn.LinearCrossEntropyOptions())
    return {"fused": fused, "eager": eager, "compile": torch.compile(eager)}[name]


def names() -> list[str]:
    """Return the candidates that the installed torch has."""
    ours = ["fused", "eager", "compile"]
    if not hasattr(functional, "linear_cross_entropy"):
        return ours
    return [*ours, "linear_cross_entropy", "linear_cross_entropy, chunked"]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Return random features and a head whose logits are about N(0, 1)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(shape, generator=generator)
        return values.to(device=device, dtype=case.dtype).requires_grad_()

    target = torch.randint(case.c, (case.n,), generator=generator).to(device)
    return Inputs(
        normal(case.n, case.d), normal(case.c, case.d, scale=case.d**-0.5), normal(case.c), target
    )


def step(loss: Loss, inputs: Inputs) -> None:
    """Run forward and backward; all gradients are fresh tensors."""
    for tensor in inputs[:3]:
        tensor.grad = None
    loss(*inputs).backward()  # type: ignore[no-untyped-call]


def floors(inputs: Inputs) -> dict[str, Callable[[], object]]:
    """Return what no implementation can do without."""
    features, weight = inputs.features.detach(), inputs.weight.detach()
    chunk = min(len(features), max(1, FLOOR_LOGITS // len(weight)))
    logits = features.new_empty(chunk, len(weight))
    exponentials = torch.zeros_like(logits)
    features_gradient, weight_gradient = torch.empty_like(features), torch.empty_like(weight)

    parts = list(
        zip(torch.split(features, chunk), torch.split(features_gradient, chunk), strict=True)
    )

    def products() -> None:
        for rows, out in parts:
            made = logits[: len(rows)]
            torch.mm(rows, weight.T, out=made)
            torch.mm(made, weight, out=out)
            weight_gradient.addmm_(made.T, rows, beta=0)

    def exp() -> None:
        for rows, _ in parts:
            torch.exp(logits[: len(rows)], out=exponentials[: len(rows)])

    return {
        "products": products,
        "exp": exp,
        "copy": lambda: features_gradient.copy_(features),
    }


def _candidates(case: Case, inputs: Inputs, settings: Settings) -> dict[str, Callable[[], object]]:
    """Return steps of all ways, after a check that ours computes the same as plain PyTorch."""
    torch.compiler.reset()
    few = Inputs(inputs.features[:256], inputs.weight, inputs.bias, inputs.target[:256])
    tolerance = 1e-5 if case.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(fused(*few), eager(*few), rtol=tolerance, atol=tolerance)
    return {
        name: functools.partial(step, make_loss(name), inputs)
        for name in names()
        if not (settings.quick and name == "compile")
    }


def _report(title: str, notes: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"title": title, "base": "fused", "ratio": "its time over ours", "rows": rows} | {
        "unit": "ms",
        "notes": notes,
    }


def measure(settings: Settings) -> dict[str, Any]:
    """Measure the cases with few classes."""
    rows = []
    for case in QUICK_CASES if settings.quick else CASES:
        inputs = make_inputs(case, settings.device)
        candidates = _candidates(case, inputs, settings) | floors(inputs)
        times = take_turns(candidates, settings.device, settings.seconds)
        rows.append(row(str(case), times, "fused"))
    return _report(TITLE, NOTES, rows)


def measure_large(settings: Settings) -> dict[str, Any]:
    """Measure the case whose products take seconds, in two rounds."""
    case = QUICK_LARGE_CASE if settings.quick else LARGE_CASE
    inputs = make_inputs(case, settings.device)
    candidates = _candidates(case, inputs, settings)
    if "compile" in candidates:
        candidates["compile"]()
    bytes_and_exp = {name: run for name, run in floors(inputs).items() if name != "products"}
    times = take_turns(
        candidates | bytes_and_exp, settings.device, settings.seconds, warm_up=0, min_rounds=2
    )
    return _report(LARGE_TITLE, LARGE_NOTES, [row(str(case), times, "fused")])
