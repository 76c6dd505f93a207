"""Schedules: a coefficient as a function of how much of the training is done.

A schedule is evaluated on the host, by ``set_progress`` of the module that it was given to, and
only its value reaches the device. Any function of one float will do; those here are frozen
dataclasses, so that they compare, print and pickle.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable

from lnl_ext.ops.checks import check_number


@runtime_checkable
class Schedule(Protocol):
    """A coefficient as a function of the progress of the training."""

    def __call__(self, progress: float, /) -> float:
        """Return the coefficient, a finite number >= 0, at ``progress`` in [0, 1]."""
        ...


@dataclasses.dataclass(frozen=True)
class Linear:
    """A line from `start` to `end` between two points of the training, constant outside.

    Parameters
    ----------
    end
        The value from `finish` on.
    start
        The value until `begin`.
    begin
        Where the line begins, at least 0.
    finish
        Where it ends, above `begin` and at most 1.
    """

    end: float = 1.0
    start: float = 0.0
    begin: float = 0.0
    finish: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values that are not finite numbers >= 0."""
        check_number("end", self.end)
        check_number("start", self.start)
        if not 0.0 <= self.begin < self.finish <= 1.0:
            raise ValueError(
                f"begin is {self.begin} and finish is {self.finish}, "
                "expected 0 <= begin < finish <= 1"
            )

    def __call__(self, progress: float, /) -> float:
        """Return the value on the line."""
        part = min(max((progress - self.begin) / (self.finish - self.begin), 0.0), 1.0)
        return self.start + part * (self.end - self.start)


@dataclasses.dataclass(frozen=True)
class Ramp:
    """``maximum * (2 / (1 + exp(-steepness * t)) - 1)``: steep at first, then level.

    With the defaults the ramp of Ganin and Lempitsky (2015, arXiv 1409.7495, section 4). By the
    name "ramp" its maximum is the default of the argument that it is given for.

    Parameters
    ----------
    maximum
        What it approaches; it is within 1e-4 of it at the end, with the default steepness.
    steepness
        Theirs is 10.
    """

    maximum: float = 1.0
    steepness: float = 10.0

    def __post_init__(self) -> None:
        """Refuse values that are not finite numbers >= 0."""
        check_number("maximum", self.maximum)
        check_number("steepness", self.steepness)

    def __call__(self, progress: float, /) -> float:
        """Return the value on the ramp."""
        # The same function as in the docstring, without its cancellation near 0.
        return self.maximum * math.tanh(0.5 * self.steepness * progress)


SCHEDULES: dict[str, type[Linear] | type[Ramp]] = {"linear": Linear, "ramp": Ramp}
"""The schedules by name. By name they rise from 0 to the default of what they are given for."""


def as_schedule(name: str, value: str | Schedule, full: float | None) -> Schedule:
    """Return the schedule that `value` is or names.

    Parameters
    ----------
    name
        The argument's name, for the message.
    value
        A schedule, or the name of one in `SCHEDULES`.
    full
        What a schedule given by name rises to; None if there is no such value.

    Raises
    ------
    ValueError
        There is no schedule of that name, or nothing for it to rise to.
    """
    if not isinstance(value, str):
        return value
    if value not in SCHEDULES:
        raise ValueError(f"{name} is {value!r}, expected a schedule: one of {', '.join(SCHEDULES)}")
    if full is None:
        raise ValueError(
            f"{name} is {value!r}, and has no default to rise to: give a schedule with a value, "
            "such as lnl_ext.schedules.Ramp(0.1)"
        )
    return SCHEDULES[value](full)


def evaluate(name: str, schedule: Schedule, progress: float) -> float:
    """Return the value of `schedule` at `progress`, or refuse it if it is not a finite number >= 0.

    Parameters
    ----------
    name
        What the schedule is for, for the message.
    schedule
        The schedule.
    progress
        In [0, 1].
    """
    value = schedule(progress)
    check_number(f"{name} scheduled at progress {progress:g}", value)
    return float(value)


def check_progress(progress: float) -> float:
    """Return `progress` as a float, or refuse one outside [0, 1]."""
    value = float(progress)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"progress is {value}, expected a number in [0, 1]")
    return value
