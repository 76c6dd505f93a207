"""The logic of benchmarks/gpu_check.py, on the CPU: on the day there is a GPU it must not fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu import checks, timings
from torch._subclasses.fake_tensor import FakeTensorMode

from lnl_ext.ops import bias_loss as ops

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


# ---- the command ---------------------------------------------------------------------------


def test_the_whole_command_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Every step that has a meaning there, sanitizer included, in processes as on the day."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\n[ "$1 $3 $4" = "--tool --error-exitcode 1" ] || exit 9\nshift 4\n"$@"'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # compiling takes a minute
    arguments = ["--device", "cpu", "--output", str(tmp_path), "--skip", "racecheck"]
    assert gpu_check.main(arguments) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "gpu_cpu.json").read_text())
    steps = {step["name"]: step for step in report["steps"]}
    assert list(steps) == list(gpu_check.SECONDS)
    skipped = {name: s["detail"] for name, s in steps.items() if s["status"] == "skipped"}
    assert skipped == {
        "graph capture": "the CPU has no CUDA graphs",
        "racecheck": "left out by --skip",
    }
    assert all(s["status"] == "passed" for name, s in steps.items() if name not in skipped)
    assert steps["tests"]["detail"]["passed"] > 1
    assert steps["calls"]["detail"] == steps["memcheck"]["detail"]
    assert steps["beyond 2^31"]["detail"]["features"] == f"{35 * 512} elements"
    for name, cases in (
        ("loss timings", timings.QUICK_SHAPES),
        ("linear timings", timings.QUICK_CASES),
    ):
        detail = steps[name]["detail"]
        assert len(detail["rows"]) == len(cases)
        assert (detail["failed"], detail["left_out"]) == ({}, [])
        assert "not installed" in detail["liger"] or "need a GPU" in detail["liger"]
        for row in detail["rows"]:
            assert {"copy", "fused", "eager", "compile"} <= row["ratios"].keys()
    assert report["targets"] == []  # times of tiny shapes on a CPU mean nothing


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]):
    assert gpu_check.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_without_pytest_it_says_so_before_the_build(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "has_pytest", lambda: False)
    assert gpu_check.main(["--device", "cpu"]) == 2
    assert "pip install '.[test]'" in capsys.readouterr().err


def test_the_steps_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/cuda/bin/{name}")
    monkeypatch.delenv("MAX_JOBS", raising=False)
    steps = {step.name: step for step in gpu_check.plan("cuda", "9.0", False, [], 8.0)}
    result = Path("result.json")
    assert all(step.skip is None for step in steps.values())
    assert all(s.needs == "build" for name, s in steps.items() if name != "build")
    build = steps["build"]
    assert build.environment["LNL_EXT_CUDA"] == "1"
    assert build.environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert 1 <= int(build.environment["MAX_JOBS"]) <= 8
    assert "--dry-run" not in build.command(100, result)
    assert "cuda and not slow" in steps["tests"].command(100, result)
    for tool in ("memcheck", "racecheck"):
        command = steps[tool].command(30, result)
        assert command[:3] == ["/cuda/bin/compute-sanitizer", "--tool", tool]
        assert command[command.index("--step") + 1] == "calls under a sanitizer"
    timing = steps["loss timings"].command(56.0, result)
    assert timing[timing.index("--seconds") + 1] == "56.0"
    assert "--quick" not in timing


def test_a_build_that_is_skipped_is_not_waited_for():
    steps = gpu_check.plan("cpu", "", True, ["build"], 8.0)
    assert steps[0].skip == "left out by --skip"
    assert all(step.needs is None for step in steps)


def test_without_a_sanitizer_its_steps_say_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    steps = {step.name: step for step in gpu_check.plan("cuda", "9.0", False, [], 8.0)}
    assert steps["memcheck"].skip == steps["racecheck"].skip == "compute-sanitizer is not installed"


def test_counts_of_pytest():
    output = "....\n====== 12 passed, 3 skipped, 1 warning in 4.21s ======\n"
    assert gpu_check.counts_of(output) == {"passed": 12, "skipped": 3, "warning": 1}
    coloured = (
        "\x1b[32m\x1b[1m2 passed\x1b[0m, \x1b[33m7 deselected\x1b[0m\x1b[32m in 70.2s (0:01:10)"
    )
    assert gpu_check.counts_of(coloured) == {"passed": 2, "deselected": 7}
    with pytest.raises(ValueError, match="no summary"):
        gpu_check.counts_of("Killed")
    with pytest.raises(ValueError, match="no test passed: 340 skipped, 900 deselected"):
        gpu_check.counts_of("===== 340 skipped, 900 deselected in 3.00s =====")


def test_file_name():
    assert gpu_check.file_name("NVIDIA H100 80GB HBM3") == "gpu_nvidia_h100_80gb_hbm3.json"


# ---- timings -------------------------------------------------------------------------------


def a_row(**changes):
    ratios = {"copy": 0.9, "eager": 4.0, "compile": 1.3, "fused": 1.0}
    ratios |= {name: changes.pop(name) for name in list(changes) if name in ratios}
    row = {
        "case": "4x5 float32",
        "bytes": timings.LARGE,
        "classes": 5,
        "values": {"fused": {"median": 2.0}},
        "gigabytes_per_second": {"fused": 900.0},
        "ratios": {name: {"median": value} for name, value in ratios.items()},
    }
    return row | changes


def missed(judged) -> dict[str, float]:
    return {each["target"]: each["got"] for each in judged if not each["met"]}


def test_targets_are_met_or_missed_by_case_and_figure():
    good = timings.judge([a_row()], [])
    assert [each["met"] for each in good] == [True] * 3
    assert good[0] == {
        "case": "4x5 float32",
        "target": "time of copy over ours",
        "wanted": 0.85,
        "got": 0.9,
        "met": True,
    }
    assert missed(timings.judge([a_row(copy=0.5)], [])) == {"time of copy over ours": 0.5}
    assert missed(timings.judge([a_row(copy=0.5, bytes=100)], [])) == {}
    assert missed(timings.judge([a_row(eager=2.0, compile=1.0)], [])) == {
        "time of eager over ours": 2.0,
        "time of compile over ours": 1.0,
    }


def test_targets_of_the_linear_head():
    few = a_row(eager=0.98, compile=0.96, extra_bytes={"eager": 1, "fused": 1})
    assert missed(timings.judge([], [few])) == {"time of compile over ours": 0.96}
    many = a_row(classes=32000, extra_bytes={"eager": 700, "fused": 100})
    assert missed(timings.judge([], [many])) == {"extra memory of eager over ours": 7.0}


def test_report_prints_times_and_targets(capsys: pytest.CaptureFixture[str]):
    detail = {"rows": [a_row(eager=2.5)], "liger": "timed"}
    outcomes = [gpu_check.Outcome("loss timings", "killed", detail=detail)]
    report = gpu_check.report_of({"name": "x"}, outcomes, measured=True)
    gpu_check.print_report(report)
    printed = capsys.readouterr().out
    assert "target MISSED: 4x5 float32: time of eager over ours is 2.5, wanted 3.0" in printed
    assert "target met: 4x5 float32: time of copy over ours is 0.9, wanted 0.85" in printed
    assert "900.0 GB/s; over ours: 0.90 copy, 2.50 eager, 1.30 compile" in printed


def test_no_time_left_leaves_cases_out_and_names_them(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 6.0, 6.0])  # the first case takes 6 of 10 seconds, so no other one fits
    monkeypatch.setattr(timings.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(timings, "time_loss", lambda *arguments: a_row())
    seen = []
    assert timings.measure(False, CPU, True, 10.0, lambda found: seen.append(found["left_out"][:]))
    assert seen[-1] == ["(16, 12) torch.bfloat16"]
    assert "no time left for (16, 12)" in capsys.readouterr().out


def test_a_case_that_fails_does_not_cost_the_others(monkeypatch: pytest.MonkeyPatch):
    def fails(shape, *arguments):
        if shape == timings.QUICK_SHAPES[0][0]:
            raise torch.OutOfMemoryError("too large")
        return a_row()

    monkeypatch.setattr(timings, "time_loss", fails)
    found = {}
    assert not timings.measure(False, CPU, True, 1000.0, found.update)
    assert len(found["rows"]) == 1
    ((name, lines),) = found["failed"].items()
    assert name == "(4, 8, 3, 3) torch.float32"
    assert "too large" in lines[-1]


def test_liger_is_a_peer_where_it_is_installed(monkeypatch: pytest.MonkeyPatch):
    functional = types.ModuleType("liger_kernel.transformers.functional")

    def liger_cross_entropy(z, target):
        return torch.nn.functional.cross_entropy(z, target)

    def liger_fused_linear_cross_entropy(x, weight, target, bias=None):
        return torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(x, weight, bias), target
        )

    functional.liger_cross_entropy = liger_cross_entropy
    functional.liger_fused_linear_cross_entropy = liger_fused_linear_cross_entropy
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    monkeypatch.setattr(timings, "liger_missing", lambda device: None)
    logits = torch.randn(5, 4, requires_grad=True)
    loss = timings.loss_candidates(logits, torch.randint(4, (5,)))
    linear = timings.linear_candidates(timings.linear.make_inputs(timings.QUICK_CASES[0], CPU))
    for candidates in (loss, linear):
        assert list(candidates).count("liger") == 1
        candidates["liger"]()
    sites = torch.randn(5, 4, 3, requires_grad=True)
    assert "liger" not in timings.loss_candidates(sites, torch.randint(4, (5, 3)))


# ---- checks --------------------------------------------------------------------------------


def replaying(gradients):
    """Stand in for checks.capture: a replay runs the call again, into the same tensors."""
    outputs = gradients()

    def replay() -> None:
        for old, new in zip(outputs, gradients(), strict=True):
            old.copy_(new)

    return replay, outputs


def test_graph_capture_compares_the_replay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "capture", replaying)
    names = checks.graph_capture(CPU)
    assert [name.split()[0] for name in names] == [
        *["fused_bias_loss"] * 2,
        *["fused_linear_bias_loss"] * 2,
        "BiasAdversary",
    ]


def test_a_replay_of_old_numbers_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "capture", lambda call: (lambda: None, call()))
    with pytest.raises(RuntimeError, match="the replayed graph gives other gradients"):
        checks.graph_capture(CPU)


def test_capture_warms_up_on_a_side_stream_and_captures_once(monkeypatch: pytest.MonkeyPatch):
    events = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            events.append(f"enter {self.name}")

        def __exit__(self, *error: object) -> None:
            events.append(f"exit {self.name}")

        def wait_stream(self, other: Recorder) -> None:
            events.append(f"{self.name} waits for {other.name}")

        def replay(self) -> None:
            events.append("replay")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: Recorder("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Recorder("main"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Recorder("graph"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    replay, outputs = checks.capture(lambda: events.append("call") or (torch.ones(1),))
    replay()
    assert len(outputs) == 1
    assert events == [
        "side waits for main",
        "enter side",
        *["call"] * 3,
        "exit side",
        "main waits for side",
        "enter graph",
        "call",
        "exit graph",
        "replay",
    ]


def test_wrong_numbers_of_a_kernel_fail(monkeypatch: pytest.MonkeyPatch):
    right = checks.lnl_ext.fused_bias_loss
    monkeypatch.setattr(
        checks.lnl_ext,
        "fused_bias_loss",
        lambda *tensors, **options: right(*tensors, **options) * 1.001,
    )
    with pytest.raises(AssertionError, match="not close"):
        checks.calls(CPU)
    checks.calls(CPU, compare=False)


def test_too_little_memory_for_large_tensors_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "free_memory", lambda device: 11 * 2**30)
    results = checks.large_tensors(CPU, quick=True)
    assert results["logits"] == "skipped: 11 GiB free, 12 needed"
    assert "skipped" not in results["features"] + results["logits in chunks"]


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """CUDA tensors without numbers: what mixes devices is an error. They have no backward."""

    def no_gradients(loss, inputs, *rest):
        inputs = [inputs] if isinstance(inputs, torch.Tensor) else inputs
        assert loss.device.type == "cuda"
        return tuple(torch.empty_like(tensor) for tensor in inputs)

    monkeypatch.setattr(ops, "_built_with_cuda", lambda: True)
    monkeypatch.setattr(torch.autograd, "grad", no_gradients)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: no_gradients(loss, []))
    with FakeTensorMode():
        yield torch.device("cuda", 0)


def test_all_tensors_of_the_checks_are_on_the_device(fake_cuda, monkeypatch: pytest.MonkeyPatch):
    for shape in (*checks.LOGITS, *checks.HEADS):
        ours, plain = checks._call(shape, shape in checks.HEADS, torch.bfloat16, fake_cuda, {})
        assert {tensor.device.type for tensor in (*ours, *plain)} == {"cuda"}
    for operation in checks.captured_operations(fake_cuda):
        assert {gradient.device.type for gradient in operation.gradients()} == {"cuda"}
    compared = []
    monkeypatch.setattr(
        checks,
        "_close",
        lambda got, wanted: compared.append(
            (got.shape == wanted.shape, got.device == wanted.device)
        ),
    )
    checks.large_logits(fake_cuda, 2**28 + 3)
    checks.large_features(fake_cuda, 2**22 + 3)
    checks.large_head(fake_cuda, 2**16 + 3, 2**15 + 3)
    assert compared == [(True, True)] * 5


def test_all_tensors_of_the_timings_are_on_the_device(fake_cuda, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    logits = torch.randn(16, 12, device=fake_cuda).to(torch.bfloat16).requires_grad_()
    target = torch.randint(12, (16,), device=fake_cuda)
    inputs = timings.linear.make_inputs(timings.QUICK_CASES[1], fake_cuda)
    for candidates in (
        timings.loss_candidates(logits, target),
        timings.linear_candidates(inputs),
    ):
        for run in candidates.values():
            run()


# ---- the tests that it chooses -------------------------------------------------------------


def test_the_marker_selects_the_tests_on_cuda_tensors():
    arguments = ["-m", "pytest", "--collect-only", "-q", "-m", "cuda and not slow"]
    names = ("test_bias_loss_operators.py", "test_bias_loss_parity.py", "test_arguments.py")
    files = [f"python_tests/ops/{name}" for name in names]
    found = subprocess.run(
        [sys.executable, *arguments, *files],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    names = [line for line in found.stdout.splitlines() if "::" in line]
    assert len(names) > 20, found.stdout + found.stderr
    assert all("[cuda" in name for name in names)
    assert {name.split("::")[0] for name in names} == set(files[:2])


def test_a_gpu_without_cuda_kernels_fails_the_tests(monkeypatch: pytest.MonkeyPatch):
    import backends

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends.lnl_ext, "build_info", lambda: {"cuda": False})
    with pytest.raises(RuntimeError, match="built without CUDA: reinstall it with LNL_EXT_CUDA=1"):
        backends.cuda_missing()
    monkeypatch.setattr(backends.lnl_ext, "build_info", lambda: {"cuda": True})
    assert backends.cuda_missing() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in str(backends.cuda_missing())
