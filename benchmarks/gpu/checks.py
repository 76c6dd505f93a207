"""What only a GPU can show: every kernel called, CUDA graphs, tensors of more than 2^31 elements.

All of it runs on CPU tensors as well, but for the capture itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import lnl_ext

Gradients = Callable[[], tuple[Tensor, ...]]
# rows_small, rows_medium (16 and 32), rows_large, sites_small (vectors and not), sites_large
LOGITS = ((33, 12), (5, 100), (3, 900), (2, 3000), (2, 8, 6, 6), (2, 5, 7), (2, 40, 33))
HEADS = ((37, 48, 12), (9, 20, 64), (21, 16, 100))  # N, D, C: on chip twice, in chunks
TAIL = 16


def calls(device: torch.device, compare: bool = True) -> dict[str, Any]:
    """Call every kind of kernel, and compare with plain PyTorch unless a sanitizer runs this."""
    info = lnl_ext.build_info()
    if device.type == "cuda" and not info["cuda"]:
        raise RuntimeError(f"lnl_ext was built without CUDA: {info}")
    count = 0
    for dtype in (torch.float32, torch.bfloat16):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for shape in (*LOGITS, *HEADS):
            for options in ({"label_smoothing": 0.0}, {"label_smoothing": 0.1, "reversal": 0.3}):
                results = _call(shape, shape in HEADS, dtype, device, options)
                if compare:
                    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
                count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"build_info": dict(info), "calls": count}


def _call(
    shape: tuple[int, ...],
    linear: bool,
    dtype: torch.dtype,
    device: torch.device,
    options: dict[str, float],
) -> tuple[list[Tensor], list[Tensor]]:
    """Return value and gradients of the package's loss and of the plain one."""
    torch.manual_seed(0)
    if linear:
        n, d, c = shape
        tensors = [torch.randn(size, device=device) * d**-0.5 for size in ((n, d), (c, d), (c,))]
        target = torch.randint(c, (n,), device=device)
    else:
        tensors = [torch.randn(shape, device=device)]
        target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    results = []
    for module in (lnl_ext, lnl_ext.reference):
        loss: Any
        if linear:
            loss = module.fused_linear_bias_loss(
                leaves[0], leaves[1], target, leaves[2], entropy_weight=0.1, **options
            )
        else:
            loss = module.fused_bias_loss(leaves[0], target, entropy_weight=0.1, **options)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    return results[0], results[1]


# ---- CUDA graphs ---------------------------------------------------------------------------


@dataclasses.dataclass
class Captured:
    """Something that makes gradients of `leaves`, for a graph."""

    name: str
    leaves: list[Tensor]
    gradients: Gradients


def captured_operations(device: torch.device) -> list[Captured]:
    """Return the operators and an adversary, rows and sites, a head on chip and one in chunks."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).requires_grad_()

    def loss_of(*shape: int) -> Captured:
        logits = normal(*shape)
        target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
        return Captured(
            f"fused_bias_loss {shape}",
            [logits],
            lambda: torch.autograd.grad(
                lnl_ext.fused_bias_loss(logits, target, entropy_weight=0.01, reversal=0.1), logits
            ),
        )

    def linear_of(n: int, d: int, c: int) -> Captured:
        leaves = [normal(n, d), normal(c, d), normal(c)]
        target = torch.randint(c, (n,), device=device)
        return Captured(
            f"fused_linear_bias_loss {(n, d, c)}",
            leaves,
            lambda: torch.autograd.grad(
                lnl_ext.fused_linear_bias_loss(
                    leaves[0], leaves[1], target, leaves[2], entropy_weight=0.01, reversal=0.1
                ),
                leaves,
            ),
        )

    with device:
        adversary = lnl_ext.BiasAdversary(torch.nn.Linear(32, 5))
    features, label = normal(64, 32), torch.randint(5, (64,), device=device)
    leaves = [features, *adversary.parameters()]
    return [
        loss_of(64, 8, 14, 14),
        loss_of(64, 1000),
        linear_of(256, 64, 12),
        linear_of(128, 64, 1000),
        Captured(
            "BiasAdversary",
            leaves,
            lambda: torch.autograd.grad(adversary(features, label), leaves),
        ),
    ]


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


def graph_capture(device: torch.device) -> list[str]:
    """Capture forward and backward, replay them on other numbers, compare with a call outside."""
    names = []
    for operation in captured_operations(device):
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
                    f"{operation.name}: the replayed graph gives other gradients than the same "
                    "call outside"
                )
        names.append(operation.name)
    return names


# ---- beyond 2^31 ---------------------------------------------------------------------------


def free_memory(device: torch.device) -> int | None:
    """Return the device's free bytes; None on the CPU, where the tensors are small."""
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else None


def large_tensors(device: torch.device, quick: bool) -> dict[str, str]:
    """Take tensors of more than 2^31 elements, whose last rows must be right."""
    cases: dict[str, tuple[int, Callable[[], int]]] = {
        "logits": (12 * 2**30, lambda: large_logits(device, 35 if quick else 2**28 + 3)),
        "features": (10 * 2**30, lambda: large_features(device, 35 if quick else 2**22 + 3)),
        "logits in chunks": (
            2**31,
            lambda: large_head(device, 35 if quick else 2**16 + 3, 99 if quick else 2**15 + 3),
        ),
    }
    results = {}
    for name, (needed, check) in cases.items():
        free = free_memory(device)
        if free is not None and free < needed:
            results[name] = f"skipped: {free / 2**30:.0f} GiB free, {needed / 2**30:.0f} needed"
            continue
        results[name] = f"{check()} elements"
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


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
