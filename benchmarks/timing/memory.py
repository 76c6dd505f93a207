"""Peak of extra memory of loss and linear, each candidate in a process of its own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import linear
from .peak import MALLOC
from .settings import Settings

TITLE = "Peak of extra memory of forward and backward, float32"
NOTES = [
    "What resident memory rises by above the inputs, until and including the gradients, which "
    "every way must make: they are the floor, `gradients`. Each figure is from a process of its "
    "own, which has warmed up (benchmarks/timing/peak.py); on CUDA it is what the allocator "
    "counts.",
]
CASES = [
    ("loss", (65536, 12)),
    ("loss", (2048, 32000)),
    ("linear", (65536, 512, 12)),
    ("linear", (8192, 1024, 32000)),
]
QUICK_CASES = [("loss", (64, 1000))]
LONGEST = 600
"""Seconds after which a candidate's process is ended: an error instead of a wait without end."""
BENCHMARKS = Path(__file__).resolve().parent.parent


def gradients(operation: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of the gradients for the inputs, in float32."""
    if operation == "loss":
        return 4 * math.prod(shape)
    n, d, c = shape
    return 4 * (n * d + c * d + c)


def peak(operation: str, name: str, shape: tuple[int, ...], settings: Settings) -> int:
    """Return a candidate's extra bytes."""
    if settings.device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise RuntimeError("the peak of memory is read from Linux's /proc, which is not here")
    search = os.pathsep.join([str(BENCHMARKS), *map(os.path.abspath, sys.path)])
    command = [sys.executable, "-m", "timing.peak", operation, name, *map(str, shape)]
    command += ["--threads", str(settings.threads), "--device", str(settings.device)]
    done = subprocess.run(
        command,
        env={**os.environ, **MALLOC, "PYTHONPATH": search},
        cwd=BENCHMARKS,  # -m looks here first: not in a source tree without the built module
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=LONGEST,
    )
    return int(json.loads(done.stdout.splitlines()[-1])["bytes"])


def measure(settings: Settings) -> dict[str, Any]:
    """Measure all cases."""
    rows = []
    for operation, shape in QUICK_CASES if settings.quick else CASES:
        names = linear.names() if operation == "linear" else ["fused", "eager", "compile"]
        if settings.quick:
            names = ["fused", "eager"]
        found = {name: peak(operation, name, shape, settings) for name in names}
        found["gradients"] = gradients(operation, shape)
        mebibytes = {name: round(value / 2**20, 2) for name, value in found.items()}
        rows.append(
            {
                "case": f"{operation} {'x'.join(map(str, shape))}",
                "rounds": 1,
                "values": {name: _constant(value) for name, value in mebibytes.items()},
                "ratios": {
                    name: _constant(round(value / max(1, found["fused"]), 3))
                    for name, value in found.items()
                },
            }
        )
    return {"title": TITLE, "base": "fused", "ratio": "its memory over ours", "rows": rows} | {
        "unit": "MiB",
        "notes": NOTES,
    }


def _constant(value: float) -> dict[str, float]:
    return {"median": value, "q1": value, "q3": value}
