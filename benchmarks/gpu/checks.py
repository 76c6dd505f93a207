"""What only a GPU can show: every kernel called, CUDA graphs, tensors of more than 2^31 elements.

All of it runs on CPU tensors as well, but for the capture itself.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import lnl_ext

Gradients = Callable[[], tuple[Tensor, ...]]
FAMILIES: dict[str, tuple[tuple[int, ...], ...]] = {
    "rows_small": ((33, 12),),
    "rows_medium": ((5, 100), (3, 900)),
    "rows_large": ((2, 3000),),
    "sites_small": ((2, 8, 6, 6), (2, 5, 7)),  # vectors and not
    "sites_large": ((2, 40, 33),),
    "linear_on_chip": ((37, 48, 12), (9, 20, 64)),
    "linear in chunks": ((21, 16, 100),),
}
"""Shapes of logits, or N, D and C of a linear head, by the kernel that they get."""
TAIL = 16


def calls(device: torch.device, family: str, compare: bool = True) -> dict[str, Any]:
    """Call a family of kernels, and compare with plain PyTorch unless a sanitizer runs this.

    Returns
    -------
    dict
        ``calls``: how many there were; ``failed``: the last lines of each failure by its call.
    """
    failed = {}
    count = 0
    for dtype in (torch.float32, torch.bfloat16):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for shape in FAMILIES[family]:
            for options in ({"label_smoothing": 0.0}, {"label_smoothing": 0.1, "reversal": 0.3}):
                count += 1
                try:
                    inputs = make_inputs(shape, family.startswith("linear"), dtype, device)
                    results = losses_of(lnl_ext, *inputs, options)
                    if device.type == "cuda":
                        torch.cuda.synchronize()  # a failure is this call's
                    if compare:
                        plain = losses_of(lnl_ext.reference, *inputs, options)
                        torch.testing.assert_close(results, plain, rtol=tolerance, atol=tolerance)
                except Exception:  # the other calls are worth knowing; the step fails at its end
                    name = f"{shape} {str(dtype).removeprefix('torch.')} {options}"
                    failed[name] = traceback.format_exc().splitlines()[-8:]
    return {"calls": count, "failed": failed}


def make_inputs(
    shape: tuple[int, ...], linear: bool, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Return the logits, or features, weight and bias of a linear head, and the target."""
    torch.manual_seed(0)
    if linear:
        n, d, c = shape
        tensors = [torch.randn(size, device=device) * d**-0.5 for size in ((n, d), (c, d), (c,))]
        target = torch.randint(c, (n,), device=device)
    else:
        tensors = [torch.randn(shape, device=device)]
        target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors], target


def losses_of(
    module: Any, leaves: list[Tensor], target: Tensor, options: dict[str, float]
) -> list[Tensor]:
    """Return value and gradients of the loss of `lnl_ext` or of `lnl_ext.reference`."""
    loss: Any
    if len(leaves) > 1:
        loss = module.fused_linear_bias_loss(
            leaves[0], leaves[1], target, leaves[2], entropy_weight=0.1, **options
        )
    else:
        loss = module.fused_bias_loss(leaves[0], target, entropy_weight=0.1, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


# ---- CUDA graphs ---------------------------------------------------------------------------


@dataclasses.dataclass
class Captured:
    """Something that makes gradients of `leaves`, for a graph."""

    leaves: list[Tensor]
    gradients: Gradients


def _captured_loss(device: torch.device, *shape: int) -> Captured:
    logits = torch.randn(shape, device=device).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    return Captured(
        [logits],
        lambda: torch.autograd.grad(
            lnl_ext.fused_bias_loss(logits, target, entropy_weight=0.01, reversal=0.1), logits
        ),
    )


def _captured_linear(device: torch.device, n: int, d: int, c: int) -> Captured:
    leaves = [torch.randn(size, device=device).requires_grad_() for size in ((n, d), (c, d), (c,))]
    target = torch.randint(c, (n,), device=device)
    return Captured(
        leaves,
        lambda: torch.autograd.grad(
            lnl_ext.fused_linear_bias_loss(
                leaves[0], leaves[1], target, leaves[2], entropy_weight=0.01, reversal=0.1
            ),
            leaves,
        ),
    )


def _captured_adversary(device: torch.device) -> Captured:
    with device:
        adversary = lnl_ext.BiasAdversary(torch.nn.Linear(32, 5))
    features = torch.randn(64, 32, device=device).requires_grad_()
    label = torch.randint(5, (64,), device=device)
    leaves = [features, *adversary.parameters()]
    return Captured(leaves, lambda: torch.autograd.grad(adversary(features, label), leaves))


CAPTURED: dict[str, Callable[[torch.device], Captured]] = {
    "sites": lambda device: _captured_loss(device, 64, 8, 14, 14),
    "rows": lambda device: _captured_loss(device, 64, 1000),
    "linear on chip": lambda device: _captured_linear(device, 256, 64, 12),
    "linear in chunks": lambda device: _captured_linear(device, 128, 64, 1000),
    "adversary": _captured_adversary,
}


def capture(gradients: Gradients) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Capture a call in a CUDA graph; return what replays it and the tensors that it fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = gradients()
    return graph.replay, outputs


def graph_capture(device: torch.device, name: str) -> str:
    """Capture forward and backward, replay them on other numbers, compare with a call outside."""
    operation = CAPTURED[name](device)
    replay, outputs = capture(operation.gradients)
    with torch.no_grad():
        for leaf in operation.leaves:
            leaf.copy_(torch.randn_like(leaf))
    replay()
    if device.type == "cuda":
        torch.cuda.synchronize()
    # Old numbers would be far away. cuBLAS may choose otherwise in a graph, so not bit by bit.
    for got, wanted in zip(outputs, operation.gradients(), strict=True):
        if not (got - wanted).norm() <= 1e-4 * wanted.norm():
            raise RuntimeError(
                f"{name}: the replayed graph gives other gradients than the same call outside"
            )
    return "the replayed gradients are right"


# ---- beyond 2^31 ---------------------------------------------------------------------------


def free_memory(device: torch.device) -> int | None:
    """Return the device's free bytes; None on the CPU, where the tensors are small."""
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else None


def large_tensors(device: torch.device, name: str, quick: bool) -> str:
    """Take tensors of more than 2^31 elements, whose last rows must be right."""
    needed, check = LARGE[name]
    free = free_memory(device)
    if free is not None and free < needed:
        return f"skipped: {free / 2**30:.0f} GiB free, {needed / 2**30:.0f} needed"
    return f"{check(device, quick)} elements"


def _close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-3, check_dtype=False)


