"""What a training run is made of, as plain data that can be stored and compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from lnl_ext.ops.checks import check_number
from lnl_ext.schedules import Schedule, as_schedule, evaluate

_OPTIMIZERS = ("adam", "adamw", "sgd")
_SCHEDULES = ("constant", "cosine", "step")
_UPDATES = ("joint", "two_step")
_AMP = (None, "bfloat16", "float16")


def _check_whole(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected an integer")
    if value < low:
        raise ValueError(f"{name} is {value}, expected an integer >= {low}")


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected True or False")


def _check_below_one(name: str, value: Any) -> None:
    check_number(name, value)
    if value >= 1:
        raise ValueError(f"{name} is {value!r}, expected a number < 1")


def _plain(config: Any, *names: str, positive: bool = False) -> None:
    """Check fields that are numbers; NumPy's become Python's, which checkpoints hold."""
    for name in names:
        value = getattr(config, name)
        check_number(name, value, positive=positive)
        if type(value) not in (int, float):
            object.__setattr__(config, name, float(value))


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
        The learning rate over the steps of the run: unchanged, half a cosine down to
        ``final_rate`` at the last step, or ``StepLR``.
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
        _check_choice("name", self.name, _OPTIMIZERS)
        _plain(self, "weight_decay", "momentum", "final_rate")
        _plain(self, "learning_rate", "decay_epochs", "decay_factor", positive=True)
        _check_below_one("momentum", self.momentum)
        if self.momentum and self.name != "sgd":
            raise ValueError(f'momentum is for name="sgd"; name="{self.name}" has betas')
        if len(self.betas) != 2:
            raise ValueError(f"betas is {self.betas!r}, expected two numbers")
        for beta in self.betas:
            _check_below_one("betas", beta)
        # Checkpoints and TOML files give lists back, and two configurations are compared.
        object.__setattr__(self, "betas", tuple(float(beta) for beta in self.betas))
        _check_choice("schedule", self.schedule, _SCHEDULES)

    def build(self, parameters: Iterable[Tensor]) -> Optimizer:
        """Return the optimiser of ``parameters``."""
        parameters = list(parameters)
        rate, decay = self.learning_rate, self.weight_decay
        # One kernel for all parameters; a third of the time of the default on the CPU.
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
        if self.name == "sgd":
            return torch.optim.SGD(
                parameters, rate, momentum=self.momentum, weight_decay=decay, fused=fused
            )
        kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
        return kind(parameters, rate, betas=self.betas, weight_decay=decay, fused=fused)

    def build_scheduler(
        self, optimizer: Optimizer, steps: int, steps_per_epoch: int
    ) -> lr_scheduler.LRScheduler:
        """Return the schedule, to be stepped once per step of a stage of ``steps`` steps."""
        if self.schedule == "cosine":
            final = self.final_rate / self.learning_rate

            def part(step: int) -> float:
                return final + (1 - final) * (1 + math.cos(math.pi * step / steps)) / 2

            return lr_scheduler.LambdaLR(optimizer, part)
        if self.schedule == "step":
            every = max(1, round(self.decay_epochs * steps_per_epoch))
            return lr_scheduler.StepLR(optimizer, every, gamma=self.decay_factor)
        return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """Everything that decides the weights a run ends with, besides its modules and its data.

    An epoch is one pass over the batches; epochs may be fractions.

    Attributes
    ----------
    epochs : float
        Length of the run, > 0.
    update : {"joint", "two_step"}
        One forward and one backward per batch, or the procedure of the paper's authors
        (:mod:`lnl_ext.training.updates`).
    accumulate : int
        Batches per step, >= 1: their gradients add up to those of one batch of all their samples,
        also where targets are ignored. The last step of an epoch takes what is left. Batch norm in
        training mode still normalises each batch by itself.
    clip_norm : float or None
        Scale the gradients of a step down to this norm, > 0: those of features and classifier
        together, and those of the heads together, so that neither takes the other's room.
    strength : float, schedule or its name
        Factor, >= 0, of every adversary's coefficients: a number, or a schedule of
        `lnl_ext.schedules` (or another frozen dataclass that is one) over the steps of the run; by
        name it rises from 0 to 1. Coefficients that were given to `BiasAdversary` as 0-dim tensors
        are the caller's, and are left alone. Where it is 0, as at the beginning of
        ``Linear(begin=0.1, finish=0.6)``, the heads learn on detached features, and the features
        see the task loss only.
    head_steps : int
        Further steps of the heads after every step, >= 0, each on the detached features of one of
        the last 8 steps, drawn at random. They need no forward of the features: a head near its
        optimum is what makes unlearning real. A checkpoint holds these features.
    balance : bool or float
        Draw batches with replacement. True or 1: so that all groups of label and bias are as
        frequent (`lnl_ext.training.balance.balanced_weights`). A number between 0 and 1: with these
        weights to that power, so that small groups are repeated less often. `TensorBatches` are
        balanced by the trainer over all their integer bias targets of shape (N,) or (N, K); a
        DataLoader must have a sampler with weights.
    adjust : bool
        Take what the bias says about the label in what is drawn out of the losses: by an addition
        to the logits in the task loss, and by weights of the samples for the heads
        (`lnl_ext.training.balance.draws`). `TensorBatches` get the targets for it from the trainer,
        a DataLoader must give them.
    optimizer : OptimizerConfig
        For the features and the classifier.
    head_optimizer : OptimizerConfig
        For the heads of the adversaries.
    average_decay : float or None
        Keep an exponential moving average of features and classifier (weights and buffers) over
        the steps of the run, with this decay in [0, 1); evaluation then uses it.
    seed : int
        Seeds Python's, NumPy's and torch's generators and the order of the batches when the run
        starts.
    channels_last : bool
        Keep modules and images in the channels_last memory format.
    amp : {None, "bfloat16", "float16"}
        Run forward passes under ``torch.autocast`` with this dtype; float16 scales the loss.
    compile : bool
        Compile the computation of the losses with ``torch.compile``.
    """

    epochs: float = 1.0
    update: Literal["joint", "two_step"] = "joint"
    accumulate: int = 1
    clip_norm: float | None = None
    strength: float | Schedule | str = 1.0
    head_steps: int = 0
    balance: bool | float = False
    adjust: bool = False
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    head_optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    average_decay: float | None = None
    seed: int = 0
    channels_last: bool = False
    amp: Literal["bfloat16", "float16"] | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        _plain(self, "epochs", positive=True)
        _check_choice("update", self.update, _UPDATES)
        _check_whole("accumulate", self.accumulate, 1)
        if self.clip_norm is not None:
            _plain(self, "clip_norm", positive=True)
        self._check_strength()
        _check_whole("head_steps", self.head_steps, 0)
        if not isinstance(self.balance, bool):
            _plain(self, "balance")
            if self.balance > 1:
                raise ValueError(f"balance is {self.balance!r}, expected a number from 0 to 1")
        _check_flag("adjust", self.adjust)
        for name in ("optimizer", "head_optimizer"):
            given = getattr(self, name)
            if not isinstance(given, OptimizerConfig):
                raise TypeError(f"{name} is {given!r}, expected an OptimizerConfig")
        if self.average_decay is not None:
            _plain(self, "average_decay")
            _check_below_one("average_decay", self.average_decay)
        _check_whole("seed", self.seed, 0)
        if self.seed >= 2**32:  # numpy.random.seed takes no more
            raise ValueError(f"seed is {self.seed}, expected an integer < 2**32")
        _check_flag("channels_last", self.channels_last)
        _check_choice("amp", self.amp, _AMP)
        _check_flag("compile", self.compile)

    def _check_strength(self) -> None:
        if isinstance(self.strength, str):
            object.__setattr__(self, "strength", as_schedule("strength", self.strength, 1.0))
        elif not dataclasses.is_dataclass(self.strength):
            _plain(self, "strength")  # a function could not be compared when a run resumes

    def strength_at(self, progress: float) -> float:
        """Return the factor of the adversaries' coefficients at ``progress`` in [0, 1]."""
        if callable(self.strength):
            return evaluate("strength", self.strength, progress)
        return cast(float, self.strength)

    def steps(self, steps_per_epoch: int) -> int:
        """Return the length of the run in steps."""
        # Rounded first: 2/3 of an epoch of 3 steps is 2 steps, whatever the last binary digit says.
        return max(1, math.ceil(round(self.epochs * steps_per_epoch, 6)))

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested plain containers, fit for JSON."""
        return dataclasses.asdict(self)


def changed_fields(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Describe each field in which two :meth:`TrainerConfig.to_dict` results differ."""
    changes = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += changed_fields(before, after, f"{prefix}{name}.")
        elif before != after:
            changes.append(f"{prefix}{name}: {before!r}, now {after!r}")
    return changes
