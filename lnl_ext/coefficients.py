"""Coefficients of a loss that live in a module's buffers, where schedules can change them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lnl_ext.ops.checks import check_coefficient, check_number
from lnl_ext.ops.loss_arguments import Coefficient
from lnl_ext.schedules import Schedule, as_schedule, check_progress, evaluate


class ScheduledCoefficients(nn.Module):
    """A module whose coefficients are 0-dim persistent buffers.

    A forward pass that reads only the buffers needs no new compilation when a value changes, and a
    checkpoint holds what the schedules have come to. The buffers follow the module to its device
    and keep their float64 (float32 where the device has no float64), so that ``module.half()`` does
    not round a coefficient.
    """

    def __init__(self) -> None:
        super().__init__()
        self._coefficients: list[str] = []
        self._schedules: dict[str, Schedule] = {}
        self._numbers: dict[str, float] = {}
        self._absent: list[str] = []

    def register_coefficient(
        self,
        name: str,
        value: Coefficient | Schedule | str,
        *,
        full: float | None = None,
        absent_if_zero: bool = False,
    ) -> None:
        """Make `value` the buffer `name`.

        Parameters
        ----------
        name
            The buffer's name, and the argument's in messages.
        value
            A finite number >= 0; a 0-dim floating-point tensor, which becomes the buffer itself; or
            a schedule or its name, which starts at progress 0.
        full
            Where a schedule given by name ends; None if it must not be given by name.
        absent_if_zero
            The number 0 means that the module leaves the coefficient's term out. The value is then
            no buffer that a device, a process group or an average of weights could write to, but
            stands in the state_dict as one would. It is always 0: `check_absent`.
        """
        # Buffers of a module that is made under inference_mode can be written to in training.
        with torch.inference_mode(False):
            if isinstance(value, str) or (callable(value) and not isinstance(value, Tensor)):
                self._schedules[name] = as_schedule(name, value, full)
                start = evaluate(name, self._schedules[name], 0.0)
                buffer = torch.tensor(start, dtype=torch.float64)
            elif isinstance(value, Tensor):
                check_coefficient(name, value, value.device)
                buffer = value
            else:
                check_number(name, value)
                device = None
                if absent_if_zero and value == 0:
                    self._absent.append(name)
                    device = "cpu"
                buffer = torch.tensor(float(value), dtype=torch.float64, device=device)
                self._numbers[name] = float(value)
        self._coefficients.append(name)
        if name in self._absent:
            setattr(self, name, buffer)
        else:
            self.register_buffer(name, buffer)

    def set_progress(self, progress: float, *, strength: float | None = None) -> None:
        """Evaluate the schedules and write their values into the buffers.

        Parameters
        ----------
        progress
            How much of the training is done, in [0, 1].
        strength
            A factor >= 0 of these values. With one, the coefficients that were given as numbers
            are written as well, as multiples of these numbers.

        Raises
        ------
        ValueError
            `progress` is outside [0, 1], or a schedule gives a negative or infinite value.
        """
        progress = check_progress(progress)
        values = {
            name: evaluate(name, schedule, progress) for name, schedule in self._schedules.items()
        }
        if strength is not None:
            check_number("strength", strength)
            values |= {n: v for n, v in self._numbers.items() if n not in self._absent}
            values = {name: strength * value for name, value in values.items()}
        for name, value in values.items():
            self.get_buffer(name).fill_(value)

    def coefficient_names(self) -> tuple[str, ...]:
        """Return the names of the coefficients."""
        return tuple(self._coefficients)

    def final(self, name: str) -> float:
        """Return a coefficient's value at the end of the training, as it was given."""
        if name in self._schedules:
            return evaluate(name, self._schedules[name], 1.0)
        if name in self._numbers:
            return self._numbers[name]
        return float(self.get_buffer(name))

    def known_zero(self, name: str) -> bool:
        """Whether the coefficient was given as the number 0, which leaves its term out."""
        return name in self._absent

    def check_absent(self) -> None:
        """Raise if a value that was given as the number 0 was written to.

        It is not read in a graph of torch.compile, which could not raise.

        Raises
        ------
        RuntimeError
            One is not 0 any more.
        """
        if torch.compiler.is_compiling():
            return
        for name in self._absent:
            value = getattr(self, name).item()  # on the CPU: no device is waited for
            if value != 0:
                raise RuntimeError(_written(name, value))

    def extra_repr(self) -> str:
        """Show the coefficients and schedules."""
        parts = []
        for name in self._coefficients:
            buffer: Tensor = getattr(self, name)
            value: object = self._schedules.get(name)
            if value is None:
                value = "meta" if buffer.is_meta else f"{buffer.item():g}"
            parts.append(f"{name}={value}")
        return ", ".join(parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        buffers = [name for name in self._coefficients if name not in self._absent]
        held = {name: self._buffers.pop(name) for name in buffers}
        try:
            result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(held)
        for name in buffers:
            buffer = self.get_buffer(name)
            device = fn(torch.empty(0, device=buffer.device)).device
            dtype = torch.float32 if device.type == "mps" else buffer.dtype
            if buffer.is_meta:
                buffer = torch.empty_like(buffer, device=device, dtype=dtype)
            else:
                buffer = buffer.to(device=device, dtype=dtype)
            self._buffers[name] = buffer
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._absent:
            destination[prefix + name] = getattr(self, name)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in self._absent:
            value = state_dict.pop(prefix + name, None)
            if value is None:
                if strict:
                    missing_keys.append(prefix + name)
            elif not value.is_meta and value.item() != 0:
                error_msgs.append(_written(name, value.item()))
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )


def _written(name: str, value: float) -> str:
    return (
        f"{name} is {value:g}, but the module was made with the number 0, which leaves the term "
        f"out: make it with {name}=torch.tensor(0.0) or a schedule, to give it a value later"
    )
