"""The best epoch of a run by its validation images: which it is, its weights, when to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lnl_ext.cli.report import Report
from lnl_ext.cli.run_folder import BEST, MODEL
from lnl_ext.models.weights import put_weights, read_weights, save_weights
from lnl_ext.training.distributed import on_main
from lnl_ext.training.trainer import Trainer

__all__ = ["BestEpoch"]

_Record = Mapping[str, Any]


class BestEpoch:
    """Keeps the weights of the epoch with the best worst group of the validation images.

    Of equal worst groups the mean of the groups decides, then the accuracy, then the earlier epoch.
    All of it follows from the history of the trainer, which a resumed run has too.

    Parameters
    ----------
    folder
        Of the run.
    network
        Whose weights to keep.
    keep
        ``"best"``, ``"last"`` or ``"both"``.
    patience
        Epochs without a better one after which the training ends; None: never.
    """

    def __init__(self, folder: Path, network: nn.Module, keep: str, patience: int | None) -> None:
        self.folder, self.network, self.keep, self.patience = folder, network, keep, patience

    def note(self, trainer: Trainer, report: Report, *, is_main: bool) -> bool:
        """Keep the weights, if this epoch is better than those before; return whether it is."""
        now = record_of(report)
        best = _best(trainer.history)
        if best is not None and _rank(now) <= _rank(trainer.history[best]):
            return False
        if self.keep != "last" and is_main:
            save_weights(self.folder / BEST, self.network)
        return True

    def stop(self, trainer: Trainer) -> bool:
        """Say whether the epochs of the patience have passed without a better one."""
        best = _best(trainer.history)
        if self.patience is None or best is None:
            return False
        return len(trainer.history) - 1 - best >= self.patience

    def epoch(self, trainer: Trainer) -> int:
        """Return the number of the best epoch, from 1."""
        best = _best(trainer.history)
        assert best is not None
        return best + 1

    def load(self) -> None:
        """Give the network the kept weights, in every process."""
        path = self.folder / BEST
        state = on_main(lambda: read_weights(path if path.exists() else self.folder / MODEL))
        put_weights(self.network, state, str(path), new_output=False)


def record_of(report: Report) -> dict[str, float]:
    """Return what the record of an epoch says about the validation images."""
    return {
        "validation_accuracy": report.accuracy,
        "worst_group_accuracy": report.worst,
        "balanced_accuracy": report.balanced,
    }


def _rank(record: _Record) -> tuple[float, ...]:
    names = ("worst_group_accuracy", "balanced_accuracy", "validation_accuracy")
    return tuple(record[name] for name in names)


def _best(history: Sequence[_Record]) -> int | None:
    if not history:
        return None
    return max(range(len(history)), key=lambda n: (_rank(history[n]), -n))
