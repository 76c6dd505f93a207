"""The logic of benchmarks/gpu_check.py, on the CPU: on the day there is a GPU it must not fail."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import emulated_cuda
import gpu_check
import pytest
import torch
from gpu import checks, one_call, targets, timings
from timing import turns
from torch._subclasses.fake_tensor import FakeTensorMode

import lnl_ext
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
    few = {"calls": ("rows_medium", "linear_on_chip"), "memcheck": ("rows_medium",)}
    monkeypatch.setattr(gpu_check, "PARTS", gpu_check.PARTS | few)
    arguments = ["--device", "cpu", "--output", str(tmp_path), "--skip", "racecheck"]
    arguments += ["--minutes", "24"]  # other tests may be running beside it
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
    assert steps["build"]["detail"]["version"] == lnl_ext.__version__
    details = {
        step: {name: part["detail"] for name, part in steps[step]["detail"].items()}
        for step in ("tests", "calls", "memcheck", "beyond 2^31")
    }
    assert details["tests"]["scale"]["passed"] > 1
    assert details["calls"] == {key: {"calls": 8, "failed": {}} for key in few["calls"]}
    assert details["memcheck"] == {"rows_medium": {"calls": 8, "failed": {}}}
    assert details["beyond 2^31"]["features"] == f"{35 * 512} elements"
    for name, cases in (
        ("loss timings", timings.QUICK_LOSS_CASES),
        ("linear timings", timings.QUICK_CASES),
    ):
        detail = steps[name]["detail"]
        assert len(detail["rows"]) == len(cases)
        assert (detail["failed"], detail["left_out"]) == ({}, [])
        assert "not installed" in detail["liger"] or "need a GPU" in detail["liger"]
        for row in detail["rows"]:
            peers = {"eager", "compile"} if "," not in row["case"] else set()
            assert row["ratios"].keys() - {"liger"} == {"copy", "fused", *peers}
            assert row["gigabytes_per_second"]["copy"] > 0
    assert {"authors", "joint"} <= steps["step timings"]["detail"]["ratios"].keys()
    assert report["targets"] == []  # times of tiny shapes on a CPU mean nothing


def test_a_package_that_cannot_be_imported_is_reported(tmp_path: Path):
    (tmp_path / "lnl_ext").mkdir()
    broken = "raise ImportError('undefined symbol: of_another_torch')"
    (tmp_path / "lnl_ext" / "__init__.py").write_text(broken)
    command = [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), "--device", "cpu"]
    ended = subprocess.run(
        [*command, "--output", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1, ended.stderr
    report = json.loads((tmp_path / "gpu_cpu.json").read_text())
    build, *others = report["steps"]
    assert (build["name"], build["status"]) == ("build", "failed")
    assert build["output"][-1] == "ImportError: undefined symbol: of_another_torch"
    assert {step["status"] for step in others} == {"skipped"}


def test_targets_need_no_package():
    code = "import sys, gpu_check; gpu_check.judge([], []); print('lnl_ext' in sys.modules)"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    assert subprocess.check_output(command, env=environment, text=True).strip() == "False"


def test_a_build_without_cuda_does_not_pass_for_one(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(lnl_ext, "build_info", lambda: {"cuda": False})
    assert gpu_check.import_package("", tmp_path / "result.json") == 0
    assert gpu_check.import_package("9.0", tmp_path / "result.json") == 1
    assert "built without CUDA" in capsys.readouterr().out


def test_the_compiled_parts_of_a_wheel_take_the_place_of_a_build(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "lnl_ext.whl", "w") as wheel:
        for name in ("__init__.py", "_C.cpython-312.so", "_cuda.abi3.so", "ops/_x.so"):
            wheel.writestr(f"lnl_ext/{name}", name)
    gpu_check.take_compiled_parts(tmp_path / "lnl_ext.whl", tmp_path)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["_C.cpython-312.so", "_cuda.abi3.so", "lnl_ext.whl"]
    with zipfile.ZipFile(tmp_path / "none.whl", "w") as wheel:
        wheel.writestr("lnl_ext/__init__.py", "")
    with pytest.raises(ValueError, match=r"none\.whl has no compiled parts"):
        gpu_check.take_compiled_parts(tmp_path / "none.whl", tmp_path)


def test_the_build_gets_what_it_needs(tmp_path: Path):
    def command(*arguments) -> tuple[dict[str, str], list[str]]:
        step = gpu_check.plan("cpu", *arguments)[0]
        return step.environment, step.command(9.0, tmp_path)[4:]

    environment, rest = command("", True, [], 8.0)
    assert environment["LNL_EXT_CUDA"] == "0"
    assert "--build-for" not in rest
    environment, rest = command("9.0", True, [], 8.0, "a.whl")
    assert (environment["LNL_EXT_CUDA"], environment["TORCH_CUDA_ARCH_LIST"]) == ("1", "9.0")
    assert rest[rest.index("--build-for") :][:4] == ["--build-for", "9.0", "--prebuilt", "a.whl"]


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
    for part in steps["tests"].parts.values():
        assert "cuda and not slow" in part(100, result)
    for tool in ("memcheck", "racecheck"):
        assert list(steps[tool].parts) == list(checks.FAMILIES)
        for name, part in steps[tool].parts.items():
            command = part(30, result)
            assert command[:3] == ["/cuda/bin/compute-sanitizer", "--tool", tool]
            assert command[command.index("--step") + 1] == "calls under a sanitizer"
            assert command[command.index("--part") + 1] == name
    assert list(steps["calls"].parts) == list(checks.FAMILIES)
    assert list(steps["graph capture"].parts) == list(checks.CAPTURED)
    assert list(steps["beyond 2^31"].parts) == list(checks.LARGE)
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
        "bytes": targets.LARGE,
        "classes": 5,
        "values": {"fused": {"median": 2.0}},
        "bandwidth": 0.9,
        "gigabytes_per_second": {"fused": 900.0},
        "ratios": {name: {"median": value} for name, value in ratios.items()},
    }
    return row | changes


def missed(judged) -> dict[str, float]:
    return {each["target"]: each["got"] for each in judged if not each["met"]}


def test_targets_are_met_or_missed_by_case_and_figure():
    good = targets.judge([a_row()], [])
    assert [each["met"] for each in good] == [True] * 3
    assert good[0] == {
        "case": "4x5 float32",
        "target": "bandwidth over a copy's",
        "wanted": 0.85,
        "got": 0.9,
        "met": True,
    }
    slow = a_row(bandwidth=0.5)
    assert missed(targets.judge([slow], [])) == {"bandwidth over a copy's": 0.5}
    assert missed(targets.judge([slow | {"bytes": 100}], [])) == {}
    alone = a_row(ratios={"copy": {"median": 0.9}, "fused": {"median": 1.0}})
    assert [each["target"] for each in targets.judge([alone], [])] == ["bandwidth over a copy's"]
    assert missed(targets.judge([a_row(eager=2.0, compile=1.0)], [])) == {
        "time of eager over ours": 2.0,
        "time of compile over ours": 1.0,
    }


def test_targets_of_the_linear_head():
    few = a_row(eager=0.98, compile=0.96, extra_bytes={"eager": 1, "fused": 1})
    assert missed(targets.judge([], [few])) == {"time of compile over ours": 0.96}
    many = a_row(classes=32000, extra_bytes={"eager": 700, "fused": 100})
    assert missed(targets.judge([], [many])) == {"extra memory of eager over ours": 7.0}


def test_report_prints_times_and_targets(capsys: pytest.CaptureFixture[str]):
    detail = {"rows": [a_row(eager=2.5)], "liger": "timed"}
    outcomes = [gpu_check.Outcome("loss timings", "killed", detail=detail)]
    report = gpu_check.report_of({"name": "x"}, outcomes, measured=True)
    gpu_check.print_report(report)
    printed = capsys.readouterr().out
    assert "target MISSED: 4x5 float32: time of eager over ours is 2.5, wanted 3.0" in printed
    assert "target met: 4x5 float32: bandwidth over a copy's is 0.9, wanted 0.85" in printed
    assert "900.0 GB/s, 0.90 of a copy's; over ours: 0.90 copy, 2.50 eager, 1.30 comp" in printed


def test_bandwidth_is_of_the_bytes_that_are_moved_by_the_kernels_time():
    logits, target = torch.empty(100, 12), torch.empty(100, dtype=torch.int64)
    moved = {
        variant: timings.moved_bytes(timings.LossCase((100, 12), variant=variant), logits, target)
        for variant in ("", timings.TWO, timings.FACTOR, timings.IGNORED)
    }
    assert moved == {
        "": (10400, 10400),
        timings.TWO: (15200, 15200),
        timings.FACTOR: (10400, 20000),
        timings.IGNORED: (10400, 20800),
    }
    values = {"fused": {"median": 3.0}, "fused, graph": {"median": 2.0}, "copy": {"median": 1.0}}
    row = timings.with_bandwidth({"values": values}, 4 * 10**9, 9 * 10**9, 10**10)
    assert row["gigabytes_per_second"] == {"fused": 5000.0, "copy": 8000.0}
    assert row["bandwidth"] == 0.625


def test_variants_give_the_gradients_that_they_name():
    torch.manual_seed(0)
    target = torch.randint(5, (6,))
    logits = torch.randn(6, 5, requires_grad=True)

    def gradients(variant: str) -> tuple[torch.Tensor, ...]:
        return timings.ours(timings.LossCase((6, 5), variant=variant), logits, target)()

    (plain,) = gradients("")
    torch.testing.assert_close(gradients(timings.FACTOR)[0], 2 * plain)
    torch.testing.assert_close(gradients(timings.SCALER)[0], timings.SCALE * plain)
    reversed_, of_head = gradients(timings.TWO)
    (wanted,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), logits)
    torch.testing.assert_close(of_head, wanted)
    fused = timings.losses.fused_loss(logits, target, reversal=0.1)
    torch.testing.assert_close(reversed_, torch.autograd.grad(fused, logits)[0])


class Clock:
    """Stands in for CUDA's events and writes down what is done."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def __call__(self, device: str, enable_timing: bool) -> Clock:
        assert (device, enable_timing) == ("cuda", True)
        return self

    def record(self) -> None:
        self.seen.append("record")

    def elapsed_time(self, end: Clock) -> float:
        return 2.0


