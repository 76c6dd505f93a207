"""The ``lnl`` command: subcommands, and errors as a user should see them."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from lnl_ext import __version__
from lnl_ext.cli.arguments import add_arguments
from lnl_ext.cli.interruption import Interrupted, LostWorkerError, naming_lost_workers
from lnl_ext.cli.options import EvaluateOptions, PredictOptions, ProbeOptions, TrainOptions
from lnl_ext.errors import UserError
from lnl_ext.training.checkpoint import CheckpointError, NonFiniteError
from lnl_ext.training.distributed import (
    LostProcessError,
    Processes,
    from_environment,
    naming_lost_processes,
)

__all__ = ["main"]

_COMMANDS: dict[str, tuple[type[Any], str]] = {
    "train": (TrainOptions, "train a classifier and unlearn a bias"),
    "evaluate": (EvaluateOptions, "accuracy of a model, by label and bias"),
    "probe": (ProbeOptions, "how much of an attribute a model's features hold"),
    "predict": (PredictOptions, "write a CSV file of predictions"),
}
# No room, no permission, or no place of this name: the message of the system says which and where.
_PLACES = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)
_DESCRIPTION = "Train image classifiers that do not use a known, labelled bias."


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser, with the options of every subcommand."""
    made = argparse.ArgumentParser(prog="lnl", description=_DESCRIPTION)
    made.add_argument("--version", action="version", version=f"lnl_ext {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (options, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        add_arguments(command, options)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code: 2 for what is the user's to mend."""
    flags = vars(parser().parse_args(arguments))
    command = flags.pop("command")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    flags = {name: value for name, value in flags.items() if value is not None}
    try:
        # Here, as they need torchvision and Pillow, which importing lnl_ext must not.
        from lnl_ext.data.images import TooManyUnreadableError, UnreadableImageError

        commands = importlib.import_module("lnl_ext.cli.commands")
    except ImportError as error:
        return _fail(f"{error}; the command needs: pip install 'lnl_ext[train]'")
    mendable = (
        UserError,
        CheckpointError,
        NonFiniteError,
        LostProcessError,
        LostWorkerError,
        TooManyUnreadableError,
        UnreadableImageError,
    )
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            with (
                from_environment() as processes,
                naming_lost_processes(),
                naming_lost_workers(),
                _only_the_main_one_prints(processes),
            ):
                getattr(commands, command)(flags, processes)
                sys.stdout.flush()
        except mendable as error:
            return _fail(str(error))
        except BrokenPipeError:
            # Whoever read the output has gone, as `head` does; nothing is left to be flushed.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except OSError as error:
            if error.errno not in _PLACES:
                raise
            return _fail(f"cannot read or write: {error}")
        except Interrupted as stop:
            print(f"lnl: {stop}", file=sys.stderr)
            return 128 + stop.signal
        except KeyboardInterrupt:
            print("lnl: interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
    return 0


@contextlib.contextmanager
def _only_the_main_one_prints(processes: Processes) -> Iterator[None]:
    if processes.is_main:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _fail(message: str) -> int:
    print(f"lnl: error: {message}", file=sys.stderr)
    return 2


def _warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    print(f"lnl: warning: {message}", file=sys.stderr)
