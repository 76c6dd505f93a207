"""Where the metrics of a run go: running means, JSON lines, trackers, a progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from lnl_ext.files import finite_or_none, write_whole
from lnl_ext.training.checkpoint import NonFiniteError
from lnl_ext.training.denominators import Term
from lnl_ext.training.distributed import sum_over_processes

Record = dict[str, Any]
"""Figures and names, with the ``kind`` of the record ("epoch" or "step") and its ``step``."""

Tracker = Callable[[Record], object]
"""Called with every record as soon as there is one; what it returns is not used."""

METRICS = "metrics.jsonl"
"""Name of the file of records in a run's output folder."""

_FLUSH = 50  # steps between transfers of the losses from a GPU, which wait for it


def read_records(path: Path) -> list[Record]:
    """Return the records in a file of `JsonLines`; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class LossMeter:
    """Means of the loss terms over an epoch, each over what it is a mean of.

    Terms stay on their device until :meth:`flush`, which moves all of them in one transfer, so
    that a training step on a GPU need not wait for the host. Every value is checked there.

    With several processes the terms of each are of its part of the batch, and the means are those
    of whole batches. All must flush at the same steps, and all find the same values.
    """

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._pending: list[tuple[str, dict[str, Term]]] = []

    def add(self, where: str, terms: Mapping[str, Term]) -> None:
        """Take one step's detached terms; ``where`` says which step, for an error."""
        self._pending.append((where, dict(terms)))

    def __len__(self) -> int:
        """Return the number of steps not yet flushed."""
        return len(self._pending)

    def flush(self) -> None:
        """Add the pending terms to the sums.

        Raises
        ------
        NonFiniteError
            If a term of a pending step is NaN or infinite.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        parts = [part for _, terms in pending for term in terms.values() for part in term]
        values = iter(sum_over_processes(torch.stack(parts)).tolist())
        for where, terms in pending:
            step = {name: (next(values), next(values)) for name in terms}
            means = {name: _quotient(total, weight) for name, (total, weight) in step.items()}
            for name, (total, weight) in step.items():
                if not math.isfinite(total):
                    others = ", ".join(f"{n} {v:.4g}" for n, v in means.items() if n != name)
                    raise NonFiniteError(f"{name} is {total} at {where} ({others})")
                self.totals[name] = self.totals.get(name, 0.0) + total
                self.weights[name] = self.weights.get(name, 0.0) + weight
            self.last = means

    def means(self) -> dict[str, float]:
        """Mean of every term since :meth:`reset`; NaN where there was nothing to average."""
        return {name: _quotient(total, self.weights[name]) for name, total in self.totals.items()}

    def reset(self) -> None:
        """Start a new epoch."""
        self.totals, self.weights, self.last, self._pending = {}, {}, {}, []

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint in the middle of an epoch."""
        return {"totals": dict(self.totals), "weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.reset()
        self.totals, self.weights = dict(state["totals"]), dict(state["weights"])


def _quotient(total: float, weight: float) -> float:
    return total / weight if weight else math.nan


class JsonLines:
    """A tracker that writes a file of one JSON object a line, NaN and infinity as null.

    Parameters
    ----------
    path : path
        Made if missing, along with its folder.
    step : int
        Where the run stands. Lines beyond it were written by a run that went on after its last
        checkpoint; they are removed, as the resumed run writes them again. So is a last line that
        was cut short.

    Raises
    ------
    ValueError
        If the file holds a complete line that is not a JSON object with an integer ``step``.
    """

    def __init__(self, path: str | os.PathLike[str], step: int) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._rewind(step)
        self._file = self.path.open("a", encoding="utf-8")

    def _rewind(self, step: int) -> None:
        text = self.path.read_text(encoding="utf-8")
        kept = ""
        for number, line in enumerate(text.splitlines(keepends=True), start=1):
            if not line.endswith("\n"):
                break
            try:
                keep = json.loads(line)["step"] <= step
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{self.path}, line {number}: not a metrics line (JSON object with a step); "
                    "give another output folder or move the file away"
                ) from error
            kept += line if keep else ""
        if kept != text:
            write_whole(self.path, kept)

    def __call__(self, record: Record) -> None:
        """Append a line."""
        self._file.write(json.dumps(finite_or_none(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """A tracker that writes every number of a record as a TensorBoard scalar, under its ``kind``.

    Parameters
    ----------
    folder : path
        Where the event files go. TensorBoard hides what an earlier process wrote there from the
        step of the first record on.

    Raises
    ------
    ImportError
        If the package ``tensorboard`` is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard needs the package tensorboard: pip install tensorboard"
            ) from error
        self._folder = os.fspath(folder)
        self._writers = SummaryWriter
        self._writer: SummaryWriter | None = None

    def __call__(self, record: Record) -> None:
        """Write a record."""
        if self._writer is None:
            self._writer = self._writers(self._folder, purge_step=record["step"])
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file; the next record would begin another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Progress:
    """A bar over the steps of a run, with its ETA and the epoch's mean losses so far.

    Redrawn at most ten times a second on a terminal; elsewhere (a log file) a line at most every
    30 seconds.

    Raises
    ------
    ImportError
        If the package ``tqdm`` is missing.
    """

    # Those of the terms that tell whether things go well.
    _SHOWN = ("label_loss", "label_accuracy", "cross_entropy")

    def __init__(self, total: int, done: int) -> None:
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise ImportError(
                "progress=True needs the package tqdm: pip install tqdm, or pass progress=False"
            ) from error
        self._interval = 0.1 if sys.stderr.isatty() else 30.0
        self._due = 0.0
        self._bar = tqdm(
            total=total, initial=done, unit="step", mininterval=self._interval, dynamic_ncols=True
        )

    def update(self, meter: LossMeter) -> None:
        """Advance by one step."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + self._interval
            losses = {n: v for n, v in meter.means().items() if n.endswith(self._SHOWN)}
            shown = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
            self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


class RunLog(ExitStack):
    """Everything a run writes: ``metrics.jsonl``, the tracker, the bar. Leaving it closes them.

    Parameters
    ----------
    meter
        Takes the terms of the steps.
    total_steps, done_steps
        Length of the run and where it stands.
    every
        Write a record every so many steps.
    output
        Folder for ``metrics.jsonl``; None writes no file.
    tracker
        Gets every record.
    progress
        Whether to show the bar.
    """

    def __init__(
        self,
        meter: LossMeter,
        total_steps: int,
        done_steps: int,
        every: int | None = None,
        *,
        output: Path | None = None,
        tracker: Tracker | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self._meter = meter
        self._every = every
        self._trackers = [] if tracker is None else [tracker]
        if output is not None:
            lines = JsonLines(output / METRICS, done_steps)
            self._trackers.insert(0, self.enter_context(closing(lines)))
        self._bar = None
        if progress:
            self._bar = self.enter_context(closing(Progress(total_steps, done_steps)))

    def add(self, record: Record, batch: str, terms: Mapping[str, Term]) -> None:
        """Take a step's terms, and write its record if one is due; `batch` names it in errors."""
        where = f"epoch {record['epoch']}, step {record['step']} ({batch})"
        self._meter.add(where, terms)
        due = self._every is not None and record["step"] % self._every == 0
        on_cpu = all(term.total.device.type == "cpu" for term in terms.values())
        if due or on_cpu or len(self._meter) >= _FLUSH:
            self._meter.flush()
        if due:
            self.write(record | self._meter.last)
        if self._bar is not None:
            self._bar.update(self._meter)

    def write(self, record: Record) -> None:
        """Give a record to the file and the tracker."""
        for tracker in self._trackers:
            tracker(record)
