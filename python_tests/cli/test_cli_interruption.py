"""``lnl train`` ended at any moment, and ``--resume``: to the bit what it would have been."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_data import SIZE, write_images

Run = Callable[..., tuple[int, str]]
"""``run(flags, trouble=None)``: exit code and what was printed."""

STEPS = 8  # unlearning begins after 4


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("interruption") / "images")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    log = tmp_path_factory.mktemp("log") / "log"
    forks = subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[1] / "support" / "forked_runs.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def one(flags: list[str], trouble: tuple[str, int] | None = None) -> tuple[int, str]:
        assert forks.stdin is not None
        assert forks.stdout is not None
        job = {"flags": flags, "trouble": trouble, "log": str(log)}
        forks.stdin.write(json.dumps(job) + "\n")
        forks.stdin.flush()
        return json.loads(forks.stdout.readline()), log.read_text()

    yield one
    forks.communicate()


def flags(table: Path, output: Path, *more: str) -> list[str]:
    return [
        "train",
        f"--csv={table}",
        "--label-column=disease",
        "--bias-column=hospital",
        f"--output={output}",
        "--arch=shufflenet_v2_x0_5",
        f"--image-size={SIZE}",
        "--batch-size=8",
        "--epochs=2",
        "--warm-up=0.5",
        "--validation=0.25",
        "--threads=1",
        "--workers=0",
        "--checkpoint-every=1",
        *more,
    ]


def results(folder: Path) -> dict[str, Any]:
    """Return weights and figures without the times, and what files there are."""
    weights = {
        f"{file}, {name}": value
        for file in ("model.pt", "best.pt")
        for name, value in torch.load(folder / file, weights_only=True).items()
    }
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    figures = [json.loads(line) for line in lines]
    figures.append(json.loads((folder / "report.json").read_text()))
    for record in figures:
        assert record.pop("seconds") > 0
    return {
        "weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
        "figures": figures,
        "files": sorted(path.name for path in folder.iterdir()),
    }


@pytest.fixture(scope="module")
def expected(table: Path, run: Run) -> dict[str, Any]:
    """Results of a run that nothing has interrupted."""
    output = table.parent.parent / "uninterrupted"
    assert run(flags(table, output))[0] == 0
    found = results(output)
    assert found["figures"][-2]["step"] == STEPS
    return found


@pytest.fixture(scope="module")
def expected_with_workers(table: Path, run: Run) -> dict[str, Any]:
    """The same with images decoded, and varied, by a worker."""
    output = table.parent.parent / "uninterrupted_with_workers"
    assert run(flags(table, output, "--workers=1"))[0] == 0
    return results(output)


def resume(run: Run, output: Path, expected: dict[str, Any]) -> None:
    code, text = run(["train", f"--output={output}", "--resume"])
    assert code == 0, text
    assert results(output) == expected


@pytest.mark.parametrize("number", random.Random(0).sample(range(2, STEPS + 1), 1))
def test_killed_at_a_step(
    table: Path, tmp_path: Path, run: Run, expected: dict[str, Any], number: int
) -> None:
    assert run(flags(table, tmp_path / "run"), ("kill", number))[0] == -9
    resume(run, tmp_path / "run", expected)


@pytest.mark.parametrize(
    ("trouble", "number", "file"),
    [
        # After three checkpoints the first epoch ends: the best weights so far, and the fourth.
        ("kill in half a checkpoint", 4, "best.pt"),
        ("kill in half a checkpoint", 5, "checkpoint.pt"),
        # split.csv, model.json and config.toml take their places first.
        ("kill before the checkpoint's place", 7, "best.pt"),
        ("kill before the checkpoint's place", 8, "checkpoint.pt"),
    ],
)
def test_killed_while_a_checkpoint_is_written(
    table: Path,
    tmp_path: Path,
    run: Run,
    expected: dict[str, Any],
    trouble: str,
    number: int,
    file: str,
) -> None:
    assert run(flags(table, tmp_path / "run"), (trouble, number))[0] == -9
    assert (tmp_path / "run" / f".{file}.tmp").exists()
    resume(run, tmp_path / "run", expected)


def test_killed_again_and_again_at_any_moment(
    table: Path, tmp_path: Path, run: Run, expected: dict[str, Any]
) -> None:
    # From before the first image is read to after the last step, as the machine's speed has it.
    chance = random.Random(0)
    codes = []
    for _ in range(5):
        moment = ("kill after", chance.randrange(200, 2500))
        codes.append(run(flags(table, tmp_path / "run", "--resume"), moment)[0])
    assert set(codes) <= {0, -9}
    assert run(flags(table, tmp_path / "run", "--resume"))[0] == 0
    assert results(tmp_path / "run") == expected


def test_a_full_disk_leaves_the_last_checkpoint(
    table: Path, tmp_path: Path, run: Run, expected: dict[str, Any]
) -> None:
    code, text = run(flags(table, tmp_path / "run"), ("full disk at a checkpoint", 5))
    assert code == 2, text
    assert f"lnl: error: could not write checkpoint {tmp_path}/run/checkpoint.pt" in text
    assert "File too large" in text
    assert "Traceback" not in text
    resume(run, tmp_path / "run", expected)


def test_a_full_disk_at_the_end_leaves_the_weights_before(
    table: Path, tmp_path: Path, run: Run, expected: dict[str, Any]
) -> None:
    output = tmp_path / "run"
    code, text = run(flags(table, output), ("full disk at the weights", 1))
    assert code == 2, text
    assert f"cannot read or write: [Errno 27] File too large: '{output}/model.pt'" in text
    assert "Traceback" not in text
    assert not list(output.glob("*model.pt*"))
    resume(run, output, expected)
    # Once more: what is there already stays.
    code, text = run(["train", f"--output={output}", "--resume"], ("full disk at the weights", 1))
    assert code == 2, text
    assert results(output) == expected


def test_a_full_disk_at_the_page_loses_nothing_else(
    table: Path, tmp_path: Path, run: Run, expected: dict[str, Any]
) -> None:
    output = tmp_path / "run"
    code, text = run(flags(table, output), ("full disk at the page", 1))
    assert code == 0, text
    assert f"lnl: warning: {output}/report.html was not written: File too large\n" in text
    assert "Traceback" not in text
    assert text.splitlines()[-1].endswith("config.toml, report.json, split.csv")
    files = [name for name in expected["files"] if name != "report.html"]
    assert results(output) == {**expected, "files": files}
    resume(run, output, expected)


def test_a_killed_reader_of_images_is_one_line(table: Path, tmp_path: Path, run: Run) -> None:
    more = ["--workers=1", "--epochs=20"]
    code, text = run(flags(table, tmp_path / "run", *more), ("kill a worker", 3))
    assert code == 2, text
    assert "lnl: error: a process that reads images was killed" in text
    assert "fewer --workers" in text
    assert "Traceback" not in text
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_disk_that_is_full_from_the_start_is_one_line(
    table: Path, tmp_path: Path, run: Run
) -> None:
    code, text = run(flags(table, tmp_path / "run"), ("full disk from the start", 300))
    assert code == 2, text
    assert "lnl: error: cannot read or write: [Errno 27] File too large" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(("name", "workers"), [("SIGTERM", 0), ("SIGINT", 1)])
def test_a_signal_ends_the_run_after_the_step(
    table: Path,
    tmp_path: Path,
    run: Run,
    request: pytest.FixtureRequest,
    name: str,
    workers: int,
) -> None:
    expected = request.getfixturevalue("expected_with_workers" if workers else "expected")
    # Without checkpoints between epochs: the signal is what writes one.
    more = [f"--workers={workers}", "--checkpoint-every=1000"]
    output = tmp_path / "run"
    code, text = run(flags(table, output, *more), (name, 7))
    assert code == {"SIGTERM": 143, "SIGINT": 130}[name]
    assert f"lnl: stopped by {name} at step 7; resume with: lnl train --output {output}" in text
    assert "Traceback" not in text
    resume(run, output, expected)


def test_killed_with_workers(
    table: Path, tmp_path: Path, run: Run, expected_with_workers: dict[str, Any]
) -> None:
    assert run(flags(table, tmp_path / "run", "--workers=1"), ("kill", 6))[0] == -9
    resume(run, tmp_path / "run", expected_with_workers)
