"""Steps that share one deadline: each is one process or several, ended when its time is up.

A step may take what is left after the least that every later step is promised, so that the promises
hold however long the steps before them run. Whatever a step prints, and whatever it has written to
its result file, is kept when it fails or is ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

GRACE = 4.0
"""Seconds of a step's time between asking it to end (SIGINT) and ending it (SIGKILL)."""
LINES = 40
"""Lines of output that are kept of a step that did not pass."""


Command = Callable[[float, Path], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Step:
    """One part of the run.

    Attributes
    ----------
    name
        Unique.
    command
        Makes the command of the seconds that it may take and the file for its result, JSON.
    least, most
        Seconds that it is promised, and that it gets where there are enough.
    environment
        Set for the command, beside what this process has.
    skip
        Why it cannot run here, if it cannot.
    needs
        A step without whose passing this one would prove nothing.
    read
        Makes the result of the output where the command writes no file; raises ValueError where
        the output shows that nothing was checked.
    parts
        Commands by name, in place of `command`: each is a process of its own, because a CUDA error
        may fail every later call of its process.
    together
        How many parts run at the same time; 0 for all.
    """

    name: str
    command: Command | None
    least: float
    most: float
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    skip: str | None = None
    needs: str | None = None
    read: Callable[[str], Any] | None = None
    parts: Mapping[str, Command] = dataclasses.field(default_factory=dict)
    together: int = 0


@dataclasses.dataclass
class Outcome:
    """How a step ended: passed, failed, killed (out of time) or skipped.

    The detail of one with parts is their status, seconds and detail by name; its output is that of
    the parts that did not pass.
    """

    name: str
    status: str
    seconds: float = 0.0
    limit: float = 0.0
    detail: Any = None
    output: list[str] = dataclasses.field(default_factory=list)


def limits_fit(steps: Sequence[Step], seconds: float) -> bool:
    """Tell whether every step's promise can be kept."""
    return all(GRACE < step.least <= step.most for step in steps) and seconds >= sum(
        step.least for step in steps
    )


def limit_of(step: Step, later: Sequence[Step], left: float) -> float:
    """Return the seconds that a step may take when `left` are left for it and all later ones."""
    return min(step.most, left - sum(other.least for other in later if other.skip is None))


def run_steps(
    steps: Sequence[Step],
    seconds: float,
    root: Path,
    after: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run the steps in order within `seconds`.

    Parameters
    ----------
    steps
        Whose least times add up to no more than `seconds`.
    seconds
        For all of them.
    root
        The folder that the commands run in.
    after
        Called with all outcomes so far whenever a step has ended.
    """
    if not limits_fit(steps, seconds):
        least = sum(step.least for step in steps)
        raise ValueError(f"the steps need {least:.0f} s at least, given {seconds:.0f}")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As in the background of a script. Every step would ignore it, too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    passed: set[str] = set()
    for index, step in enumerate(steps):
        if step.skip is not None:
            outcome = Outcome(step.name, "skipped", detail=step.skip)
        elif step.needs is not None and step.needs not in passed:
            outcome = Outcome(step.name, "skipped", detail=f"{step.needs!r} did not pass")
        else:
            limit = limit_of(step, steps[index + 1 :], end - time.monotonic())
            outcome = (run_parts if step.parts else run_step)(step, limit, root)
        if outcome.status == "passed":
            passed.add(step.name)
        outcomes.append(outcome)
        say(outcome)
        after(outcomes)
    return outcomes


def run_parts(step: Step, limit: float, root: Path) -> Outcome:
    """Run the parts of a step for at most `limit` seconds in all."""
    begin = time.monotonic()

    def run_part(name: str) -> Outcome:
        left = begin + limit - time.monotonic()
        if left <= GRACE:
            return Outcome(name, "killed", output=["no time was left for it"])
        part = dataclasses.replace(step, name=name, command=step.parts[name])
        return run_step(part, left, root)

    with ThreadPoolExecutor(step.together or len(step.parts)) as pool:
        outcomes = list(pool.map(run_part, step.parts))
    ended = {outcome.status for outcome in outcomes}
    return Outcome(
        step.name,
        next((status for status in ("failed", "killed") if status in ended), "passed"),
        round(time.monotonic() - begin, 1),
        round(limit, 1),
        {o.name: {"status": o.status, "seconds": o.seconds, "detail": o.detail} for o in outcomes},
        [f"{outcome.name}: {line}" for outcome in outcomes for line in outcome.output],
    )


def run_step(step: Step, limit: float, root: Path) -> Outcome:
    """Run one process for at most `limit` seconds."""
    assert step.command is not None
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "output.txt"
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    list(step.command(limit - GRACE, result)),
                    cwd=root,
                    env={**os.environ, **step.environment},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # compilers and workers that it starts end with it
                )
            except OSError as error:
                return Outcome(step.name, "failed", 0.0, round(limit, 1), str(error))
            ended = wait(process, begin + limit)
        text = log.read_text(errors="replace")
        detail = json.loads(result.read_text()) if result.exists() else None
    status = "killed" if not ended else "passed" if process.returncode == 0 else "failed"
    if step.read is not None and detail is None:
        try:
            detail = step.read(text)
        except ValueError as error:
            detail = str(error)
            status = "failed" if ended else status
    seconds = time.monotonic() - begin
    kept = [] if status == "passed" else text.splitlines()[-LINES:]
    return Outcome(step.name, status, round(seconds, 1), round(limit, 1), detail, kept)


def wait(process: subprocess.Popen[bytes], end: float) -> bool:
    """Wait until the process has ended; end it, and all that it started, at `end`.

    Returns
    -------
    bool
        Whether it ended by itself.
    """
    try:
        process.wait(max(0.0, end - GRACE - time.monotonic()))
        return True
    except subprocess.TimeoutExpired:
        send(process, signal.SIGINT)  # pytest still prints what it has
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        return False
    finally:
        send(process, signal.SIGKILL)
        process.wait()


def send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to the process's group, of which none may be left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def say(outcome: Outcome) -> None:
    """Print how a step ended and, where it did not pass, why."""
    print(f"{outcome.name}: {outcome.status}, {outcome.seconds} s", flush=True)
    if outcome.status == "skipped" or isinstance(outcome.detail, str):
        print(f"  {outcome.detail}", flush=True)
    for line in outcome.output:
        print(f"  | {line}", flush=True)


def write_json(path: Path, value: Any) -> None:
    """Write a file whole: one that exists keeps its contents until the new ones are there."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)
