"""One optimiser and its learning rate schedule as plain data, and how they are built."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

_OPTIMIZERS = ("adam", "adamw", "sgd")
_SCHEDULES = ("constant", "cosine", "step")


def check_number(name: str, value: Any, low: float, *, strictly: bool = False) -> None:
    """Refuse anything but a finite number that is at least ``low`` (above it if ``strictly``)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < low or (strictly and value == low):
        bound = f"> {low}" if strictly else f">= {low}"
        raise ValueError(f"{name} must be finite and {bound}, got {value!r}")


def check_whole(name: str, value: Any, low: int) -> None:
    """Refuse anything but an integer that is at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a value that is not among ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Refuse anything but a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """One optimiser of ``torch.optim`` and how its learning rate moves.

    Attributes
    ----------
    name : {"adam", "adamw", "sgd"}
        The optimiser.
    learning_rate : float
        Initial learning rate, > 0.
    weight_decay : float
        As in ``torch.optim``, >= 0.
    momentum : float
        For ``"sgd"`` only, in [0, 1).
    betas : tuple of two floats
        For ``"adam"`` and ``"adamw"``, each in [0, 1).
    schedule : {"constant", "cosine", "step"}
        The learning rate over the steps of the training stage (it stays at its initial value in
        the pretraining stage): unchanged, half a cosine down to ``final_rate`` at the last step,
        or ``StepLR``.
    final_rate : float
        ``"cosine"`` only: the learning rate at the end, >= 0.
    decay_epochs : float
        ``"step"`` only: multiply the learning rate by ``decay_factor`` every so many epochs.
    decay_factor : float
        ``"step"`` only, > 0.
    """

    name: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "cosine", "step"] = "constant"
    final_rate: float = 0.0
    decay_epochs: float = 40.0
    decay_factor: float = 0.1

    def __post_init__(self) -> None:
        """Check every field."""
        check_choice("name", self.name, _OPTIMIZERS)
        check_number("learning_rate", self.learning_rate, 0, strictly=True)
        check_number("weight_decay", self.weight_decay, 0)
        check_number("momentum", self.momentum, 0)
        if self.momentum >= 1:
            raise ValueError(f"momentum must be < 1, got {self.momentum!r}")
        if self.momentum and self.name != "sgd":
            raise ValueError(f'momentum is for name="sgd"; name="{self.name}" has betas')
        # Checkpoints and TOML files give lists back, and two configurations are compared.
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {self.betas!r}")
        for beta in self.betas:
            check_number("betas", beta, 0)
            if beta >= 1:
                raise ValueError(f"betas must be < 1, got {self.betas!r}")
        check_choice("schedule", self.schedule, _SCHEDULES)
        check_number("final_rate", self.final_rate, 0)
        check_number("decay_epochs", self.decay_epochs, 0, strictly=True)
        check_number("decay_factor", self.decay_factor, 0, strictly=True)

    def build(self, *groups: Iterable[Tensor], rates: Sequence[float] = (1.0,)) -> Optimizer:
        """Return the optimiser for groups of parameters.

        Parameters
        ----------
        *groups
            The parameters; an empty group is left out.
        rates
            For every group its multiple of ``learning_rate``, and so of ``final_rate``.
        """
        rate, decay = self.learning_rate, self.weight_decay
        given: list[dict[str, Any]] = [
            {"params": list(group), "lr": rate * factor}
            for group, factor in zip(groups, rates, strict=True)
        ]
        given = [group for group in given if group["params"]]
        parameters = itertools.chain.from_iterable(group["params"] for group in given)
        # One kernel for all parameters; a third of the time of the default on the CPU.
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
        if self.name == "sgd":
            return torch.optim.SGD(
                given, rate, momentum=self.momentum, weight_decay=decay, fused=fused
            )
        kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
        return kind(given, rate, betas=self.betas, weight_decay=decay, fused=fused)

    def build_scheduler(
        self, optimizer: Optimizer, steps: int, steps_per_epoch: int
    ) -> lr_scheduler.LRScheduler:
        """Return the schedule, to be stepped once per step of a stage of ``steps`` steps."""
        if self.schedule == "cosine":
            # Not CosineAnnealingLR, which takes groups of different rates to one final rate.
            final = self.final_rate / self.learning_rate

            def part(step: int) -> float:
                return final + (1 - final) * (1 + math.cos(math.pi * step / steps)) / 2

            return lr_scheduler.LambdaLR(optimizer, part)
        if self.schedule == "step":
            every = max(1, round(self.decay_epochs * steps_per_epoch))
            return lr_scheduler.StepLR(optimizer, every, gamma=self.decay_factor)
        return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
