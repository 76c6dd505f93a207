"""Times of the losses on a GPU against PyTorch, torch.compile and Liger, with the bandwidth."""

from __future__ import annotations

import functools
import importlib.util
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from timing import linear, losses, peak
from timing.turns import row, take_turns
from torch import Tensor

SHAPES: tuple[tuple[tuple[int, ...], torch.dtype], ...] = (
    ((2**22, 12), torch.float32),
    ((4096, 8, 14, 14), torch.float32),
    ((65536, 1000), torch.float32),
    ((4096, 32000), torch.bfloat16),
    ((2**22, 12), torch.bfloat16),
    ((4096, 8, 14, 14), torch.bfloat16),
    ((65536, 1000), torch.bfloat16),
    ((4096, 32000), torch.float32),
    ((64, 8, 512, 512), torch.float32),
    ((64, 150, 128, 128), torch.float32),
    ((1024, 128256), torch.bfloat16),
    ((384, 8, 14, 14), torch.float32),
    ((65536, 12), torch.float32),
)
QUICK_SHAPES = (((4, 8, 3, 3), torch.float32), ((16, 12), torch.bfloat16))
CASES = (
    linear.Case(65536, 512, 12),
    linear.Case(8192, 1024, 32000),
    linear.Case(4096, 2048, 64),
    linear.Case(65536, 512, 12, torch.bfloat16),
)
QUICK_CASES = (linear.Case(64, 32, 12), linear.Case(16, 8, 100, torch.bfloat16))

Report = Callable[[dict[str, Any]], None]


def liger_missing(device: torch.device) -> str | None:
    """Say why Liger's losses are not among the peers, or return None if they are."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed (pip install liger-kernel)"
    return None if device.type == "cuda" else "Liger's kernels need a GPU"


def loss_candidates(logits: Tensor, target: Tensor) -> dict[str, Callable[[], object]]:
    """Return forward and backward of each way to compute the loss, and a copy of the logits."""

    def plain(z: Tensor) -> Tensor:
        return losses.plain_loss(z.float(), target)

    def both(loss: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(logits), logits)

    written = torch.empty_like(logits)
    candidates: dict[str, Callable[[], object]] = {
        "copy": lambda: written.copy_(logits.detach()),
        "fused": both(lambda z: losses.fused_loss(z, target)),
        "eager": both(plain),
        "compile": both(torch.compile(plain, dynamic=False)),
    }
    if liger_missing(logits.device) is None and logits.dim() == 2:
        from liger_kernel.transformers.functional import liger_cross_entropy

        # Without the entropy; it overwrites the logits, so a copy is what it gets.
        candidates["liger"] = both(lambda z: liger_cross_entropy(z + 0, target))
    return candidates


def linear_candidates(inputs: linear.Inputs) -> dict[str, Callable[[], object]]:
    """Return the ways to compute the loss of a linear head, and a copy of the features."""
    features, weight, bias, target = inputs
    candidates: dict[str, Callable[[], object]] = {
        name: functools.partial(linear.step, linear.make_loss(name), inputs)
        for name in ("fused", "eager", "compile")
    }
    if liger_missing(features.device) is None:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def liger(*_: Tensor) -> Tensor:  # without the entropy
            loss: Tensor = liger_fused_linear_cross_entropy(features, weight, target, bias)
            return loss

        candidates["liger"] = functools.partial(linear.step, liger, inputs)
    written = torch.empty_like(features)
    candidates["copy"] = lambda: written.copy_(features.detach())
    return candidates


def time_loss(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Time all ways on logits of one shape."""
    logits = torch.randn(shape, device=device).to(dtype).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    few = logits.detach()[:8]
    torch.testing.assert_close(
        losses.fused_loss(few, target[:8]),
        losses.plain_loss(few.float(), target[:8]),
        rtol=1e-4,
        atol=1e-4,
    )
    times = take_turns(loss_candidates(logits, target), device, seconds)
    size = logits.numel() * logits.element_size()
    case = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
    return with_bandwidth(row(case, times, "fused"), size) | {"classes": shape[1]}


def time_linear(case: linear.Case, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time all ways on one linear head, and measure the memory of ours and of eager."""
    inputs = linear.make_inputs(case, device)
    few = linear.Inputs(inputs.features[:8], inputs.weight, inputs.bias, inputs.target[:8])
    tolerance = 1e-4 if case.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        linear.fused(*few), linear.eager(*few), rtol=tolerance, atol=tolerance
    )
    candidates = linear_candidates(inputs)
    times = take_turns(candidates, device, seconds)
    memory = {}
    for name in ("fused", "eager"):
        for tensor in inputs[:3]:
            tensor.grad = None
        memory[name] = peak.extra_peak(candidates[name], device)
    size = inputs.features.numel() * inputs.features.element_size()
    result = with_bandwidth(row(str(case), times, "fused"), size)
    return result | {"classes": case.c, "extra_bytes": memory}


def with_bandwidth(result: dict[str, Any], size: int) -> dict[str, Any]:
    """Add gigabytes a second for one read and one write of `size` bytes: ours and the copy's."""
    speed = {
        name: round(2e-6 * size / max(result["values"][name]["median"], 1e-5), 1)
        for name in ("fused", "copy")
    }
    return result | {"bytes": size, "gigabytes_per_second": speed}


def measure(
    linear_head: bool, device: torch.device, quick: bool, seconds: float, report: Report
) -> bool:
    """Time all cases, the most telling first, as long as there is time.

    Parameters
    ----------
    linear_head
        The linear head's cases, else those of logits.
    device, quick
        Where, and whether with tiny shapes.
    seconds
        When no case is begun that would not end within them, as the longest so far.
    report
        Called with all that is known after every case.

    Returns
    -------
    bool
        Whether no case failed.
    """
    end = time.monotonic() + seconds
    each = 0.01 if quick else 0.7
    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    if linear_head:
        for case in QUICK_CASES if quick else CASES:
            jobs.append((str(case), functools.partial(time_linear, case, device, each)))
    else:
        for shape, dtype in QUICK_SHAPES if quick else SHAPES:
            name = f"{shape} {dtype}"
            jobs.append((name, functools.partial(time_loss, shape, dtype, device, each)))
    found: dict[str, Any] = {"rows": [], "failed": {}, "left_out": [name for name, _ in jobs]}
    found["liger"] = liger_missing(device) or "timed"
    longest = 0.0
    for name, job in jobs:
        begin = time.monotonic()
        if end - begin < longest:
            break
        torch.compiler.reset()
        try:
            found["rows"].append(job())
        except Exception:  # the other cases are worth having; the step fails at its end
            found["failed"][name] = traceback.format_exc().splitlines()[-8:]
        found["left_out"].remove(name)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        longest = max(longest, time.monotonic() - begin)
        report(found)
    for name in found["left_out"]:
        print(f"no time left for {name}", flush=True)
    report(found)
    return not found["failed"] and bool(found["rows"])
