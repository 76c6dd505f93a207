"""What the compiled module was built with, and the check that it fits the installed torch.

Importing this module loads ``lnl_ext._C``, which registers the operators. A module built for
another torch is refused before it is loaded, because loading it may crash.
"""

from __future__ import annotations

import json
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, TypedDict

from lnl_ext._version import __version__

try:
    import torch
except ModuleNotFoundError as error:
    raise ImportError(
        f"lnl_ext needs PyTorch, and Python finds no module named {error.name!r}: "
        "install torch (pip install 'torch>=2.9')"
    ) from error

_PACKAGE = Path(__file__).resolve().parent
_REBUILD = (
    "rebuild lnl_ext against the installed torch (pip install --no-deps --no-cache-dir "
    "--force-reinstall, of the same source as before)"
)


class BuildInfo(TypedDict):
    """The result of :func:`build_info`."""

    version: str
    torch: str
    cuda: bool
    cuda_version: str | None
    cuda_arch_list: list[str]
    cpu_capability: str
    compiler: str


def _compiled_file() -> Path:
    for suffix in EXTENSION_SUFFIXES:
        path = _PACKAGE / f"_C{suffix}"
        if path.exists():
            return path
    raise ImportError(
        f"lnl_ext in {_PACKAGE} is not compiled for this Python (no _C{EXTENSION_SUFFIXES[0]}): "
        "run `pip install .` in its source folder; if it is installed already, start Python "
        "elsewhere than in that folder, which hides the installed package"
    )


def _read_facts(module: Path) -> dict[str, Any]:
    """Read what build_support/extension.py wrote beside the module, which is not loaded."""
    path = module.with_suffix(".json")
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ImportError(
            f"{path} is missing, which says what {module.name} was built with: reinstall lnl_ext"
        ) from None
    return facts


def _check_torch(facts: dict[str, Any], torch_version: str, torch_cuda: str | None) -> None:
    """Raise ImportError if a module with these facts cannot work with the installed torch.

    torch keeps its binary interface within a minor version, CUDA within a major one.
    """
    built_for = facts["torch"]
    if built_for.split(".")[:2] != torch_version.split(".")[:2]:
        raise ImportError(
            f"lnl_ext was built for torch {built_for}, but torch {torch_version} is installed: "
            f"{_REBUILD}, or install torch {built_for.partition('+')[0]}"
        )
    cuda = facts["cuda"]
    if cuda and (torch_cuda is None or cuda.split(".")[0] != torch_cuda.split(".")[0]):
        installed = f"with CUDA {torch_cuda}" if torch_cuda else "without CUDA"
        raise ImportError(
            f"lnl_ext was built with CUDA {cuda} for torch {built_for}, but the installed torch "
            f"{torch_version} is built {installed}: {_REBUILD}, or install torch {built_for}"
        )


_facts = _read_facts(_compiled_file())
_check_torch(_facts, torch.__version__, torch.version.cuda)

try:
    from lnl_ext import _C
except ImportError as error:
    raise ImportError(
        f"lnl_ext was built for torch {_facts['torch']} and does not load with the installed torch "
        f"{torch.__version__}: {_REBUILD} ({error})"
    ) from error


def build_info() -> BuildInfo:
    """Return what the installed package was built with.

    Returns
    -------
    dict
        version : str
            Version of lnl_ext.
        torch : str
            Version of the torch that it was compiled against.
        cuda : bool
            Whether it has CUDA kernels; independent of whether there is a GPU.
        cuda_version : str or None
            Version of the CUDA toolkit, as in "13.0".
        cuda_arch_list : list of str
            Architectures of the CUDA kernels, as in ["sm_90", "compute_90"]; compute_* is PTX.
        cpu_capability : str
            Instruction set that torch uses on this processor: "DEFAULT", "AVX2", "AVX512", ...
        compiler : str
            Name and version of the C++ compiler.
    """
    return {
        "version": __version__,
        "torch": _facts["torch"],
        "cuda": _facts["cuda"] is not None,
        "cuda_version": _facts["cuda"],
        "cuda_arch_list": list(_facts["cuda_arch_list"]),
        "cpu_capability": _C.cpu_capability(),
        "compiler": _C.compiler,
    }
