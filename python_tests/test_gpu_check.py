"""The logic of benchmarks/gpu_check.py, on the CPU: on the day there is a GPU it must not fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import gpu_check


def test_runs_on_the_cpu_and_writes_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # What is timed is not the matter here, and compiling takes a minute.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert gpu_check.main(["--device", "cpu", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu_cpu.json").read_text())
    assert [step["status"] for step in report["steps"]] == ["passed", "passed"]
    rows = report["steps"][-1]["detail"]
    assert len(rows) == len(gpu_check.TINY_SHAPES)
    for row in rows:
        assert {"copy", "lnl_ext", "eager", "compiled"} <= row["seconds"].keys()
        assert row["over_eager"] == row["seconds"]["eager"] / row["seconds"]["lnl_ext"]


def test_a_failing_step_is_recorded_and_the_others_run():
    steps: list[gpu_check.Step] = []

    def fails() -> None:
        raise ValueError("no such luck")

    def skips() -> None:
        raise gpu_check.SkippedError("not here")

    gpu_check.perform("first", steps, fails)
    gpu_check.perform("second", steps, skips)
    gpu_check.perform("third", steps, lambda: 3)
    assert [step.status for step in steps] == ["failed", "skipped", "passed"]
    assert "no such luck" in steps[0].detail[-1]
    assert steps[1].detail == "not here"
    assert steps[2].detail == 3


def test_failed_command_shows_the_end_of_its_output():
    with pytest.raises(RuntimeError, match="the reason"):
        gpu_check.command([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], 30)


def test_counts_of_pytest():
    output = "....\n====== 12 passed, 3 skipped, 1 warning in 4.21s ======\n"
    assert gpu_check.counts_of(output) == {"passed": 12, "skipped": 3, "warning": 1}
    with pytest.raises(RuntimeError, match="no summary"):
        gpu_check.counts_of("Killed")


def test_missed_targets_name_shape_and_figure():
    good = {
        "shape": [4, 5],
        "dtype": "float32",
        "bytes": gpu_check.LARGE,
        "over_copy": 0.9,
        "over_eager": 4.0,
        "over_compiled": 1.3,
    }
    assert gpu_check.missed_targets([good]) == []
    assert gpu_check.missed_targets([{**good, "over_copy": 0.5}]) == [
        "(4, 5) float32: 0.50 of copy bandwidth"
    ]
    assert gpu_check.missed_targets([{**good, "over_copy": 0.5, "bytes": 100}]) == []
    assert len(gpu_check.missed_targets([{**good, "over_eager": 2.0, "over_compiled": 1.0}])) == 2


def test_no_time_left_ends_the_timings(capsys: pytest.CaptureFixture[str]):
    assert gpu_check.timings(gpu_check.Clock(0), "cpu") == []
    assert "no time left" in capsys.readouterr().out


def test_file_name():
    assert gpu_check.file_name("NVIDIA H100 80GB HBM3") == "gpu_nvidia_h100_80gb_hbm3.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]):
    assert gpu_check.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