def large_logits(device: torch.device, rows: int, classes: int = 8) -> int:
    """Check the gradient of the last rows of bfloat16 logits; the others are zeros."""
    logits = torch.zeros(rows, classes, device=device, dtype=torch.bfloat16)
    tail = torch.randn(TAIL, classes, device=device).to(torch.bfloat16)
    logits[-TAIL:] = tail
    target = torch.zeros(rows, device=device, dtype=torch.int64)
    logits.requires_grad_()
    loss = lnl_ext.fused_bias_loss(logits, target, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    small = tail.float().requires_grad_()
    plain = functional.cross_entropy(small, target[:TAIL], reduction="sum")
    _close(gradient[-TAIL:], torch.autograd.grad(plain, small)[0])
    return logits.numel()


def large_features(device: torch.device, rows: int, width: int = 512, classes: int = 12) -> int:
    """Check a linear head's gradients where only the last rows of the features are not zero."""
    return _large_linear(device, rows, width, classes, counted=rows * width)


def large_head(device: torch.device, rows: int, classes: int, width: int = 16) -> int:
    """Likewise with so many classes that the logits, which never exist, would be too many."""
    return _large_linear(device, rows, width, classes, counted=rows * classes)


def _large_linear(device: torch.device, rows: int, width: int, classes: int, counted: int) -> int:
    features = torch.zeros(rows, width, device=device, dtype=torch.bfloat16)
    tail = torch.randn(TAIL, width, device=device).to(torch.bfloat16)
    features[-TAIL:] = tail
    weight = (torch.randn(classes, width, device=device) * width**-0.5).to(torch.bfloat16)
    target = torch.zeros(rows, device=device, dtype=torch.int64)
    features.requires_grad_(), weight.requires_grad_()
    loss = lnl_ext.fused_linear_bias_loss(features, weight, target, reduction="sum")
    for_features, for_weight = torch.autograd.grad(loss, [features, weight])
    # The same rows alone: their product may round the logits' gradients, as PyTorch's does, so that
    # exact gradients are farther off. Those of a few rows are the tests' subject.
    tail.requires_grad_()
    few = lnl_ext.fused_linear_bias_loss(tail, weight, target[:TAIL], reduction="sum")
    wanted = torch.autograd.grad(few, [tail, weight])
    _close(for_features[-TAIL:], wanted[0])
    _close(for_weight, wanted[1])  # rows of zeros add nothing
    return counted


LARGE: dict[str, tuple[int, Callable[[torch.device, bool], int]]] = {
    "logits": (
        12 * 2**30,
        lambda device, quick: large_logits(device, 35 if quick else 2**28 + 3),
    ),
    "features": (
        10 * 2**30,
        lambda device, quick: large_features(device, 35 if quick else 2**22 + 3),
    ),
    "logits in chunks": (
        2**31,
        lambda device, quick: large_head(
            device, 35 if quick else 2**16 + 3, 99 if quick else 2**15 + 3
        ),
    ),
}
"""The bytes that each needs, and its check."""
