"""The subcommands by name."""

from __future__ import annotations

from .training import train
from .using import evaluate, predict, probe

__all__ = ["evaluate", "predict", "probe", "train"]
