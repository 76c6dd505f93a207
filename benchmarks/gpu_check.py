"""Build, check and time everything that needs a GPU, in eight minutes or as many as are given.

    python benchmarks/gpu_check.py [--output DIR] [--minutes 8] [--quick] [--skip STEP ...]

Builds the package for this machine's GPU, calls every kernel, captures CUDA graphs, takes tensors
of more than 2^31 elements, runs the Python tests on CUDA tensors, times the losses against PyTorch
eager, torch.compile and, if installed, Liger's cross-entropy, with the achieved bandwidth over that
of a copy, times a training step against the authors' procedure, runs compute-sanitizer if it is
installed, and writes gpu_<name>.json after every step. It needs the packages of
`pip install '.[test]'`; --prebuilt takes the place of the build.

Every step has a time limit: what is left after the least that the later steps are promised. Its
kernel families are processes of their own, since a CUDA error may fail all later calls of a
process. Exits with 1 where a step failed or ran out of time; a target that was missed is reported
and does not fail. This process does not import the package, so that a broken build is reported too.

`--device cpu` goes the same way on the CPU with tiny shapes, which is how it is tested: pip
resolves and does not build, there is no graph to capture, and times mean nothing. With `--build-for
9.0` it builds the kernels, for GPUs of that compute capability, which needs none (`make
rehearse-gpu`).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu.deadline import Command, Outcome, Step, run_steps, write_json
from gpu.targets import Rows, judge

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 8.0
MARGIN = 12.0  # of all seconds: for the start, writing, ending what ran out of time
# Seconds of a run of MINUTES: what each step is promised, and what it gets where others need less.
SECONDS = {
    "build": (150, 220),
    "calls": (20, 45),
    "graph capture": (15, 30),
    "beyond 2^31": (30, 60),
    "tests": (70, 200),
    "loss timings": (75, 120),
    "linear timings": (45, 90),
    "step timings": (15, 40),
    "memcheck": (20, 60),
    "racecheck": (20, 60),
}
# What a process of its own each calls: kernel families, and what checks.py has by these names.
KERNELS = (
    *("rows_small", "rows_medium", "rows_large", "sites_small", "sites_large"),
    *("linear_on_chip", "linear in chunks"),
)
PARTS = {
    "calls": KERNELS,
    "memcheck": KERNELS,
    "racecheck": KERNELS,
    "graph capture": ("sites", "rows", "linear on chip", "linear in chunks", "adversary"),
    "beyond 2^31": ("logits", "features", "logits in chunks"),
}
# The files that have tests on CUDA tensors, and which of them.
TESTS = {
    "edges": ("ops/test_bias_loss_edges.py", ""),
    "operators": ("ops/test_bias_loss_operators.py", ""),
    "parity": ("ops/test_bias_loss_parity.py", ""),
    "weights of 0": ("ops/test_zero_coefficients.py", ""),
    "linear head": ("ops/test_devices.py", "linear"),
    "devices": ("ops/test_devices.py", "not linear"),
}
NO_PYTEST = "pytest and hypothesis are not installed: pip install '.[test]' first"


def counts_of(output: str) -> dict[str, int]:
    """Return {"passed": n, "skipped": n, ...} from the last line of pytest.

    Raises
    ------
    ValueError
        There is none, or no test passed.
    """
    lines = [line for line in output.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    if not lines:
        raise ValueError("no summary in the output of pytest")
    summary = re.sub(r"\x1b\[\d*m", "", lines[-1])
    counts = {word: int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", summary)}
    if not counts.get("passed"):
        raise ValueError(f"no test passed: {summary.strip('= ')}")
    return counts


def plan(
    device: str,
    capability: str,
    quick: bool,
    skip: Sequence[str],
    minutes: float,
    prebuilt: str | None = None,
) -> list[Step]:
    """Return the steps in their order.

    Parameters
    ----------
    device
        "cuda" or "cpu".
    capability
        What to build for, as in "9.0"; empty: nothing, and the build step resolves alone.
    quick
        Tiny shapes.
    skip
        Names of steps to leave out.
    minutes
        Of the whole run, to which the times of the steps are scaled.
    prebuilt
        A wheel with the compiled parts, "" where they are in lnl_ext/ already, None to build them.
    """
    on_gpu = device == "cuda"
    script = str(Path(__file__).resolve())

    def own(name: str, part: str, limit: float, result: Path) -> list[str]:
        command = [sys.executable, script, "--step", name, "--part", part, "--device", device]
        command += ["--seconds", f"{limit:.1f}", "--result", str(result)]
        if name == "build":
            command += [] if not capability else ["--build-for", capability]
            command += [] if prebuilt is None else ["--prebuilt", prebuilt]
        return command + (["--quick"] if quick else [])

    def sanitizer(tool: str, part: str, limit: float, result: Path) -> list[str]:
        found = shutil.which("compute-sanitizer") or "compute-sanitizer"
        checked = own("calls under a sanitizer", part, limit, result)
        return [found, "--tool", tool, "--error-exitcode", "1", *checked]

    def parts_of(name: str, command: Callable[..., list[str]]) -> dict[str, Command]:
        return {part: functools.partial(command, part) for part in PARTS[name]}

    def pytest(*selected: str) -> Command:
        command = [sys.executable, "-m", "pytest", "-v", "--durations=10", *selected]
        return lambda limit, result: command

    tests = {
        name: pytest("-m", "cuda and not slow", "-k", only, f"python_tests/{file}")
        for name, (file, only) in TESTS.items()
    }
    if not on_gpu:
        tests = {
            "scale": pytest(
                "-k", "cpu and test_scale", "python_tests/ops/test_bias_loss_operators.py"
            )
        }
    missing = None if shutil.which("compute-sanitizer") else "compute-sanitizer is not installed"
    jobs = os.environ.get("MAX_JOBS") or str(min(8, os.cpu_count() or 1))
    needs = None if "build" in skip else "build"

    def step(name: str, **rest: Any) -> Step:
        least, most = (seconds * minutes / MINUTES for seconds in SECONDS[name])
        if name in PARTS:
            rest.setdefault("parts", parts_of(name, functools.partial(own, name)))
        if name in skip:
            rest["skip"] = "left out by --skip"
        command = None if "parts" in rest else functools.partial(own, name, "")
        return Step(name, command, least, most, **{"needs": needs, **rest})

    return [
        step(
            "build",
            environment={
                "LNL_EXT_CUDA": "1" if capability else "0",
                "MAX_JOBS": jobs,
                **({"TORCH_CUDA_ARCH_LIST": capability} if capability else {}),
            },
            needs=None,
        ),
        step("calls"),
        step("graph capture", skip=None if on_gpu else "the CPU has no CUDA graphs"),
        step("beyond 2^31", together=1),  # each takes much of the memory
        step(
            "tests",
            parts=tests,
            read=counts_of,
            skip=None if has_pytest() else NO_PYTEST,
        ),
        step("loss timings"),
        step("linear timings"),
        step("step timings"),
        # Every tensor an allocation of its own, so that an access beyond its end is seen.
        step(
            "memcheck",
            parts=parts_of("memcheck", functools.partial(sanitizer, "memcheck")),
            skip=missing,
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
        step(
            "racecheck",
            parts=parts_of("racecheck", functools.partial(sanitizer, "racecheck")),
            skip=missing,
        ),
    ]


def has_pytest() -> bool:
    """Tell whether the tests can run."""
    return all(importlib.util.find_spec(name) is not None for name in ("pytest", "hypothesis"))


def build(device: str, capability: str, prebuilt: str | None, result: Path) -> int:
    """Install the package, then import it, in a process that finds what has been installed."""
    if prebuilt is None:
        pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
        pip += ["--editable", ".", *([] if capability else ["--dry-run"])]
        if code := subprocess.run(pip).returncode:
            return code
    elif prebuilt:
        take_compiled_parts(Path(prebuilt), ROOT / "lnl_ext")
    imported = [sys.executable, str(Path(__file__).resolve()), "--step", "import"]
    imported += ["--device", device, "--result", str(result)]
    imported += ["--build-for", capability] if capability else []
    return subprocess.run(imported).returncode


def take_compiled_parts(wheel: Path, folder: Path) -> None:
    """Put the compiled parts of a wheel of this package beside its Python files in a folder.

    Raises
    ------
    ValueError
        The wheel has none.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(r"lnl_ext/_\w+\..*so", name)]
        if not names:
            raise ValueError(f"{wheel} has no compiled parts of lnl_ext")
        for name in names:
            (folder / Path(name).name).write_bytes(archive.read(name))
            print(f"{name} of {wheel.name}")


