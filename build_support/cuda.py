"""Whether lnl_ext is built with CUDA, and with which toolkit, architectures and headers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import PlatformError

MODES = ("auto", "0", "1")


@dataclass(frozen=True)
class Toolkit:
    """An installed CUDA toolkit."""

    nvcc: str
    home: Path
    version: str  # "13.0"


def run(command: list[str]) -> str:
    """Return what a command prints on both streams; a failure ends the build with that text."""
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode:
        raise PlatformError(f"`{' '.join(command)}` failed: {result.stdout.strip()}")
    return result.stdout


def nvcc_path() -> str | None:
    """Return the nvcc of CUDA_HOME (or CUDA_PATH), of PATH or of /usr/local/cuda, in this order."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_toolkit() -> Toolkit | None:
    """Return the toolkit that nvcc belongs to, or None without nvcc.

    nvcc itself is asked for its folder, since the one on PATH may be a script that starts it.
    """
    nvcc = nvcc_path()
    if nvcc is None:
        return None
    release = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"]))
    home = re.search(r"^#\$ TOP=(.+)$", run([nvcc, "--dryrun", "-x", "cu", os.devnull]), re.M)
    if release is None or home is None:
        raise PlatformError(f"{nvcc} does not tell its version and folder: is it NVIDIA's nvcc?")
    return Toolkit(nvcc, Path(home.group(1).strip()).resolve(), release.group(1))


def choose_toolkit(torch_version: str, torch_cuda: str | None) -> Toolkit | None:
    """Return the toolkit to build with, or None for a build without CUDA.

    Parameters
    ----------
    torch_version, torch_cuda
        ``torch.__version__`` and ``torch.version.cuda`` of the torch to build against.

    Raises
    ------
    setuptools.errors.PlatformError
        If LNL_EXT_CUDA is none of auto, 0 and 1; if it is 1 and torch has no CUDA or there is no
        nvcc; if nvcc is of another major version than torch's CUDA.
    """
    mode = os.environ.get("LNL_EXT_CUDA", "auto")
    if mode not in MODES:
        raise PlatformError(f"LNL_EXT_CUDA is {mode!r}, expected one of {', '.join(MODES)}")
    if mode == "0":
        return None
    if torch_cuda is None:
        if mode == "1":
            raise PlatformError(
                f"LNL_EXT_CUDA=1, but the installed torch {torch_version} is built without CUDA: "
                "install a CUDA build of torch, or set LNL_EXT_CUDA=0"
            )
        return None
    toolkit = find_toolkit()
    if toolkit is None:
        if mode == "1":
            raise PlatformError(
                f"LNL_EXT_CUDA=1, but nvcc is missing: it is neither in $CUDA_HOME/bin nor on PATH "
                f"nor in /usr/local/cuda/bin; install the CUDA toolkit {torch_cuda}, which torch "
                f"{torch_version} is built with, or set LNL_EXT_CUDA=0"
            )
        return None
    if toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        raise PlatformError(
            f"{toolkit.nvcc} is of CUDA {toolkit.version}, but the installed torch {torch_version} "
            f"is built with CUDA {torch_cuda}: point CUDA_HOME to a CUDA {torch_cuda} toolkit, "
            "install a matching torch, or set LNL_EXT_CUDA=0 to build without CUDA"
        )
    return toolkit


def default_architectures(nvcc: str, torch_architectures: list[str]) -> str:
    """Return TORCH_CUDA_ARCH_LIST for torch's own architectures, as far as nvcc knows them.

    Machine code runs on later devices of its major version, too: of each version the first is made.

    Parameters
    ----------
    nvcc
        The compiler.
    torch_architectures
        Names as in ``sm_90``; the newest one gets PTX as well, for the devices that come after it.
    """
    known = run([nvcc, "--list-gpu-code"]).split()
    common = [name for name in torch_architectures if name in known]
    if not common:
        raise PlatformError(
            f"{nvcc} knows none of torch's architectures ({' '.join(torch_architectures)}): set "
            "TORCH_CUDA_ARCH_LIST"
        )
    numbers = sorted(re.sub(r"sm_(\d+)(\d\w?)$", r"\1.\2", name) for name in common)
    numbers.sort(key=lambda number: tuple(map(int, re.findall(r"\d+", number))), reverse=True)
    of_major = {number.partition(".")[0]: number for number in numbers}  # the last one is kept
    return ";".join(reversed(of_major.values())) + "+PTX"


def with_shared_ptx(gencode: list[str]) -> list[str]:
    """Return nvcc's flags for the same devices, with PTX made once for those of a generation.

    To make PTX takes as long as to make machine code of it for two architectures, and the sources
    tell no more than three generations apart: from sm_80 on there are asynchronous copies, from
    sm_90 on bulk copies. PTX of the oldest of a generation serves its newer ones; of the last one
    also those that do not exist yet. Architectures with a letter, as in sm_90a, keep their own.

    Parameters
    ----------
    gencode
        Flags as in ``-gencode=arch=compute_90,code=sm_90``.
    """
    pairs = [re.fullmatch(r"-gencode=arch=compute_(\w+),code=(\w+)", flag) for flag in gencode]
    given = [int(pair[1]) for pair in pairs if pair and pair[1].isdigit() and int(pair[1]) >= 80]
    flags = []
    for flag, pair in zip(gencode, pairs, strict=True):
        if pair and pair[1].isdigit() and int(pair[1]) >= 80:
            bulk = int(pair[1]) >= 90
            oldest = min(number for number in given if (number >= 90) == bulk)
            code = f"compute_{oldest}" if pair[2].startswith("compute") else pair[2]
            flag = f"-gencode=arch=compute_{oldest},code={code}"
        flags.append(flag)
    return flags
