"""The compiled module lnl_ext._C: its sources, flags and the command that builds it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

from . import cuda
from .backend import MINIMUM_TORCH, TORCH_REQUIREMENT, release

NAME = "lnl_ext._C"
SOURCE_LIST = Path(__file__).resolve().parent.parent / "csrc" / "sources.txt"
# No -march: units that use wider vectors choose them themselves and are entered at run time. No
# -std: torch sets the one that its headers need.
UNIX_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden"]
MSVC_FLAGS = ["/O2"]


def sources(section: str) -> list[str]:
    """Return the paths in ``[section]`` of csrc/sources.txt, relative to the repository's root."""
    current, paths = "", []
    for line in SOURCE_LIST.read_text(encoding="utf-8").splitlines():
        entry = line.partition("#")[0].strip()
        if entry.startswith("["):
            current = entry.strip("[]")
        elif entry and current == section:
            paths.append(entry)
    return paths


def check_compiler() -> None:
    """Raise PlatformError if there is no C++ compiler, or no header to compile Python modules."""
    if os.name == "nt":  # setuptools finds MSVC by itself and says so when it does not.
        return
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        raise PlatformError(
            f"no C++ compiler: {compiler!r} ({'from CXX' if 'CXX' in os.environ else 'the default'}"
            ") is not on PATH; install g++ or clang++, or set CXX"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise PlatformError(
            f"{header} is missing: install the development files of Python "
            f"{sysconfig.get_python_version()} (python3-dev on Debian and Ubuntu)"
        )


def compiler_flags(openmp: bool) -> list[str]:
    """Return the C++ compiler's flags; `openmp` is whether torch's own threads are OpenMP's.

    at::parallel_for is a template with a pragma, which runs on one thread where that is not
    compiled. The flag is not passed to the linker: torch brings its own OpenMP runtime, and there
    must not be a second one beside it.
    """
    if os.name == "nt":
        return [*MSVC_FLAGS, *(["/openmp"] if openmp else [])]
    apple = sys.platform == "darwin"  # Apple's clang takes the flag only through its preprocessor
    pragma = ["-Xpreprocessor", "-fopenmp"] if apple else ["-fopenmp"]
    return [*UNIX_FLAGS, *(pragma if openmp else [])]


def extension_module() -> tuple[Extension, dict[str, Any]]:
    """Return the complete module for the torch and the CUDA toolkit found on this machine.

    Returns
    -------
    Extension
    dict
        What ``lnl_ext/build.py`` has to know of the build: ``torch``, the version; ``cuda``, the
        toolkit's version or None; ``cuda_arch_list``.
    """
    import torch
    from torch.utils import cpp_extension

    if release(torch.__version__) < MINIMUM_TORCH:
        raise PlatformError(
            f"lnl_ext needs {TORCH_REQUIREMENT}, and this environment has torch "
            f"{torch.__version__}: upgrade it first"
        )
    toolkit = cuda.choose_toolkit(torch.__version__, torch.version.cuda)
    # More jobs than this need more memory than small machines have: torch's headers take 1 GB each.
    jobs = os.environ.setdefault("MAX_JOBS", "2")
    openmp = bool(torch.backends.openmp.is_available())  # type: ignore[no-untyped-call]
    flags = {"cxx": compiler_flags(openmp)}
    facts: dict[str, Any] = {"torch": str(torch.__version__), "cuda": None, "cuda_arch_list": []}
    if toolkit is None:
        return cpp_extension.CppExtension(NAME, sources("cpu"), extra_compile_args=flags), facts

    cpp_extension.CUDA_HOME = str(toolkit.home)
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        torch_architectures = (torch._C._cuda_getArchFlags() or "").split()
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda.default_architectures(
            toolkit.nvcc, torch_architectures
        )
    architectures = cpp_extension._get_cuda_arch_flags()  # parses TORCH_CUDA_ARCH_LIST
    codes = sorted((flag.rpartition("code=")[2] for flag in architectures), key=architecture_order)
    module = cpp_extension.CUDAExtension(
        NAME,
        sources("cpu") + sources("cuda"),
        include_dirs=[
            str(toolkit.home / "include"),
            *cuda.missing_header_folders(toolkit, Path(torch.__file__).parent),
        ],
        extra_compile_args={**flags, "nvcc": ["-O3", "--threads", jobs, *architectures]},
    )
    return module, {**facts, "cuda": toolkit.version, "cuda_arch_list": codes}


def architecture_order(code: str) -> tuple[bool, int]:
    """Sort key: sm_75 before sm_100, and compute_* (PTX) last."""
    kind, _, number = code.partition("_")
    return kind == "compute", int(number.rstrip("af"))


def facts_file(module: str) -> Path:
    """Return where the facts of a compiled module stand: beside it, under the same name."""
    return Path(module).with_suffix(".json")


def build_command() -> type[build_ext]:
    """Return the build_ext command: torch's, or without torch one that says what is missing.

    The machine is looked at when something is compiled, so that metadata and source distributions
    need neither torch nor a compiler.
    """
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ModuleNotFoundError as error:
        reason = str(error)

        class WithoutTorch(build_ext):
            def run(self) -> None:
                raise PlatformError(
                    f"lnl_ext is compiled against PyTorch, which this environment lacks ({reason})"
                    f": run `pip install '{TORCH_REQUIREMENT}'` first, or leave out "
                    "--no-build-isolation"
                )

        return WithoutTorch

    class WithTorch(BuildExtension):
        def build_extensions(self) -> None:
            check_compiler()
            module, facts = extension_module()
            self.extensions[0].__dict__.update(module.__dict__)
            super().build_extensions()
            facts_file(self.get_ext_fullpath(NAME)).write_text(json.dumps(facts), encoding="utf-8")

        # The facts go wherever the module goes.
        def copy_extensions_to_source(self) -> None:
            super().copy_extensions_to_source()
            for built, in_source in self.get_output_mapping().items():
                shutil.copyfile(facts_file(built), facts_file(in_source))

        def get_outputs(self) -> list[str]:
            built = super().get_outputs()
            return [*built, *(str(facts_file(path)) for path in built)]

        def get_output_mapping(self) -> dict[str, str]:
            mapping = super().get_output_mapping()
            facts = {str(facts_file(a)): str(facts_file(b)) for a, b in mapping.items()}
            return {**mapping, **facts}

    return WithTorch