def import_package(capability: str, result: Path) -> int:
    """Import the package, and write what it was built with."""
    import lnl_ext

    info = lnl_ext.build_info()
    write_json(result, info)
    if capability and not info["cuda"]:
        print(f"lnl_ext was built without CUDA: {info}")
        return 1
    return 0


def run_own_step(
    name: str, part: str, device: str, quick: bool, seconds: float, result: Path
) -> int:
    """Run a step, or a part of it, in this process; write its result whenever it knows more."""
    import torch
    from gpu import checks, timings

    where = torch.device(device)

    def report(value: Any) -> None:
        write_json(result, value)

    if name in ("loss timings", "linear timings"):
        complete = timings.measure(name == "linear timings", where, quick, seconds, report)
        return 0 if complete else 1
    if name == "step timings":
        report(timings.time_step(where, quick, seconds / 4))
        return 0
    if name == "graph capture":
        report(checks.graph_capture(where, part))
        return 0
    if name == "beyond 2^31":
        report(checks.large_tensors(where, part, quick))
        return 0
    found = checks.calls(where, part, compare=name == "calls")
    report(found)
    for call, lines in found["failed"].items():
        print(call, *lines, sep="\n  ")
    return 1 if found["failed"] else 0


def file_name(gpu: str) -> str:
    """Return gpu_<name>.json with a name that every file system takes."""
    return f"gpu_{re.sub(r'[^A-Za-z0-9]+', '_', gpu).strip('_').lower()}.json"


