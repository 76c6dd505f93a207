"""The bias loss of given logits: ours, plain PyTorch, torch.compile, and the floor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import lnl_ext

from .settings import Settings
from .turns import row, take_turns

ENTROPY_WEIGHT = 0.01
SHAPES = [(384, 8, 14, 14), (65536, 12), (4096, 1000), (2048, 32000), (16, 8, 224, 224)]
SMALL_SHAPES = [(256, 12), (4, 12)]
QUICK_SHAPES = [(16, 8, 14, 14), (4096, 12)]
TITLE = "`fused_bias_loss`, forward and backward, float32"
NOTES = [
    "`eager` and `compile` are `log_softmax`, `cross_entropy` and the entropy's sum in plain "
    "PyTorch, as it is and under `torch.compile`. The floor has two parts: `exp` is `torch.exp` "
    "of the logits into a new tensor, one read, one write and one exponential an element, which "
    "is the least this loss can do; `copy` is the bytes alone, into a tensor that exists.",
]

SMALL_TITLE = "A small `fused_bias_loss`, forward and backward, float32"
SMALL_NOTES = [
    "What a call costs whatever its size, beside PyTorch's own loss, which has no entropy and no "
    "reversal layer. `4x12` has hardly an element to compute. With AVX-512 torch's `log_softmax` "
    "is slow for rows of fewer than 16 classes: `256x12` looks better there than with AVX2.",
]

Loss = Callable[[Tensor, Tensor], Tensor]


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy minus weighted entropy, as one writes it in PyTorch."""
    log_p = functional.log_softmax(logits, dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1).mean()
    return functional.cross_entropy(logits, target) - ENTROPY_WEIGHT * entropy


def fused_loss(logits: Tensor, target: Tensor, reversal: float | None = None) -> Tensor:
    """Return the same value from the fused kernel."""
    return lnl_ext.fused_bias_loss(logits, target, entropy_weight=ENTROPY_WEIGHT, reversal=reversal)


def make_loss(name: str) -> Loss:
    """Return the candidate called ``name``: fused, eager or compile."""
    losses: dict[str, Loss] = {"fused": fused_loss, "eager": plain_loss}
    return torch.compile(plain_loss) if name == "compile" else losses[name]


def make_inputs(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return random logits of ``shape`` (N, C, *S), which want a gradient, and their target."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).to(device).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator).to(device)
    return logits, target


def step(loss: Loss, logits: Tensor, target: Tensor) -> None:
    """Run forward and backward; the gradient is a fresh tensor every time."""
    logits.grad = None
    loss(logits, target).backward()  # type: ignore[no-untyped-call]


def measure(settings: Settings) -> dict[str, Any]:
    """Measure every shape, after a check that the candidates compute the same."""
    rows: list[dict[str, Any]] = []
    for shape in QUICK_SHAPES if settings.quick else SHAPES:
        torch.compiler.reset()
        logits, target = make_inputs(shape, settings.device)
        torch.testing.assert_close(
            fused_loss(logits, target), plain_loss(logits, target), rtol=1e-5, atol=1e-6
        )
        written = torch.empty_like(logits)
        peers = ["eager"] if settings.quick and rows else ["eager", "compile"]
        candidates: dict[str, Callable[[], object]] = {
            name: functools.partial(step, make_loss(name), logits, target)
            for name in ["fused", *peers]
        }
        candidates["exp"] = functools.partial(torch.exp, logits.detach())
        candidates["copy"] = functools.partial(written.copy_, logits.detach())
        times = take_turns(candidates, settings.device, settings.seconds)
        rows.append(row("x".join(map(str, shape)), times, "fused"))
    return {"title": TITLE, "base": "fused", "ratio": "its time over ours", "rows": rows} | {
        "unit": "ms",
        "notes": NOTES,
    }


def measure_small(settings: Settings) -> dict[str, Any]:
    """Measure the fixed cost of a call."""
    rows: list[dict[str, Any]] = []
    for shape in SMALL_SHAPES:
        logits, target = make_inputs(shape, settings.device)
        losses: dict[str, Loss] = {
            "fused": fused_loss,
            "fused, reversal": functools.partial(fused_loss, reversal=0.1),
            "cross_entropy": functional.cross_entropy,
        }
        candidates = {
            name: functools.partial(step, loss, logits, target) for name, loss in losses.items()
        }
        times = take_turns(candidates, settings.device, settings.seconds, warm_up=100)
        rows.append(row("x".join(map(str, shape)), times, "cross_entropy"))
    return {"title": SMALL_TITLE, "base": "cross_entropy", "rows": rows} | {
        "ratio": "its time over that of `F.cross_entropy`",
        "unit": "ms",
        "notes": SMALL_NOTES,
    }
