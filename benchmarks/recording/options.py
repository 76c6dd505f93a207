"""Options that the commands share. It imports no torch, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "results"


def command(docstring: str | None) -> argparse.ArgumentParser:
    """Return a parser whose description is the first sentence of a command's docstring."""
    return argparse.ArgumentParser(description=(docstring or "").partition("\n")[0])


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add what every command that trains takes."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--no-progress", action="store_true")
