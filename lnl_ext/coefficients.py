"""Coefficients of a loss that live in a module's buffers, where schedules can change them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lnl_ext.ops.arguments import Coefficient
from lnl_ext.ops.checks import check_coefficient, check_number
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
        self._zero_versions: dict[str, int] = {}

    def register_coefficient(self, name: str, value: Coefficient | Schedule | str) -> None:
        """Make `value` the buffer `name`.

        Parameters
        ----------
        name
            The buffer's name, and the argument's in messages.
        value
            A finite number >= 0; a 0-dim floating-point tensor, which becomes the buffer itself; or
            a schedule or its name, which starts at progress 0.
        """
        if isinstance(value, str) or (callable(value) and not isinstance(value, Tensor)):
            self._schedules[name] = as_schedule(name, value)
            buffer = torch.tensor(evaluate(name, self._schedules[name], 0.0), dtype=torch.float64)
        elif isinstance(value, Tensor):
            check_coefficient(name, value, value.device)
            buffer = value
        else:
            check_number(name, value)
            buffer = torch.tensor(float(value), dtype=torch.float64)
        self.register_buffer(name, buffer)
        self._coefficients.append(name)
        if name not in self._schedules and not isinstance(value, Tensor) and value == 0:
            self._zero_versions[name] = buffer._version

    def set_progress(self, progress: float) -> None:
        """Evaluate the schedules and write their values into the buffers.

        Parameters
        ----------
        progress
            How much of the training is done, in [0, 1].

        Raises
        ------
        ValueError
            `progress` is outside [0, 1], or a schedule gives a negative or infinite value.
        """
        progress = check_progress(progress)
        values = {
            name: evaluate(name, schedule, progress) for name, schedule in self._schedules.items()
        }
        for name, value in values.items():
            self.get_buffer(name).fill_(value)

    def coefficient_names(self) -> tuple[str, ...]:
        """Return the names of the buffers that are coefficients."""
        return tuple(self._coefficients)

    def known_zero(self, name: str) -> bool:
        """Whether the coefficient was given as the number 0 and its buffer never written since.

        This is the one question about a value that a forward pass may ask: it reads no data.
        """
        return self._zero_versions.get(name) == self.get_buffer(name)._version

    def extra_repr(self) -> str:
        """Show the coefficients and schedules."""
        parts = []
        for name in self._coefficients:
            buffer = self.get_buffer(name)
            value: object = self._schedules.get(name)
            if value is None:
                value = "meta" if buffer.is_meta else f"{buffer.item():g}"
            parts.append(f"{name}={value}")
        return ", ".join(parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        held = {name: self._buffers.pop(name) for name in self._coefficients}
        try:
            result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(held)
        for name in self._coefficients:
            buffer = self.get_buffer(name)
            known_zero = self.known_zero(name)
            device = fn(torch.empty(0, device=buffer.device)).device
            dtype = torch.float32 if device.type == "mps" else buffer.dtype
            if buffer.is_meta:
                buffer = torch.empty_like(buffer, device=device, dtype=dtype)
            else:
                buffer = buffer.to(device=device, dtype=dtype)
            self._buffers[name] = buffer
            if known_zero:
                self._zero_versions[name] = buffer._version
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._find_zeros()

    def __setstate__(self, state: Any) -> None:
        """Restore a pickled or copied module."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._find_zeros()

    def _find_zeros(self) -> None:
        """Look, after all values were written at once, which of the known zeros still are."""
        for name in self._zero_versions:
            buffer = self.get_buffer(name)
            still_zero = not buffer.is_meta and buffer.item() == 0
            self._zero_versions[name] = buffer._version if still_zero else -1
