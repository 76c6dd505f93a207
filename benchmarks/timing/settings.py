"""What a measurement was asked for, and the machine it ran on."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path
from typing import Any

import torch

import lnl_ext


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of the command line that the measurements read.

    Attributes
    ----------
    device
        Where the tensors are.
    threads
        CPU threads of PyTorch.
    seconds
        About how long a case is measured, after its warm-up.
    quick
        Small shapes and few rounds: whether it runs, not how fast it is.
    """

    device: torch.device
    threads: int
    seconds: float
    quick: bool


def processor_name() -> str:
    """Return the CPU's name as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment(settings: Settings) -> dict[str, Any]:
    """Return what a reader must know of the machine, as plain data."""
    cuda = settings.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(settings.device) if cuda else "cpu",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "cpu_capability": lnl_ext.build_info()["cpu_capability"],
        "load_average_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def describe(values: dict[str, Any]) -> str:
    """Return :func:`environment`'s facts as one line."""
    where = values["processor"]
    if values["device"] != "cpu":
        where = f"{values['device']}, {where}"
    return (
        f"{where}, {values['threads']} of {values['cores']} cores, {values['cpu_capability']}; "
        f"torch {values['torch']}, Python {values['python']}; load before the run "
        f"{values['load_average_before']}"
    )
