"""The subcommands by name."""

from __future__ import annotations

from lnl_ext.cli.training import train
from lnl_ext.cli.using import evaluate, predict, probe

__all__ = ["evaluate", "predict", "probe", "train"]
