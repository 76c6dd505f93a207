"""`BiasAdversary` on a head that ends in a linear layer, beside the same head with its logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lnl_ext

from .settings import Settings
from .turns import row, take_turns

TITLE = "`BiasAdversary`: forward and backward, for features and head, float32"
NOTES = [
    "`linear` runs the head's last linear layer and the loss as one operation. `logits` is the "
    "general path, for the same head inside a module of its own: forward of the head, the loss on "
    "its logits, and two backward passes through the head.",
    "Cases are (N, D, C); `hidden` has a layer D x D and ReLU before the last one, whose product "
    "the linear operation then makes twice.",
]


class Case(NamedTuple):
    """Features (n, d), classes, and whether there is a hidden layer."""

    n: int
    d: int
    c: int
    hidden: bool = False

    def __str__(self) -> str:
        return f"{self.n}x{self.d}x{self.c}" + (", hidden" if self.hidden else "")


CASES = [
    Case(65536, 512, 12),
    Case(4096, 2048, 64),
    Case(4096, 512, 12, hidden=True),
    Case(2048, 512, 32000, hidden=True),
]
QUICK_CASES = [Case(1024, 64, 12), Case(1024, 64, 12, hidden=True)]
SLOW_LOGITS = 5e7
"""From so many logits on a round takes seconds: one warm-up, a few rounds."""


class WithLogits(nn.Module):
    """A module that `BiasAdversary` does not take apart."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.inside = head

    def forward(self, features: Tensor) -> Tensor:
        """Return the head's logits."""
        logits: Tensor = self.inside(features)
        return logits


def make_head(case: Case) -> nn.Module:
    """Return the head of a case."""
    last = nn.Linear(case.d, case.c)
    if not case.hidden:
        return last
    return nn.Sequential(nn.Linear(case.d, case.d), nn.ReLU(), last)


def step(adversary: lnl_ext.BiasAdversary, features: Tensor, target: Tensor) -> None:
    """Run forward and backward; all gradients are fresh tensors."""
    features.grad = None
    adversary.zero_grad(set_to_none=True)
    loss = adversary(features, target)
    loss.backward()


def make_candidates(case: Case, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return both ways for a case: the same head, features and target."""
    torch.manual_seed(0)
    head = make_head(case).to(device)
    features = torch.randn(case.n, case.d, device=device, requires_grad=True)
    target = torch.randint(case.c, (case.n,), device=device)
    return {
        name: functools.partial(step, lnl_ext.BiasAdversary(module).to(device), features, target)
        for name, module in (("linear", head), ("logits", WithLogits(head)))
    }


def measure(settings: Settings) -> dict[str, Any]:
    """Measure every case."""
    rows = []
    for case in QUICK_CASES if settings.quick else CASES:
        slow = case.n * case.c > SLOW_LOGITS
        times = take_turns(
            make_candidates(case, settings.device),
            settings.device,
            settings.seconds,
            warm_up=1 if slow else 3,
            min_rounds=5,
        )
        rows.append(row(str(case), times, "linear"))
    return {"title": TITLE, "base": "linear", "ratio": "its time over ours", "rows": rows} | {
        "unit": "ms",
        "notes": NOTES,
    }
