"""Everything that needs a GPU, in one command of under eight minutes.

    python benchmarks/gpu_check.py [--output DIR] [--minutes 8] [--skip build tests sanitizer]

Builds the package for this machine's GPU, runs the Python tests (which take CUDA tensors where
there are some), captures a CUDA graph, runs compute-sanitizer if it is installed, then times the
loss against PyTorch eager, torch.compile and, if installed, Liger's cross-entropy, all in one run,
and writes gpu_<name>.json with the achieved bandwidth over that of a copy. Exits with 1 where a
check failed; a target that was missed is reported and does not fail.

`--device cpu` runs the same code on the CPU with tiny shapes: it proves that the script works, and
its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"bandwidth": 0.85, "eager": 3.0, "compiled": 1.2}
LARGE = 64 * 2**20  # bytes of logits from which the bandwidth target holds
SHAPES = (
    ((384, 8, 14, 14), "float32"),
    ((4096, 8, 14, 14), "float32"),
    ((4096, 8, 14, 14), "bfloat16"),
    ((65536, 12), "float32"),
    ((2**22, 12), "float32"),
    ((2**22, 12), "bfloat16"),
    ((65536, 1000), "float32"),
    ((65536, 1000), "bfloat16"),
    ((4096, 32000), "float32"),
    ((4096, 32000), "bfloat16"),
    ((1024, 128256), "bfloat16"),
    ((64, 8, 512, 512), "float32"),
    ((64, 150, 128, 128), "float32"),
)
TINY_SHAPES = (((4, 8, 3, 3), "float32"), ((16, 12), "bfloat16"))
ENTROPY_WEIGHT = 0.01


@dataclasses.dataclass
class Step:
    """One part of the run."""

    name: str
    status: str  # passed, failed, skipped
    seconds: float
    detail: Any = None


class Clock:
    """The time left of the whole run."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Return the seconds left."""
        return self.end - time.monotonic()


class SkippedError(Exception):
    """A step that cannot run here, with the reason."""


def perform(name: str, steps: list[Step], action: Callable[[], Any]) -> None:
    """Run a step and record how it ended, whatever it raises: the later ones run all the same."""
    begin = time.monotonic()
    try:
        status, detail = "passed", action()
    except SkippedError as reason:
        status, detail = "skipped", str(reason)
    except Exception:
        status, detail = "failed", traceback.format_exc().splitlines()[-20:]
    steps.append(Step(name, status, round(time.monotonic() - begin, 1), detail))
    print(f"{name}: {status} in {steps[-1].seconds} s", flush=True)
    if status != "passed":
        print(f"  {detail}", flush=True)


def command(arguments: list[str], limit: float, environment: dict[str, str] | None = None) -> str:
    """Run a command in the repository; return its output, raise with its end where it fails."""
    result = subprocess.run(
        arguments,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=max(1.0, limit),
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(arguments)}:\n{result.stdout[-3000:]}")
    return result.stdout


# ---- steps ---------------------------------------------------------------------------------


def build(clock: Clock) -> str:
    """Install the package for this GPU alone, in place."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    environment = {"LNL_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    arguments = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."]
    command([sys.executable, *arguments], min(clock.left(), 240), environment)
    return environment["TORCH_CUDA_ARCH_LIST"]


def tests(clock: Clock) -> dict[str, int]:
    """Run the Python tests; return pytest's counts."""
    arguments = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "python_tests"]
    output = command(arguments, min(clock.left() - 120, 300))
    return counts_of(output)


