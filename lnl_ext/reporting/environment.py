"""What a run was made with."""

from __future__ import annotations

import os
import platform

import torch

from lnl_ext.build import build_info

__all__ = ["environment"]


def environment() -> dict[str, str]:
    """Name the software and the machine that decide a run's results and times."""
    info = build_info()
    cores = f"{torch.get_num_threads()} threads, {os.cpu_count()} cores"
    return {
        "lnl_ext": f"{info['version']}, {info['cpu_capability']} kernels",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "CPU": cores,
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
