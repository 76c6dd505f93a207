"""The ``lnl`` command. What is imported here answers ``--help`` and wrong flags, without torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from lnl_ext._version import __version__
from lnl_ext.cli.arguments import add_arguments
from lnl_ext.cli.options import (
    GROUPS,
    CompareOptions,
    EvaluateOptions,
    ExportOptions,
    PredictOptions,
    ProbeOptions,
    TrainOptions,
)

__all__ = ["main"]

_COMMANDS: dict[str, tuple[type[Any], str]] = {
    "train": (TrainOptions, "train a classifier and unlearn a bias"),
    "compare": (CompareOptions, "runs side by side: methods, the mean and spread over seeds"),
    "evaluate": (EvaluateOptions, "accuracy of a model, by label and bias"),
    "probe": (ProbeOptions, "how much of an attribute a model's features hold"),
    "predict": (PredictOptions, "write a CSV file of predictions"),
    "export": (ExportOptions, "the network of a run as a file for other programs"),
}
_USAGE = {
    "train": "--csv FILE --label-column NAME --bias-column NAME --output DIR [options]",
    "compare": "RUN [RUN ...] [options]",
    "evaluate": "RUN [options]",
    "probe": "RUN [options]",
    "predict": "RUN --csv FILE --output FILE [options]",
    "export": "RUN [--format FORMAT] [options]",
}
_DESCRIPTION = "Train image classifiers that do not use a known, labelled bias."


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser, with the options of every subcommand."""
    made = argparse.ArgumentParser(prog="lnl", description=_DESCRIPTION)
    made.add_argument("--version", action="version", version=f"lnl_ext {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (options, summary) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            usage=f"lnl {name} {_USAGE[name]}",
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            allow_abbrev=False,
        )
        add_arguments(command, options, GROUPS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code: 2 for user errors."""
    flags = vars(parser().parse_args(arguments))
    command = flags.pop("command")
    flags = {name: value for name, value in flags.items() if value is not None}
    try:
        import lnl_ext.build  # noqa: F401 - says what is wrong with torch, where something is
    except ImportError as error:
        print(f"lnl: error: {error}", file=sys.stderr)
        return 2
    try:
        from lnl_ext.cli.commands import run  # needs torchvision, Pillow and more
    except ImportError as error:
        needed = "the command needs: pip install 'lnl_ext[train]'"
        print(f"lnl: error: {error}; {needed}", file=sys.stderr)
        return 2
    return run(command, flags)
