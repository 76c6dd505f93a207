"""What the compiled parts were built with, and the check that they work with the installed torch.

Importing this module loads the operators: those on CPU tensors always, those on CUDA tensors where
torch is built with CUDA of the same major version. They use torch's stable interface alone, so that
what was built for one release works with every later one.
"""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TypedDict

from lnl_ext._version import __version__

try:
    import torch
except ModuleNotFoundError as error:
    raise ImportError(
        f"lnl_ext needs PyTorch, and Python finds no module named {error.name!r}: "
        "install torch (pip install 'torch>=2.11')"
    ) from error

_PACKAGE = Path(__file__).resolve().parent
_MINIMUM_TORCH = (2, 11)


class BuildInfo(TypedDict):
    """The result of :func:`build_info`."""

    version: str
    torch: str
    cuda: bool
    cuda_version: str | None
    cuda_arch_list: list[str]
    cpu_capability: str
    compiler: str


def _check_torch(version: str) -> None:
    """Raise ImportError for a torch whose interface lacks what the operators use."""
    major, minor = (int("".join(filter(str.isdigit, part))) for part in version.split(".")[:2])
    if (major, minor) < _MINIMUM_TORCH:
        wanted = ".".join(map(str, _MINIMUM_TORCH))
        raise ImportError(
            f"lnl_ext needs torch >= {wanted}, but torch {version} is installed: "
            f"run `pip install 'torch>={wanted}'`"
        )


def _compiled_file(name: str) -> Path | None:
    for suffix in EXTENSION_SUFFIXES:
        path = _PACKAGE / f"{name}{suffix}"
        if path.exists():
            return path
    return None


def _load_operators(name: str) -> None:
    path = _compiled_file(name)
    try:
        if path is None:
            raise OSError(f"{_PACKAGE / name}{EXTENSION_SUFFIXES[0]} is missing")
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"lnl_ext was built for torch {_C.torch} and does not load with the installed torch "
            f"{torch.__version__}: reinstall lnl_ext ({error})"
        ) from error


_check_torch(torch.__version__)
if _compiled_file("_C") is None:
    raise ImportError(
        f"lnl_ext in {_PACKAGE} is not compiled for this Python (no _C{EXTENSION_SUFFIXES[0]}): "
        "run `pip install .` in its source folder; if it is installed already, start Python "
        "elsewhere than in that folder, which hides the installed package"
    )
from lnl_ext import _C  # noqa: E402

# CUDA keeps its binary interface within a major version.
_has_cuda = bool(_C.cuda) and _C.cuda.split(".")[0] == (torch.version.cuda or "").split(".")[0]
_load_operators("_cpu")
if _has_cuda:
    _load_operators("_cuda")


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
            Whether its CUDA kernels are there and fit the installed torch; independent of whether
            there is a GPU.
        cuda_version : str or None
            Version of the CUDA toolkit, as in "13.0".
        cuda_arch_list : list of str
            Architectures of the CUDA kernels, as in ["sm_90", "compute_90"]; compute_* is PTX.
        cpu_capability : str
            Instruction set of the CPU kernels on this processor: "DEFAULT", "AVX2" or "AVX512".
        compiler : str
            Name and version of the C++ compiler.
    """
    return {
        "version": __version__,
        "torch": _C.torch,
        "cuda": _has_cuda,
        "cuda_version": _C.cuda if _has_cuda else None,
        "cuda_arch_list": _C.cuda_arch_list.split(",") if _has_cuda else [],
        "cpu_capability": _C.cpu_capability(),
        "compiler": _C.compiler,
    }
