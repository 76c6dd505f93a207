"""The logic of benchmarks/gpu_check.py, on the CPU: on the day there is a GPU it must not fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu import checks, timings

import lnl_ext

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


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


def test_all_files_with_tests_on_cuda_tensors_are_run():
    # What conftest.py's mark goes by; to collect the other files takes long.
    fixtures = re.compile(r"\b(backend|device|cuda_device)\b")
    tests = [
        str(file.relative_to(ROOT))
        for file in (ROOT / "python_tests").rglob("test_*.py")
        if fixtures.search(file.read_text(encoding="utf-8"))
    ]
    arguments = ["-m", "pytest", "--collect-only", "-q", "-m", "cuda and not slow", *tests]
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