def test_a_round_on_a_gpu_waits_once_and_flushes_the_cache_before_each(monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(torch, "Event", Clock(seen))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append("wait"))
    monkeypatch.setattr(turns, "_flush_cache", lambda device: seen.append("flush"))
    runs = [lambda: seen.append("first"), lambda: seen.append("second")]
    assert turns.seconds_of(runs, torch.device("cuda")) == [0.002, 0.002]
    expected = "flush record first record flush record second record wait"
    assert seen == expected.split()


def test_no_time_left_leaves_cases_out_and_names_them(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 6.0, 6.0])  # the first case takes 6 of 10 seconds, so no other one fits
    monkeypatch.setattr(timings.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(timings, "time_loss", lambda *arguments: a_row())
    seen = []
    assert timings.measure(False, CPU, True, 10.0, lambda found: seen.append(found["left_out"][:]))
    assert seen[-1][0] == "16x12 bfloat16"
    assert "no time left for 16x12 bfloat16" in capsys.readouterr().out


def test_a_case_that_fails_does_not_cost_the_others(monkeypatch: pytest.MonkeyPatch):
    def fails(case, *arguments):
        if case == timings.QUICK_LOSS_CASES[0]:
            raise torch.OutOfMemoryError("too large")
        return a_row()

    monkeypatch.setattr(timings, "time_loss", fails)
    found = {}
    assert not timings.measure(False, CPU, True, 1000.0, found.update)
    assert len(found["rows"]) == len(timings.QUICK_LOSS_CASES) - 1
    ((name, lines),) = found["failed"].items()
    assert name == "4x8x3x3 float32"
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
    loss = timings.loss_candidates(timings.LossCase((5, 4)), logits, torch.randint(4, (5,)))
    linear = timings.linear_candidates(timings.linear.make_inputs(timings.QUICK_CASES[0], CPU))
    for candidates in (loss, linear):
        assert list(candidates).count("liger") == 1
        candidates["liger"]()
    sites = torch.randn(5, 4, 3, requires_grad=True)
    case = timings.LossCase((5, 4, 3))
    assert "liger" not in timings.loss_candidates(case, sites, torch.randint(4, (5, 3)))


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
    for name in checks.CAPTURED:
        assert checks.graph_capture(CPU, name) == "the replayed gradients are right"


def test_a_replay_of_old_numbers_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "capture", lambda call: (lambda: None, call()))
    with pytest.raises(RuntimeError, match="the replayed graph gives other gradients"):
        checks.graph_capture(CPU, "adversary")


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
    found = checks.calls(CPU, "rows_small")
    assert len(found["failed"]) == 2  # of float32: bfloat16 cannot tell
    assert all("not close" in "".join(lines) for lines in found["failed"].values())
    assert checks.calls(CPU, "rows_small", compare=False)["failed"] == {}