def facts(device: str) -> dict[str, Any]:
    """Return what the figures were taken on."""
    import torch

    result: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "name": "cpu",
        "capability": "",
        "processors": os.cpu_count(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        result |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return result


def report_of(about: dict[str, Any], outcomes: list[Outcome], measured: bool) -> dict[str, Any]:
    """Return what is written: facts, targets held against the timings so far, all outcomes."""

    def rows(name: str) -> Rows:
        found = [outcome.detail for outcome in outcomes if outcome.name == name]
        return found[0]["rows"] if found and isinstance(found[0], dict) else []

    judged = judge(rows("loss timings"), rows("linear timings")) if measured else []
    return {**about, "targets": judged, "steps": [dataclasses.asdict(each) for each in outcomes]}


def print_report(report: dict[str, Any]) -> None:
    """Print times and targets."""
    for step in report["steps"]:
        if not step["name"].endswith("timings") or not isinstance(step["detail"], dict):
            continue
        if step["name"] == "step timings":
            times = step["detail"]["values"]
            print(f"{step['name']}: {step['detail']['case']}")
            for name, ratio in step["detail"]["ratios"].items():
                ours = times[name]["median"]
                print(f"  {name:44} {ours:9.3f} ms; the authors' over it {ratio['median']:.2f}")
            continue
        print(f"{step['name']} (Liger: {step['detail']['liger']})")
        for row in step["detail"]["rows"]:
            ratios = ", ".join(
                f"{values['median']:.2f} {name}"
                for name, values in row["ratios"].items()
                if name != "fused"
            )
            ours = row["values"]["fused"]["median"]
            speed = row["gigabytes_per_second"]["fused"]
            print(
                f"  {row['case']:40} {ours:9.3f} ms, {speed:7.1f} GB/s, {row['bandwidth']:.2f} of "
                f"a copy's; over ours: {ratios}"
            )
    for target in report["targets"]:
        word = "met" if target["met"] else "MISSED"
        print(
            f"target {word}: {target['case']}: {target['target']} is {target['got']}, "
            f"wanted {target['wanted']}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results; cpu: build")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--quick", action="store_true", help="tiny shapes; always on the CPU")
    parser.add_argument("--skip", nargs="*", default=[], choices=tuple(SECONDS))
    parser.add_argument("--build-for", metavar="9.0", help="default: this machine's GPU")
    parser.add_argument(
        "--prebuilt",
        nargs="?",
        const="",
        metavar="WHEEL",
        help="do not build: take the compiled parts of a wheel, or those that are in lnl_ext/",
    )
    # How this script calls itself for one step.
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    quick = options.quick or not on_gpu
    if options.step == "build":
        return build(options.device, options.build_for or "", options.prebuilt, options.result)
    if options.step == "import":
        return import_package(options.build_for or "", options.result)
    if options.step:
        return run_own_step(
            options.step, options.part, options.device, quick, options.seconds, options.result
        )
    import torch

    if on_gpu and not torch.cuda.is_available():
        print("this machine has no CUDA device that torch can use", file=sys.stderr)
        return 2
    if "tests" not in options.skip and not has_pytest():
        print(NO_PYTEST, file=sys.stderr)
        return 2
    about = facts(options.device)
    output = options.output or ROOT / ("benchmarks/results" if on_gpu else "build")
    output.mkdir(parents=True, exist_ok=True)
    path = output / file_name(about["name"])
    if options.prebuilt is not None:  # nothing is installed: all processes find it here
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    capability = options.build_for or about["capability"]
    outcomes = run_steps(
        plan(options.device, capability, quick, options.skip, options.minutes, options.prebuilt),
        60 * options.minutes - MARGIN * options.minutes / MINUTES,
        ROOT,
        lambda outcomes: write_json(path, report_of(about, outcomes, on_gpu and not quick)),
    )
    print_report(report_of(about, outcomes, on_gpu and not quick))
    print(f"written to {path}")
    return 1 if any(outcome.status in ("failed", "killed") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
