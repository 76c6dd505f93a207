"""What ends a run from outside: signals, and the loss of a process that reads images."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader

from lnl_ext.training.batches import Batch

__all__ = [
    "Interrupted",
    "LostWorkerError",
    "StopSignals",
    "StoppableBatches",
    "naming_lost_workers",
]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):  # noqa: N818 - no error, but what was asked for
    """A run was ended by a signal.

    Attributes
    ----------
    signal : signal.Signals
    """

    def __init__(self, number: signal.Signals, message: str = "") -> None:
        super().__init__(message)
        self.signal = number


class LostWorkerError(RuntimeError):
    """A process that reads images was killed."""


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Turn the error of a loader whose worker was killed into one that says what to do.

    Raises
    ------
    LostWorkerError
    """
    try:
        yield
    except RuntimeError as error:
        # No type of its own; what a worker itself raises begins otherwise.
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise LostWorkerError(
            "a process that reads images was killed, most often as the memory was used up: give "
            "fewer --workers or a smaller --image-size. A run of lnl train resumes from its last "
            f"checkpoint with --resume ({str(error).splitlines()[0].strip()})"
        ) from error


class StopSignals:
    """Within it, SIGINT (Ctrl-C) and SIGTERM are noted; a second one interrupts at once.

    Parameters
    ----------
    at_once
        Raise `Interrupted` where the signal comes, instead.

    Attributes
    ----------
    received : signal.Signals or None
        The first one.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self._at_once = at_once
        self.received: signal.Signals | None = None
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        """Take over the signals."""
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put back what handled them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that decodes images: this process ends it
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if self._at_once:
            raise Interrupted(self.received)


class StoppableBatches:
    """The batches of a loader, until a signal comes.

    Parameters
    ----------
    batches
        A loader.
    signals
        What to look at before every batch.

    Attributes
    ----------
    generator : torch.Generator or None
        That of the loader.
    weights : Tensor or None
        Those of its sampler.
    """

    def __init__(self, batches: DataLoader[Any], signals: StopSignals) -> None:
        self.generator: torch.Generator | None = batches.generator
        self.weights = getattr(batches.batch_sampler, "weights", None)
        self._batches: Iterable[Batch] = batches
        self._length = len(batches)
        self._signals = signals

    def __len__(self) -> int:
        """Return the number of batches."""
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        """Begin a pass.

        Raises
        ------
        Interrupted
            A signal came. Nothing has been drawn from the generator for the batch to come.
        """
        self._check()
        for batch in self._batches:
            yield batch
            self._check()

    def _check(self) -> None:
        if self._signals.received is not None:
            raise Interrupted(self._signals.received)
