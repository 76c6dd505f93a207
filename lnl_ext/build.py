"""What the compiled module was built with, and the check that it fits the installed torch."""

from __future__ import annotations

import re
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from ._version import __version__

_FACTS = re.compile(rb"lnl_ext build facts\|([^\0]*)\|\0")


def _parse_facts(text: str) -> dict[str, str]:
    return dict(fact.split("=", 1) for fact in text.split("|"))


def _facts_of_file(path: Path) -> dict[str, str]:
    match = _FACTS.search(path.read_bytes())
    if match is None:
        raise ImportError(f"{path} is not a compiled module of lnl_ext: reinstall lnl_ext")
    return _parse_facts(match.group(1).decode())


def _extension_file() -> Path:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).parent / f"_C{suffix}"
        if path.exists():
            return path
    raise ImportError(f"lnl_ext is not compiled: no _C{EXTENSION_SUFFIXES[0]} in {Path(__file__).parent}")


_facts = _facts_of_file(_extension_file())

from . import _C  # noqa: E402


def build_info() -> dict[str, Any]:
    """Return what the package was built with.

    Returns
    -------
    dict
        version, torch, cuda (bool), cuda_version, cuda_arch_list, cpu_capability, compiler.
    """
    cudart = int(_facts["cudart"])
    return {
        "version": __version__,
        "torch": _facts["torch"],
        "cuda": cudart > 0,
        "cuda_version": f"{cudart // 1000}.{cudart % 1000 // 10}" if cudart else None,
        "cuda_arch_list": _facts["cuda_arch_list"].split(",") if cudart else [],
        "cpu_capability": _C.cpu_capability(),
        "compiler": _facts["compiler"],
    }


assert torch
