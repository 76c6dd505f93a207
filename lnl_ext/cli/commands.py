"""The subcommands by name, and errors as a user should see them."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from lnl_ext.cli.compare import compare
from lnl_ext.cli.export import export
from lnl_ext.cli.interruption import Interrupted, LostWorkerError, naming_lost_workers
from lnl_ext.cli.training import train
from lnl_ext.cli.using import evaluate, predict, probe
from lnl_ext.data.images import TooManyUnreadableError, UnreadableImageError
from lnl_ext.errors import UserError
from lnl_ext.training.checkpoint import CheckpointError, NonFiniteError
from lnl_ext.training.distributed import (
    LostProcessError,
    Processes,
    from_environment,
    naming_lost_processes,
)

__all__ = ["run"]

_COMMANDS = {
    "train": train,
    "compare": compare,
    "evaluate": evaluate,
    "probe": probe,
    "predict": predict,
    "export": export,
}
_USER_ERRORS = (
    UserError,
    CheckpointError,
    NonFiniteError,
    LostProcessError,
    LostWorkerError,
    TooManyUnreadableError,
    UnreadableImageError,
)
# No room, no permission, or no place of this name: the message of the system says which and where.
_PLACES = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)


def run(command: str, flags: Mapping[str, Any]) -> int:
    """Run a subcommand and return the exit code: 2 for user errors."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            with (
                from_environment() as processes,
                naming_lost_processes(),
                naming_lost_workers(),
                _only_the_main_one_prints(processes),
            ):
                _COMMANDS[command](flags, processes)
                sys.stdout.flush()
        except _USER_ERRORS as error:
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
