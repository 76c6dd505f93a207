"""Time against the number of samples, of classes and of threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from . import linear, losses
from .settings import Settings
from .turns import row, take_turns

TITLE = "Time against N, C and threads, forward and backward, float32"
NOTES = [
    "`loss` is `fused_bias_loss`, `linear` is `fused_linear_bias_loss`. Plain PyTorch beside "
    "them; `torch.compile`, which compiles every shape for itself, is in the tables above. "
    "`exp` is the loss's floor, `products` the linear one's.",
]
Sweep = tuple[str, list[tuple[int, dict[str, Callable[[], object]]]]]
ELEMENTS = 2**20  # of the logits where C varies
WIDTH = 512  # of the features


def _loss(n: int, c: int, device: torch.device) -> dict[str, Callable[[], object]]:
    logits, target = losses.make_inputs((n, c), device)
    return {
        "fused": lambda: losses.step(losses.fused_loss, logits, target),
        "eager": lambda: losses.step(losses.plain_loss, logits, target),
        "exp": lambda: torch.exp(logits.detach()),
    }


def _linear(n: int, c: int, device: torch.device) -> dict[str, Callable[[], object]]:
    inputs = linear.make_inputs(linear.Case(n, WIDTH, c), device)
    return {
        "fused": lambda: linear.step(linear.fused, inputs),
        "eager": lambda: linear.step(linear.eager, inputs),
        "products": linear.floors(inputs)["products"],
    }


def _with_threads(
    candidates: dict[str, Callable[[], object]], threads: int
) -> dict[str, Callable[[], object]]:
    def bound(run: Callable[[], object]) -> Callable[[], object]:
        def timed() -> object:
            torch.set_num_threads(threads)
            return run()

        return timed

    return {name: bound(run) for name, run in candidates.items()}


def sweeps(settings: Settings) -> list[Sweep]:
    """Return every panel's points, each with its candidates."""
    device, quick = settings.device, settings.quick
    samples = [256, 1024] if quick else [2**k for k in range(8, 21, 2)]
    rows = [64, 256] if quick else [2**k for k in range(8, 17, 2)]
    classes = [2, 64] if quick else [2, 4, 8, 16, 64, 256, 1024, 4096, 32768, 262144]
    result: list[Sweep] = [
        ("loss: N, C = 12", [(n, _loss(n, 12, device)) for n in samples]),
        (
            "loss: C, N x C = 2^20",
            [(c, _loss(max(1, ELEMENTS // c), c, device)) for c in classes],
        ),
        ("linear: N, D = 512, C = 12", [(n, _linear(n, 12, device)) for n in rows]),
    ]
    if device.type == "cpu":
        counts = sorted({1, settings.threads, *_powers(os.cpu_count() or 1)})
        for name, make, n in (("loss", _loss, 65536), ("linear", _linear, 16384)):
            shared = make(256 if quick else n, 12, device)
            points = [(count, _with_threads(shared, count)) for count in counts]
            result.append((f"{name}: threads, N = {256 if quick else n}, C = 12", points))
    return result


def _powers(limit: int) -> list[int]:
    return [2**k for k in range(limit.bit_length()) if 2**k <= limit]


def measure(settings: Settings) -> dict[str, Any]:
    """Measure every point."""
    rows = []
    for panel, points in sweeps(settings):
        for x, candidates in points:
            times = take_turns(candidates, settings.device, settings.seconds / 8)
            rows.append({"panel": panel, "x": x} | row(f"{panel}: {x}", times, "fused"))
    torch.set_num_threads(settings.threads)
    return {"title": TITLE, "base": "fused", "ratio": "its time over ours", "rows": rows} | {
        "unit": "ms",
        "notes": NOTES,
    }