def test_a_sanitizer_sees_the_kernels_alone(monkeypatch: pytest.MonkeyPatch):
    for name in ("fused_bias_loss", "fused_linear_bias_loss"):
        monkeypatch.delattr(checks.lnl_ext.reference, name)
    for family in checks.FAMILIES:
        assert checks.calls(CPU, family, compare=False)["failed"] == {}


def test_a_call_that_fails_does_not_cost_the_others(tmp_path: Path, monkeypatch, capsys):
    right = checks.lnl_ext.fused_bias_loss

    def fails(logits, *tensors, **options):
        if logits.shape == (5, 100):
            raise RuntimeError("CUDA error: misaligned address")
        return right(logits, *tensors, **options)

    monkeypatch.setattr(checks.lnl_ext, "fused_bias_loss", fails)
    result = tmp_path / "result.json"
    assert gpu_check.run_own_step("calls", "rows_medium", "cpu", True, 9.0, result) == 1
    found = json.loads(result.read_text())
    assert found["calls"] == 8
    assert {name.split(")")[0] for name in found["failed"]} == {"(5, 100"}
    assert len(found["failed"]) == 4
    assert "misaligned address" in capsys.readouterr().out


@pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))
def test_families_get_their_kernels():
    for family, shapes in checks.FAMILIES.items():
        for rows, classes, *space in shapes if "linear" not in family else ():
            for dtype in (torch.float32, torch.bfloat16):
                kernel = emulated_cuda.kernel(dtype, rows, classes, math.prod(space))
                assert kernel.startswith(family), (family, rows, classes, space)