def counts_of(output: str) -> dict[str, int]:
    """Return {"passed": n, "skipped": n, ...} from the last line of pytest."""
    lines = [line for line in output.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    if not lines:
        raise RuntimeError(f"no summary in the output of pytest:\n{output[-500:]}")
    return {word: int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", lines[-1])}


def sanitizer(clock: Clock) -> str:
    """Run a few calls under compute-sanitizer's memcheck and racecheck."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise SkippedError("compute-sanitizer is not installed")
    script = str(Path(__file__).resolve())
    for check in ("memcheck", "racecheck"):
        arguments = [tool, "--tool", check, "--error-exitcode", "1", sys.executable, script]
        command([*arguments, "--few-calls"], min(clock.left() - 90, 90))
    return "memcheck and racecheck found nothing"


def few_calls(device: str) -> None:
    """Run every kind of kernel once: for compute-sanitizer, which slows them down a hundredfold."""
    import torch

    import lnl_ext

    for shape in ((33, 12), (5, 100), (3, 900), (2, 3000), (2, 8, 6, 6), (2, 5, 7), (2, 40, 33)):
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(shape, device=device).to(dtype).requires_grad_()
            target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
            for smoothing in (0.0, 0.1):
                loss = lnl_ext.fused_bias_loss(
                    logits, target, entropy_weight=ENTROPY_WEIGHT, label_smoothing=smoothing
                )
                loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()


def graph_capture() -> str:
    """Capture a forward and backward in a CUDA graph and replay it on other numbers."""
    import torch

    import lnl_ext

    logits = torch.randn(64, 8, 14, 14, device="cuda", requires_grad=True)
    target = torch.randint(8, (64, 14, 14), device="cuda")

    def step() -> torch.Tensor:
        loss = lnl_ext.fused_bias_loss(logits, target, entropy_weight=ENTROPY_WEIGHT, reversal=0.1)
        (gradient,) = torch.autograd.grad(loss, logits)
        return gradient

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
    graph.replay()
    torch.cuda.synchronize()
    if not torch.equal(captured, step()):
        raise RuntimeError("the replayed graph gives other gradients than the same call outside")
    return "replayed bit by bit"


def large_tensor() -> str:
    """Take a tensor of more than 2^31 elements, whose last rows must be right."""
    import torch

    import lnl_ext

    rows, classes = 2**28 + 3, 8
    needed = 3 * rows * classes * 2
    free, _ = torch.cuda.mem_get_info()
    if free < 1.2 * needed + 8 * rows:
        raise SkippedError(f"{free / 2**30:.0f} GiB free, {1.2 * needed / 2**30:.0f} needed")
    logits = torch.zeros(rows, classes, device="cuda", dtype=torch.bfloat16)
    tail = torch.randn(16, classes, device="cuda").to(torch.bfloat16)
    logits[-16:] = tail
    target = torch.zeros(rows, device="cuda", dtype=torch.int64)
    logits.requires_grad_()
    loss = lnl_ext.fused_bias_loss(logits, target, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    small = tail.clone().requires_grad_()
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(small.float(), target[:16], reduction="sum"), small
    )[0]
    torch.testing.assert_close(gradient[-16:], expected, rtol=1e-2, atol=1e-3)
    return f"{rows * classes} elements"


# ---- timing --------------------------------------------------------------------------------


def timed(action: Callable[[], Any], device: str) -> float:
    """Return the seconds of one run on the device."""
    import torch

    if device == "cpu":
        begin = time.perf_counter()
        action()
        return time.perf_counter() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    action()
    end_event.record()
    end_event.synchronize()
    return float(begin_event.elapsed_time(end_event)) / 1000


def competitors(logits: Any, target: Any) -> dict[str, Callable[[], Any]]:
    """Return forward and backward of each way to compute the loss, and a copy of the logits."""
    import torch

    import lnl_ext

    def plain(z: torch.Tensor) -> torch.Tensor:
        log_p = torch.log_softmax(z.float(), 1)
        entropy = -(log_p.exp() * log_p).sum(1).mean()
        return torch.nn.functional.nll_loss(log_p, target) - ENTROPY_WEIGHT * entropy

    compiled = torch.compile(plain, dynamic=False)

    def both(loss: Callable[[Any], Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(logits), logits)

    into = torch.empty_like(logits)
    ways: dict[str, Callable[[], Any]] = {
        "copy": lambda: into.copy_(logits.detach()),
        "lnl_ext": both(
            lambda z: lnl_ext.fused_bias_loss(z, target, entropy_weight=ENTROPY_WEIGHT)
        ),
        "eager": both(plain),
        "compiled": both(compiled),
    }
    if importlib.util.find_spec("liger_kernel") is not None and logits.dim() == 2:
        from liger_kernel.transformers.functional import liger_cross_entropy

        # Without the entropy, and it overwrites the logits: a copy is what it gets.
        ways["liger cross-entropy"] = lambda: torch.autograd.grad(
            liger_cross_entropy(logits + 0, target), logits
        )
    return ways


def time_shape(shape: tuple[int, ...], dtype: str, device: str, rounds: int) -> dict[str, Any]:
    """Time all ways on one shape, taking turns; return medians and what follows from them."""
    import torch

    logits = torch.randn(shape, device=device).to(getattr(torch, dtype)).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    ways = competitors(logits, target)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for action in ways.values():
        for _ in range(3):
            action()
    for _ in range(rounds):
        for name, action in ways.items():
            seconds[name].append(timed(action, device))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    size = logits.numel() * logits.element_size()
    # A copy reads and writes every element once, which is also the least that the loss can do.
    return {
        "shape": shape,
        "dtype": dtype,
        "bytes": size,
        "seconds": medians,
        "spread": {name: max(each) / min(each) for name, each in seconds.items()},
        "bandwidth": 2 * size / medians["lnl_ext"],
        "over_copy": medians["copy"] / medians["lnl_ext"],
        "over_eager": medians["eager"] / medians["lnl_ext"],
        "over_compiled": medians["compiled"] / medians["lnl_ext"],
    }


def timings(clock: Clock, device: str) -> list[dict[str, Any]]:
    """Time all shapes as long as there is time."""
    shapes, rounds = (TINY_SHAPES, 3) if device == "cpu" else (SHAPES, 25)
    rows = []
    for shape, dtype in shapes:
        if clock.left() < 15:
            print(f"no time left for {shape} {dtype} and what follows")
            break
        rows.append(time_shape(shape, dtype, device, rounds))
        row = rows[-1]
        print(
            f"  {shape!s:22} {dtype:9} {1e6 * row['seconds']['lnl_ext']:9.1f} us,"
            f" {row['over_copy']:.2f} of copy, {row['over_eager']:.1f}x eager,"
            f" {row['over_compiled']:.2f}x compiled",
            flush=True,
        )
    return rows


def missed_targets(rows: list[dict[str, Any]]) -> list[str]:
    """Return which of TARGETS are missed, and where."""
    missed = []
    for row in rows:
        where = f"{tuple(row['shape'])} {row['dtype']}"
        if row["bytes"] >= LARGE and row["over_copy"] < TARGETS["bandwidth"]:
            missed.append(f"{where}: {row['over_copy']:.2f} of copy bandwidth")
        if row["over_eager"] < TARGETS["eager"]:
            missed.append(f"{where}: {row['over_eager']:.2f}x eager")
        if row["over_compiled"] < TARGETS["compiled"]:
            missed.append(f"{where}: {row['over_compiled']:.2f}x torch.compile")
    return missed


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
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        result |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    else:
        result["name"] = "cpu"
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--skip", nargs="*", default=[], choices=("build", "tests", "sanitizer"))
    parser.add_argument("--few-calls", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    import torch

    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("this machine has no CUDA device that torch can use", file=sys.stderr)
        return 2
    if options.few_calls:
        few_calls(options.device)
        return 0
    clock = Clock(options.minutes)
    steps: list[Step] = []
    if on_gpu and "build" not in options.skip:
        perform("build", steps, lambda: build(clock))
    if on_gpu and "tests" not in options.skip:
        perform("tests", steps, lambda: tests(clock))
    if on_gpu and "sanitizer" not in options.skip:
        perform("sanitizer", steps, lambda: sanitizer(clock))
    perform("calls", steps, lambda: few_calls(options.device))
    if on_gpu:
        perform("graph capture", steps, graph_capture)
        perform("large tensor", steps, large_tensor)
    perform("timings", steps, lambda: timings(clock, options.device))
    rows = steps[-1].detail if steps[-1].status == "passed" else []
    missed = missed_targets(rows) if on_gpu else []
    report = {
        **facts(options.device),
        "targets": TARGETS,
        "missed": missed,
        "steps": [dataclasses.asdict(step) for step in steps],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / file_name(report["name"])
    path.write_text(json.dumps(report, indent=1) + "\n")
    for line in missed:
        print(f"target missed: {line}")
    print(f"written to {path}")
    return 1 if any(step.status == "failed" for step in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
