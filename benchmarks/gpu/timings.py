"""Times of the losses on a GPU against PyTorch, torch.compile and Liger, with the bandwidth."""

from __future__ import annotations

import functools
import importlib.util
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timing import linear, losses, peak, steps
from timing.turns import row, take_turns
from torch import Tensor

from lnl_ext.ops.loss_arguments import LossArguments

from . import checks


class LossCase(NamedTuple):
    """Logits of a shape and dtype, and what is special about the call."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    variant: str = ""

    def __str__(self) -> str:
        name = f"{'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"
        return f"{name}, {self.variant}" if self.variant else name


TWO, FACTOR, SCALER = "two gradients", "2 * loss", "GradScaler"
IGNORED = "a tenth ignored"
LOSS_CASES = (
    LossCase((2**22, 12)),
    LossCase((4096, 8, 14, 14)),
    LossCase((65536, 1000)),
    LossCase((4096, 32000), torch.bfloat16),
    LossCase((2**22, 12), variant=TWO),
    LossCase((4096, 32000), torch.bfloat16, TWO),
    LossCase((2**22, 12), variant=FACTOR),
    LossCase((65536, 1000), torch.float16, SCALER),
    LossCase((4096, 8, 14, 14), variant=IGNORED),
    LossCase((1024, 128256), torch.bfloat16),
    LossCase((2**22, 12), torch.bfloat16),
    LossCase((2**22, 12), torch.float16),
    LossCase((4096, 8, 14, 14), torch.bfloat16),
    LossCase((65536, 1000), torch.bfloat16),
    LossCase((4096, 32000)),
    LossCase((64, 8, 512, 512)),
    LossCase((64, 150, 128, 128)),
    LossCase((1024, 128256), torch.bfloat16, TWO),
    LossCase((384, 8, 14, 14)),
    LossCase((65536, 12)),
)
QUICK_LOSS_CASES = (
    LossCase((4, 8, 3, 3)),
    LossCase((16, 12), torch.bfloat16),
    *(LossCase((16, 12), variant=variant) for variant in (TWO, FACTOR, IGNORED)),
    LossCase((16, 12), torch.float16, SCALER),
)
SCALE = 2.0**16
"""Of GradScaler, as it begins."""
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


def ours(case: LossCase, logits: Tensor, target: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Return forward and backward of our loss, which return the gradients."""
    if case.variant == TWO:
        reversal, entropy_weight = (
            torch.tensor(value, dtype=torch.float64) for value in (0.1, losses.ENTROPY_WEIGHT)
        )
        arguments = LossArguments(target, reversal=reversal, entropy_weight=entropy_weight)

        def both() -> tuple[Tensor, ...]:
            with torch.no_grad():
                made = torch.ops.lnl_ext.bias_loss(logits, *arguments, True, True)
            return made[-2], made[-1]

        return both
    factor = {FACTOR: 2.0, SCALER: SCALE}.get(case.variant, 1.0)

    def run() -> tuple[Tensor, ...]:
        loss = losses.fused_loss(logits, target)
        return torch.autograd.grad(loss if factor == 1.0 else factor * loss, logits)

    return run


def moved_bytes(case: LossCase, logits: Tensor, target: Tensor) -> tuple[int, int]:
    """Return the bytes that have to be moved, and those that our kernels move.

    Logits and labels are read once, and each gradient is written once. Ours read and write again
    where a gradient made in the forward pass meets an upstream factor, or a mean an ignored label.
    """
    size = logits.numel() * logits.element_size()
    labels = target.numel() * target.element_size()
    least = size * (3 if case.variant == TWO else 2) + labels
    if case.variant in (FACTOR, SCALER):
        return least, least + 2 * size
    return least, 2 * least if case.variant == IGNORED else least


def with_graph(
    name: str, run: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> dict[str, Callable[[], object]]:
    """Return a call, and on a GPU its replay from a graph: the time of its kernels alone."""
    candidates: dict[str, Callable[[], object]] = {name: run}
    if device.type == "cuda":
        candidates[f"{name}, graph"], _ = checks.capture(run)
    return candidates


def loss_candidates(
    case: LossCase, logits: Tensor, target: Tensor
) -> dict[str, Callable[[], object]]:
    """Return forward and backward of each way to compute the loss, and a copy of the logits."""

    def plain(z: Tensor) -> Tensor:
        return losses.plain_loss(z.float(), target)

    def both(loss: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(logits), logits)

    written = torch.empty_like(logits)
    candidates = with_graph("fused", ours(case, logits, target), logits.device)
    candidates["copy"] = lambda: written.copy_(logits.detach())
    if case.variant:  # their kernels' time is another case's; this is about ours
        return candidates
    candidates["eager"] = both(plain)
    candidates["compile"] = both(torch.compile(plain, dynamic=False))
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


def time_loss(case: LossCase, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time all ways on logits of one shape."""
    shape = case.shape
    logits = torch.randn(shape, device=device).to(case.dtype).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    few = logits.detach()[:8]
    torch.testing.assert_close(
        losses.fused_loss(few, target[:8]),
        losses.plain_loss(few.float(), target[:8]),
        rtol=1e-4,
        atol=1e-4,
    )
    if case.variant == IGNORED:
        target[torch.rand(target.shape, device=device) < 0.1] = LossArguments(target).ignore_index
    times = take_turns(loss_candidates(case, logits, target), device, seconds)
    size = logits.numel() * logits.element_size()
    least, moved = moved_bytes(case, logits, target)
    return with_bandwidth(row(str(case), times, "fused"), size, least, moved) | {
        "classes": shape[1]
    }


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
    result = with_bandwidth(row(str(case), times, "fused"), size, 2 * size, 2 * size)
    return result | {"classes": case.c, "extra_bytes": memory}


def with_bandwidth(result: dict[str, Any], size: int, least: int, moved: int) -> dict[str, Any]:
    """Add gigabytes a second: ours, of the bytes that we move, and that of a copy of `size` bytes.

    Ours is by the kernels' time where it is known. ``bandwidth`` is ours over the copy's, of the
    same run.
    """
    values = result["values"]
    kernels = values.get("fused, graph", values["fused"])

    def speed(count: int, times: dict[str, float]) -> float:
        return 1e-6 * count / max(times["median"], 1e-5)

    fused, copy = speed(moved, kernels), speed(2 * size, values["copy"])
    return result | {
        "bytes": size,
        "least_bytes": least,
        "moved_bytes": moved,
        "gigabytes_per_second": {"fused": round(fused, 3), "copy": round(copy, 3)},
        "bandwidth": round(fused / copy, 4),
    }


def time_step(device: torch.device, quick: bool, seconds: float) -> dict[str, Any]:
    """Time a training step of coloured MNIST: the authors' procedure and ours, on this device."""
    problem = steps.digits(8 if quick else 128, device)
    times = take_turns(steps.candidates(problem), device, 0.01 if quick else seconds)
    return row(problem.case, times, "authors", base_over=True)


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
        for loss_case in QUICK_LOSS_CASES if quick else LOSS_CASES:
            jobs.append((str(loss_case), functools.partial(time_loss, loss_case, device, each)))
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