def test_too_little_memory_for_large_tensors_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "free_memory", lambda device: 11 * 2**30)
    results = {name: checks.large_tensors(CPU, name, quick=True) for name in checks.LARGE}
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
    for family, shapes in checks.FAMILIES.items():
        for shape in shapes:
            linear = family.startswith("linear")
            leaves, target = checks.make_inputs(shape, linear, torch.bfloat16, fake_cuda)
            for module in (lnl_ext, lnl_ext.reference):
                results = checks.losses_of(module, leaves, target, {})
                assert {tensor.device.type for tensor in results} == {"cuda"}
    for make in checks.CAPTURED.values():
        assert {gradient.device.type for gradient in make(fake_cuda).gradients()} == {"cuda"}
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
    monkeypatch.setattr(checks, "capture", lambda run: (run, ()))
    for candidates in (
        *(
            timings.loss_candidates(timings.LossCase((16, 12), variant=variant), logits, target)
            for variant in ("", timings.TWO, timings.FACTOR)
        ),
        timings.linear_candidates(inputs),
    ):
        for run in candidates.values():
            run()


@pytest.mark.parametrize("call", ["5 12", "2 8 3 3 --dtype bfloat16", "--linear 5 8 12"])
def test_the_call_for_a_profiler(call: str):
    assert one_call.main([*call.split(), "--device", "cpu"]) == 0


# ---- the tests that it chooses -------------------------------------------------------------


def test_all_files_with_tests_on_cuda_tensors_are_run():
    arguments = ["-m", "pytest", "--collect-only", "-q", "-m", "cuda and not slow", "python_tests"]
    found = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    names = [line for line in found.stdout.splitlines() if "::" in line]
    assert len(names) > 200, found.stdout + found.stderr
    files = {name.split("::")[0].removeprefix("python_tests/") for name in names}
    assert files == {file for file, _ in gpu_check.TESTS.values()}


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
