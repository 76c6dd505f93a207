"""One candidate's peak of extra memory, in a process of its own: ``python -m timing.peak``.

Prints the bytes. The peak is that of the resident memory (``VmHWM`` after a reset), which also sees
what is not a tensor; malloc is set to give freed memory back, so that memory left from a warm-up
does not hide a need.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch

from . import linear, losses

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""For the environment of the process: larger blocks are mapped, and unmapped when freed."""


def status(field: str) -> int:
    """Return a size of this process in bytes, as in ``/proc/self/status``."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, value = line.split(":", 1)
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def extra_peak(run: Callable[[], object], device: torch.device) -> int:
    """Return by how many bytes memory rises above what is held before ``run``."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - held
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM := VmRSS
    held = status("VmRSS")
    run()
    return status("VmHWM") - held


def prepare(
    operation: str, name: str, shape: list[int], device: torch.device
) -> Callable[[], None]:
    """Return the measured step, warmed up: on a few rows, or where it compiles on all of them."""
    if operation == "linear":
        inputs = linear.make_inputs(linear.Case(shape[0], shape[1], shape[2]), device)
        linear_loss = linear.make_loss(name)
        few = linear.Inputs(inputs.features[:8], inputs.weight, inputs.bias, inputs.target[:8])

        def run_linear() -> None:
            linear.step(linear_loss, inputs)

        if name == "compile":
            run_linear()
        else:
            linear_loss(*few).backward()  # type: ignore[no-untyped-call]
        for tensor in inputs[:3]:
            tensor.grad = None
        return run_linear
    logits, target = losses.make_inputs(tuple(shape), device)
    loss = losses.make_loss(name)

    def run() -> None:
        losses.step(loss, logits, target)

    if name == "compile":
        run()
    else:
        loss(logits[:8], target[:8]).backward()  # type: ignore[no-untyped-call]
    logits.grad = None
    return run


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operation", choices=["loss", "linear"])
    parser.add_argument("name")
    parser.add_argument("shape", type=int, nargs="+")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = prepare(options.operation, options.name, options.shape, options.device)
    print(json.dumps({"bytes": extra_peak(run, options.device)}))


if __name__ == "__main__":
    main()
