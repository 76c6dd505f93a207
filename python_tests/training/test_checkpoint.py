"""A checkpoint is whole or absent, and what is wrong with it is said by name."""

from __future__ import annotations

import os
import pickle
import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import forkserver
from torch.utils.data import DataLoader

from lnl_ext.training.batches import BatchStream
from lnl_ext.training.checkpoint import (
    CheckpointError,
    capture_random_state,
    load_checkpoint,
    restore_random_state,
    save_checkpoint,
)

STATE = {
    "step": 7,
    "weights": {"a": torch.arange(1000.0), "b": torch.tensor(3, dtype=torch.int64)},
    "history": [{"kind": "epoch", "loss": 0.5}],
}


def same(state: dict) -> bool:
    return (
        state["step"] == 7
        and torch.equal(state["weights"]["a"], STATE["weights"]["a"])
        and torch.equal(state["weights"]["b"], STATE["weights"]["b"])
        and state["history"] == STATE["history"]
    )


def test_what_was_saved_is_loaded_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one" / "checkpoint.pt"
    save_checkpoint(path, STATE)
    save_checkpoint(path, STATE)
    assert same(load_checkpoint(path))
    assert os.listdir(path.parent) == ["checkpoint.pt"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing\.pt"):
        load_checkpoint(tmp_path / "nothing.pt")


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.7, 0.95, 0.999])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, fraction: float) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(fraction * len(whole))])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is cut short or not a checkpoint"):
        load_checkpoint(path)


def test_every_flipped_byte_of_the_weights_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    whole = path.read_bytes()
    begin = whole.index(STATE["weights"]["a"].numpy().tobytes())
    for offset in (0, 1, 2000, 3999):
        damaged = bytearray(whole)
        damaged[begin + offset] ^= 0x10
        path.write_bytes(damaged)
        torch.load(path, weights_only=True)  # torch itself does not notice
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt is damaged: wrong checksum"):
            load_checkpoint(path)


def test_garbage_anywhere_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    whole = path.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        start = generator.randrange(len(whole))
        damaged[start : start + 16] = generator.randbytes(16)
        path.write_bytes(damaged)
        try:
            state = load_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:
            assert same(state)  # padding between records may be anything
    assert refused > 30


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    path, witness = tmp_path / "evil.pt", tmp_path / "witness"

    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(witness),)

    torch.save({"format": 1, "step": Evil()}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pt cannot be loaded \(weights_only=True\)"):
        load_checkpoint(path)
    assert not witness.exists()
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"evil\.pt"):
        load_checkpoint(path)
    assert not witness.exists()


def test_other_torch_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"conv.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"weights\.pt is a torch file, but no checkpoint"):
        load_checkpoint(path)
    torch.save({"format": 99}, path)
    with pytest.raises(CheckpointError, match=r"weights\.pt has format 99, this version reads 4"):
        load_checkpoint(path)


def test_what_cannot_be_loaded_again_safely_is_not_saved(tmp_path: Path) -> None:
    """A state with an arbitrary object would only be found out at the resume."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    with pytest.raises(CheckpointError, match=r"could not write checkpoint .*checkpoint\.pt"):
        save_checkpoint(path, {"step": lambda: None})
    assert same(load_checkpoint(path))
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("moment", ["save", "fsync", "replace"])
def test_a_failure_at_any_moment_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    owner = torch if moment == "save" else os
    monkeypatch.setattr(owner, moment, fail)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt.*No space left on device"):
        save_checkpoint(path, {**STATE, "step": 8})
    monkeypatch.undo()
    assert same(load_checkpoint(path))
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def in_a_process(function: Callable[[Path], None], path: Path) -> int | None:
    process = forkserver().Process(target=function, args=(path,))
    process.start()
    process.join(120)
    return process.exitcode


def save_with_little_room(path: Path) -> None:
    import resource  # POSIX

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in (4096, 2000, 100, 0):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointError, match=f"could not write checkpoint {path}"):
            save_checkpoint(path, {"step": 8, "weights": torch.zeros(1000)})


def save_and_be_killed(path: Path) -> None:
    real = os.fsync

    def kill_at_fsync(descriptor: int) -> None:
        os.ftruncate(descriptor, 1500)  # the disk has only a part of it
        real(descriptor)
        os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = kill_at_fsync
    save_checkpoint(path, {"step": 8, "weights": torch.zeros(1000)})


@pytest.mark.skipif(os.name != "posix", reason="file size limits and SIGKILL are POSIX")
def test_a_full_disk_or_a_kill_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    assert in_a_process(save_with_little_room, path) == 0
    assert same(load_checkpoint(path))
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
    assert in_a_process(save_and_be_killed, path) == -signal.SIGKILL
    assert same(load_checkpoint(path))
    save_checkpoint(path, STATE)  # and what the kill left behind does not get in the way
    assert same(load_checkpoint(path))


def draws(generator: torch.Generator) -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.standard_normal()),  # noqa: NPY002 - the global generator is the point
        torch.rand(()).item(),
        torch.rand((), generator=generator).item(),
    ]


def test_random_state_comes_back_through_a_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    stream = BatchStream(DataLoader(range(3), generator=generator))
    stream.seed(1)
    draws(generator)  # leaves half a pair of gaussians in Python's and NumPy's generators
    save_checkpoint(tmp_path / "c.pt", {"random": capture_random_state([generator])})
    expected = draws(generator)
    stream.seed(2)
    restore_random_state(load_checkpoint(tmp_path / "c.pt")["random"], [generator])
    assert draws(generator) == expected


def test_random_state_of_batches_with_and_without_generator_do_not_mix() -> None:
    with pytest.raises(ValueError, match="batches had 1 generators, these have 0"):
        restore_random_state(capture_random_state([torch.Generator()]), [])


def test_a_seed_reaches_every_generator() -> None:
    results = []
    for seed in (3, 3, 4):
        loader = DataLoader(range(3), generator=torch.Generator())
        BatchStream(loader).seed(seed)
        results.append(draws(loader.generator))
    assert results[0] == results[1]
    assert all(a != b for a, b in zip(results[0], results[2], strict=True))
