"""The command in forks of one process that has imported everything, with trouble on request.

A line of JSON on stdin, ``{"flags": [...], "trouble": [name, number] | null, "log": path}``, starts
a run; a line on stdout tells its exit code (negative: the signal that ended it).
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

# Once, before the forks, what the command imports only when it needs it.
import jinja2  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.figure
import matplotlib.font_manager
import matplotlib.style  # noqa: F401
import rich.progress  # noqa: F401
import scipy.stats  # noqa: F401
import sklearn.preprocessing  # noqa: F401
import torch

import lnl_ext.cli.commands  # noqa: F401
from lnl_ext.cli import training
from lnl_ext.cli.main import main
from lnl_ext.training.trainer import Trainer


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()


def _at_call(owner: Any, name: str, number: int, trouble: Callable[..., None]) -> None:
    """Make trouble right before the given call (1 is the first) of a function."""
    original, calls = getattr(owner, name), 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            trouble(*arguments)
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


def _half_written(state: Any, file: Any) -> None:
    content = io.BytesIO()
    torch.save(state, content)
    file.write(content.getvalue()[: content.tell() // 2])
    file.flush()
    _kill()


def _full_disk(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


TROUBLES: dict[str, Callable[[int], None]] = {
    # At a step.
    "kill": lambda n: _at_call(Trainer, "_train_step", n, lambda *_: _kill()),
    "SIGTERM": lambda n: _at_call(
        Trainer, "_train_step", n, lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    ),
    "SIGINT": lambda n: _at_call(
        Trainer, "_train_step", n, lambda *_: os.kill(os.getpid(), signal.SIGINT)
    ),
    "kill a worker": lambda n: _at_call(Trainer, "_train_step", n, lambda *_: _kill_workers()),
    # In the write of a checkpoint: in its middle, and when all is written but not in its place.
    "kill in half a checkpoint": lambda n: _at_call(torch, "save", n, _half_written),
    "kill before the checkpoint's place": lambda n: _at_call(os, "replace", n, lambda *_: _kill()),
    "full disk at a checkpoint": lambda n: _at_call(
        torch, "save", n, lambda *_: _full_disk(1_000_000)
    ),
    "full disk at the weights": lambda n: _at_call(
        training, "save_weights", n, lambda *_: _full_disk(1_000_000)
    ),
    "full disk at the page": lambda n: _at_call(
        training, "write_run_page", n, lambda *_: _full_disk(50_000)
    ),
    "full disk from the start": lambda n: _full_disk(n),
    # At a moment, in milliseconds.
    "kill after": lambda n: threading.Timer(n / 1000, _kill).start(),
}


def _run(job: dict[str, Any]) -> int:
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 70
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if job["trouble"] is not None:
            name, number = job["trouble"]
            TROUBLES[name](number)
        code = main(job["flags"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(2)  # a run began with the number of its flags, and so it must go on
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)
