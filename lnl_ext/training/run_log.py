"""Where the figures of a run go: running means, JSON lines, TensorBoard, a progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lnl_ext.files import finite_or_none, write_whole
from lnl_ext.training.batch_counts import Term
from lnl_ext.training.distributed import sum_over_processes

Record = dict[str, Any]


class NonFiniteError(ArithmeticError):
    """A loss or a weight became NaN or infinite; the message says which, and at which step."""


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
    """A file of one JSON object a line, each with a ``step``.

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
        kept = []
        for number, line in enumerate(text.splitlines(keepends=True), start=1):
            if not line.endswith("\n"):
                break
            try:
                at = json.loads(line)["step"]
                keep = at <= step
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{self.path}, line {number}: not a metrics line (JSON object with a step); "
                    "give another output folder or move the file away"
                ) from error
            if keep:
                kept.append(line)
        if "".join(kept) != text:
            write_whole(self.path, "".join(kept))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line. A value that is NaN or infinite becomes null, as JSON has neither."""
        line = json.dumps(finite_or_none(dict(record)), allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Scalars:
    """TensorBoard scalars of records such as those of :class:`JsonLines`.

    Parameters
    ----------
    folder : path
        Where the event files go.
    step : int
        Where the run stands; TensorBoard hides what an earlier process wrote beyond it.

    Raises
    ------
    ImportError
        If the package ``tensorboard`` is missing.
    """

    def __init__(self, folder: str | os.PathLike[str], step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "tensorboard=True needs the package tensorboard: pip install tensorboard"
            ) from error
        self._writer = SummaryWriter(os.fspath(folder), purge_step=step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write every number of ``record`` at its ``step``, under its ``kind``."""
        kind = record.get("kind", "epoch")
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(f"{kind}/{name}", value, record["step"])

    def close(self) -> None:
        """Write what is left and close the event file."""
        self._writer.close()


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

    def update(self, stage: str, meter: LossMeter) -> None:
        """Advance by one step."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + self._interval
            self._show(stage, meter)
        self._bar.update()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def _show(self, stage: str, meter: LossMeter) -> None:
        losses = {n: v for n, v in meter.means().items() if n.endswith(self._SHOWN)}
        self._bar.set_description_str(stage, refresh=False)
        self._bar.set_postfix_str(
            ", ".join(f"{name} {value:.3f}" for name, value in losses.items()), refresh=False
        )


class RunLog:
    """Everything a run writes for people: ``metrics.jsonl``, TensorBoard events, the bar.

    Parameters
    ----------
    output
        Folder for ``metrics.jsonl`` and ``tensorboard/``; None writes no file.
    total_steps, done_steps
        Length of the run and where it stands.
    tensorboard, progress
        Whether to write scalars, whether to show the bar.
    """

    def __init__(
        self,
        output: Path | None,
        total_steps: int,
        done_steps: int,
        *,
        tensorboard: bool,
        progress: bool,
    ) -> None:
        if tensorboard and output is None:
            raise ValueError("tensorboard=True needs output, the folder to write to")
        self._sinks: list[JsonLines | Scalars] = []
        self._bar = None
        try:
            if output is not None:
                self._sinks.append(JsonLines(output / "metrics.jsonl", done_steps))
            if tensorboard and output is not None:
                self._sinks.append(Scalars(output / "tensorboard", done_steps))
            if progress:
                self._bar = Progress(total_steps, done_steps)
        except BaseException:
            self.close()
            raise

    def write(self, record: Record) -> None:
        """Write a record to every file."""
        for sink in self._sinks:
            sink.write(record)

    def advance(self, stage: str, meter: LossMeter) -> None:
        """Move the bar by one step."""
        if self._bar is not None:
            self._bar.update(stage, meter)

    def close(self) -> None:
        """Close the files and leave the bar."""
        for sink in self._sinks:
            sink.close()
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> RunLog:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()
