"""What a training run is made of, as plain data that can be stored and compared."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, TypeVar

from lnl_ext.training.optimizers import (
    OptimizerConfig,
    check_choice,
    check_flag,
    check_number,
    check_whole,
)

_Config = TypeVar("_Config", "OptimizerConfig", "TrainerConfig")
_UPDATES = ("joint", "two_step")
_AMP = (None, "bfloat16", "float16")


class Stage(NamedTuple):
    """A part of a run: its name, its first step and its length in steps."""

    name: Literal["pretrain", "train"]
    first: int
    steps: int


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """Everything that decides the weights a run ends with, besides its modules and its data.

    An epoch is one pass over the batches; epochs may be fractions.

    Attributes
    ----------
    epochs : float
        Length of the training stage, > 0.
    pretrain_epochs : float
        Length of the stage before it, in which the adversaries' heads learn on detached
        features and the features see the task loss only.
    update : {"joint", "two_step"}
        One forward and one backward per batch, or the procedure of the paper's authors
        (:mod:`lnl_ext.training.updates`).
    ramp_steps : int or None
        Steps of the training stage after which the adversaries' progress t has gone from 0 to 1;
        None: the whole stage.
    optimizer : OptimizerConfig
        For the features and the classifier.
    classifier_rate : float
        The classifier's learning rate as a multiple of the features', > 0.
    head_optimizer : OptimizerConfig
        For the heads of the adversaries.
    average_decay : float or None
        Keep an exponential moving average of features and classifier (weights and buffers) over
        the steps of the training stage, with this decay in [0, 1); evaluation then uses it.
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
    pretrain_epochs: float = 0.0
    update: Literal["joint", "two_step"] = "joint"
    ramp_steps: int | None = None
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    classifier_rate: float = 1.0
    head_optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    average_decay: float | None = None
    seed: int = 0
    channels_last: bool = False
    amp: Literal["bfloat16", "float16"] | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        check_number("epochs", self.epochs, 0, strictly=True)
        check_number("pretrain_epochs", self.pretrain_epochs, 0)
        check_choice("update", self.update, _UPDATES)
        if self.ramp_steps is not None:
            check_whole("ramp_steps", self.ramp_steps, 1)
        for name in ("optimizer", "head_optimizer"):
            if not isinstance(getattr(self, name), OptimizerConfig):
                raise TypeError(
                    f"{name} must be an OptimizerConfig, got {type(getattr(self, name)).__name__}"
                )
        if self.average_decay is not None:
            check_number("average_decay", self.average_decay, 0)
            if self.average_decay >= 1:
                raise ValueError(f"average_decay must be < 1, got {self.average_decay!r}")
        check_number("classifier_rate", self.classifier_rate, 0, strictly=True)
        check_whole("seed", self.seed, 0)
        if self.seed >= 2**32:  # numpy.random.seed takes no more
            raise ValueError(f"seed must be < 2**32, got {self.seed}")
        check_flag("channels_last", self.channels_last)
        check_choice("amp", self.amp, _AMP)
        check_flag("compile", self.compile)

    def stages(self, steps_per_epoch: int) -> list[Stage]:
        """Return the stages that have steps, in order; the last is the training stage."""
        # Rounded first: 2/3 of an epoch of 3 steps is 2 steps, whatever the last binary digit says.
        pretrain = math.ceil(round(self.pretrain_epochs * steps_per_epoch, 6))
        train = max(1, math.ceil(round(self.epochs * steps_per_epoch, 6)))
        stages = [Stage("pretrain", 0, pretrain), Stage("train", pretrain, train)]
        return [stage for stage in stages if stage.steps]

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested plain containers, fit for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainerConfig:
        """Build a configuration from what :meth:`to_dict` returned.

        Raises
        ------
        ValueError
            For a name that is not a field.
        """
        values = dict(values)
        for name in ("optimizer", "head_optimizer"):
            if isinstance(values.get(name), dict):
                values[name] = _construct(OptimizerConfig, values[name], prefix=f"{name}.")
        return _construct(cls, values)


def _construct(cls: type[_Config], values: dict[str, Any], prefix: str = "") -> _Config:
    fields = [field.name for field in dataclasses.fields(cls)]
    unknown = [prefix + name for name in values if name not in fields]
    if unknown:
        raise ValueError(
            f"no such configuration field: {', '.join(unknown)} (there are {', '.join(fields)})"
        )
    return cls(**values)


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
