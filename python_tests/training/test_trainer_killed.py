"""Runs that end at any moment, and resume as if they had not; a process of several that is lost."""

from __future__ import annotations

import datetime
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import forkserver, free_port, member, needs_gloo
from tiny_run import differences, tiny_batches, tiny_trainer
from trainer_runs import STEPS, Watched, evaluate, loader, metrics

from lnl_ext import files
from lnl_ext.training import distributed
from lnl_ext.training.checkpoint import CheckpointError, load_checkpoint
from lnl_ext.training.distributed import LostProcessError
from lnl_ext.training.trainer import CHECKPOINT, Trainer

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")

NO_SPACE = 28


def die(with_signal: int) -> None:
    """End this process as from outside."""
    os.kill(os.getpid(), with_signal)
    time.sleep(60)


def doomed(batches: Any, trainer: Trainer, how: str, step: int, folder: Path) -> Any:
    """Batches of a run that ends ``how`` after ``step`` steps or while it saves that step."""

    def end() -> None:
        if trainer.step == step and how in ("kill", "terminate"):
            die(signal.SIGKILL if how == "kill" else signal.SIGTERM)
        if trainer.step == step - 1 and how == "full disk":
            temporary = folder / f".{CHECKPOINT}.tmp"
            temporary.unlink(missing_ok=True)  # what an earlier kill left
            temporary.symlink_to("/dev/full")  # every write to it: no space left on device
        if trainer.step == step - 1 and how == "kill while writing":
            os.fsync = lambda file: (os.ftruncate(file, 1500), die(signal.SIGKILL))
        if trainer.step == step - 1 and how == "kill after writing":
            files._sync_folder = lambda _: die(signal.SIGKILL)

    return Watched(batches, end)


def run(folder: str, kind: str, update: str, how: str, step: int) -> None:
    """Begin the run of the folder or go on with it; in a process of its own."""
    torch.set_num_threads(1)
    path = Path(folder)
    trainer = tiny_trainer(update=update)
    if (path / CHECKPOINT).exists():
        trainer.load(path / CHECKPOINT)
    batches = loader(kind)
    watched = doomed(batches, trainer, how, step, path) if how else batches
    options: dict[str, Any] = {"evaluate": evaluate, "log_every": 2, "progress": False}
    try:
        trainer.fit(watched, output=path, checkpoint_every=1, **options)
    except CheckpointError as error:
        os._exit(NO_SPACE if "could not write checkpoint" in str(error) else 1)


def in_a_process(*arguments: Any) -> int:
    """Return the exit code of `run`."""
    process = forkserver().Process(target=run, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


ENDS = {
    "kill": -signal.SIGKILL,
    "terminate": -signal.SIGTERM,
    "kill while writing": -signal.SIGKILL,
    "kill after writing": -signal.SIGKILL,
    "full disk": NO_SPACE,
}


@pytest.mark.parametrize(
    ("kind", "update", "seed"),
    [
        ("tensors", "joint", 0),
        ("tensors", "two_step", 1),
        ("loader", "joint", 2),
        ("loader with workers", "joint", 3),
    ],
)
def test_a_run_that_ends_in_every_way_ends_as_the_uninterrupted_one(
    tmp_path: Path, kind: str, update: str, seed: int
) -> None:
    """At random steps, one after the other, with random numbers drawn wherever they can be."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert in_a_process(str(whole), kind, update, "", 0) == 0
    rng = random.Random(seed)
    steps = sorted(rng.sample(range(2, STEPS), len(ENDS)))
    for step, how in zip(steps, rng.sample(sorted(ENDS), len(ENDS)), strict=True):
        assert in_a_process(str(killed), kind, update, how, step) == ENDS[how], (how, step)
        kept = step - (how in ("kill while writing", "full disk"))
        assert load_checkpoint(killed / CHECKPOINT)["step"] == kept, (how, step)
    assert in_a_process(str(killed), kind, update, "", 0) == 0
    expected, found = (load_checkpoint(folder / CHECKPOINT) for folder in (whole, killed))
    assert expected["step"] == STEPS
    assert differences(expected, found) == []
    assert metrics(whole) == metrics(killed)
    assert sorted(os.listdir(killed)) == [CHECKPOINT, "metrics.jsonl"]


# ---------------------------------------------------------------------- one process of two


def run_of_two(folder: str, how: str, who: int, step: int) -> None:
    """A run of which one process ends, or answers no more; the other says how it ended."""
    rank = distributed.current().rank
    path = Path(folder)
    trainer = tiny_trainer()
    if (path / CHECKPOINT).exists():
        trainer.load(path / CHECKPOINT)
    batches: Any = tiny_batches()
    if rank == who and how == "stop":

        def stop() -> None:
            if trainer.step == step:
                os.kill(os.getpid(), signal.SIGSTOP)

        batches = Watched(batches, stop)
    elif rank == who and how:
        batches = doomed(batches, trainer, how, step, path)
    try:
        trainer.fit(batches, output=path, checkpoint_every=1, progress=False)
    except LostProcessError as error:
        (path / "end.txt").write_text(str(error))


def two_processes(folder: Path, how: str, who: int, step: int, seconds: int = 60) -> list[int]:
    """Return the exit codes of both."""
    folder.mkdir(exist_ok=True)
    port, timeout = free_port(), datetime.timedelta(seconds=seconds)
    arguments = (str(folder), how, who, step)
    processes = [
        forkserver().Process(target=member, args=(rank, 2, port, run_of_two, arguments, timeout))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    if how:
        processes[1 - who].join(60)
        processes[who].kill()  # which is over, unless it was stopped
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@needs_gloo
@pytest.mark.parametrize(
    ("how", "who", "kept"),
    [("kill", 1, 7), ("kill", 0, 7), ("kill while writing", 0, 6), ("stop", 1, 7)],
)
def test_a_lost_process_ends_the_run_and_leaves_a_checkpoint(
    tmp_path: Path, how: str, who: int, kept: int
) -> None:
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    began = time.monotonic()
    codes = two_processes(lost, how, who, 7, seconds=5 if how == "stop" else 60)
    assert codes[who] == -signal.SIGKILL
    assert codes[1 - who] == 0
    assert time.monotonic() - began < 55  # before the timeout, where the connection closes
    message = (lost / "end.txt").read_text()
    assert message.startswith(f"process {1 - who} of 2 lost another one, which ended or did not")
    assert load_checkpoint(lost / CHECKPOINT)["step"] == kept
    if how == "kill":
        assert two_processes(lost, "", 0, 0) == two_processes(whole, "", 0, 0) == [0, 0]
        expected, found = (load_checkpoint(folder / CHECKPOINT) for folder in (whole, lost))
        assert expected["step"] == STEPS
        assert differences(expected, found) == []
