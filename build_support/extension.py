"""The compiled parts of lnl_ext: their sources, flags and the command that builds them.

They are one module, ``lnl_ext._C``, which knows no torch, and two libraries of operators,
``lnl_ext/_cpu`` and ``lnl_ext/_cuda``, which use torch's stable interface alone: what is built for
one torch works with every later one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

from . import cuda
from .backend import MINIMUM_TORCH, TORCH_REQUIREMENT, release

ROOT = Path(__file__).resolve().parent.parent
SOURCE_LIST = ROOT / "csrc" / "sources.txt"
MODULE, CPU, CUDA = "lnl_ext._C", "lnl_ext._cpu", "lnl_ext._cuda"
# No -march: units that use wider vectors choose them themselves and are entered at run time.
UNIX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden"]
MSVC_FLAGS = ["/std:c++17", "/O2", "/wd4068"]  # pragmas of others
# GCC takes memory where there is much: with the first flag the largest unit needs 260 MB instead of
# 400, in the same time; with the second it unrolls as far as kernels gain. -O3 takes a third longer
# and makes no kernel faster than -O2 with those of its passes that stand here, and a pragma at the
# loops that gain from early unrolling.
GCC_FLAGS = [
    "--param=ggc-min-heapsize=65536",
    "--param=max-completely-peeled-insns=100",
    "-O2",
    "-fpeel-loops",
    "-ftree-loop-vectorize",
    "-ftree-slp-vectorize",
    "-fvect-cost-model=dynamic",
]
# Of torch's interface nothing is used that this release does not have: 2.11 is 0x020b...
TARGET = "0x{:02x}{:02x}000000000000".format(*MINIMUM_TORCH)


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


def extensions() -> list[Extension]:
    """Return the parts for setup.py; `Parts` knows what they are compiled and linked with."""
    return [
        Extension(CPU, sources("cpu") + sources("operators")),
        Extension(CUDA, sources("cuda") + sources("operators")),
        Extension(MODULE, sources("module")),
    ]


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


def compiler_flags() -> list[str]:
    """Return the C++ compiler's flags."""
    if os.name == "nt":
        return MSVC_FLAGS
    command = [*shlex.split(os.environ.get("CXX") or "c++"), "--version"]
    made_by = subprocess.run(command, capture_output=True, text=True).stdout
    return UNIX_FLAGS + (GCC_FLAGS if "Free Software Foundation" in made_by else [])


def pybind11_include(torch_include: Path) -> str:
    """Return the folder of pybind11's headers: those of its package, else torch's copy."""
    if importlib.util.find_spec("pybind11") is not None:
        return str(importlib.import_module("pybind11").get_include())
    if (torch_include / "pybind11" / "pybind11.h").exists():
        return str(torch_include)
    raise PlatformError(
        f"pybind11 is neither installed nor in {torch_include}: run `pip install pybind11`"
    )


@dataclass(frozen=True)
class Plan:
    """What is built, for which torch and with which toolkit."""

    torch_version: str
    torch_folder: Path
    toolkit: cuda.Toolkit | None = None
    gencode: list[str] = field(default_factory=list)
    """nvcc's flags for the architectures."""

    @property
    def architectures(self) -> list[str]:
        """The architectures, as in ["sm_90", "compute_90"]; compute_* is PTX."""
        codes = {flag.rpartition("code=")[2] for flag in self.gencode}
        return sorted(codes, key=architecture_order)

    @property
    def announcement(self) -> str:
        """One line: what is built, how long that takes, and how to have it shorter."""
        line = f"lnl_ext: building for torch {TORCH_REQUIREMENT[5:]} (found {self.torch_version})"
        if self.toolkit is None:
            return f"{line}, for CPUs only; takes about a minute"
        return (
            f"{line}, for CPUs and CUDA {self.toolkit.version} ({' '.join(self.architectures)}); "
            "takes two to four minutes on two cores, with LNL_EXT_CUDA=0 one and without CUDA"
        )

    def macros(self, part: str) -> list[tuple[str, str | None]]:
        """Return the macros that a part is compiled with."""
        if part == MODULE:
            return [
                ("LNL_TORCH_VERSION", self.torch_version),
                ("LNL_CUDA_VERSION", self.toolkit.version if self.toolkit else ""),
                ("LNL_CUDA_ARCH_LIST", ",".join(self.architectures)),
            ]
        target: list[tuple[str, str | None]] = [("TORCH_TARGET_VERSION", TARGET)]
        return [*target, ("USE_CUDA", None)] if part == CUDA else target

    def include_folders(self, part: str) -> list[str]:
        """Return where a part finds other headers than its own."""
        include = self.torch_folder / "include"
        return [pybind11_include(include) if part == MODULE else str(include)]

    def libraries(self, part: str) -> tuple[list[str], list[str]]:
        """Return what a part is linked with, and in which folders that is."""
        folders = [str(self.torch_folder / "lib")]
        if part == MODULE:
            return [], []
        if part == CPU or self.toolkit is None:
            return ["torch_cpu"], folders
        own = [self.toolkit.home / name for name in ("lib64", "lib", "lib/x64")]
        return ["torch_cpu", "torch_cuda", "cudart"], [*folders, *map(str, own)]

    def nvcc_command(self, source: str, to: str, threads: int) -> list[str]:
        """Return the command that compiles a CUDA unit, which includes no header but CUDA's."""
        assert self.toolkit is not None
        # Profilers and sanitizers name lines by -lineinfo, which costs a kernel nothing.
        flags = ["-O3", "-lineinfo", "-std=c++17", "-MMD", "-MF", str(Path(to).with_suffix(".d"))]
        flags += ["--threads", str(threads), *self.gencode, "-Xfatbin=-compress-all"]
        if os.name != "nt":
            flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        if os.environ.get("CXX"):
            flags += ["-ccbin", os.environ["CXX"]]
        return [self.toolkit.nvcc, *flags, "-c", source, "-o", to]


def plan() -> Plan:
    """Look at this machine: its torch and its CUDA toolkit."""
    import torch

    if release(torch.__version__) < MINIMUM_TORCH:
        raise PlatformError(
            f"lnl_ext needs {TORCH_REQUIREMENT}, and this environment has torch "
            f"{torch.__version__}: upgrade it first"
        )
    found = Plan(str(torch.__version__), Path(torch.__file__).parent)
    toolkit = cuda.choose_toolkit(torch.__version__, torch.version.cuda)
    if toolkit is None:
        return found
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        torch_architectures = (torch._C._cuda_getArchFlags() or "").split()
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda.default_architectures(
            toolkit.nvcc, torch_architectures
        )
    from torch.utils import cpp_extension

    gencode = cpp_extension._get_cuda_arch_flags()  # parses TORCH_CUDA_ARCH_LIST
    return Plan(found.torch_version, found.torch_folder, toolkit, cuda.with_shared_ptx(gencode))


def architecture_order(code: str) -> tuple[bool, int]:
    """Sort key: sm_75 before sm_100, and compute_* (PTX) last."""
    kind, _, number = code.partition("_")
    return kind == "compute", int(number.rstrip("af"))


def announce(line: str) -> None:
    """Print a line, on the terminal as well: pip shows nothing of what a build prints."""
    print(line, flush=True)
    if sys.stdout.isatty():
        return
    try:
        with open("/dev/tty", "w", encoding="utf-8") as terminal:
            terminal.write(line + "\n")
    except OSError:  # none
        pass


def jobs() -> int:
    """Return how many compilers may run at once: MAX_JOBS, or one for every processor."""
    wanted = os.environ.get("MAX_JOBS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else os.cpu_count() or 1


class BuildParts(build_ext):
    """Compiles the units of all parts side by side, those that have changed, and links the parts.

    The machine is looked at when something is compiled, so that metadata and source distributions
    need neither torch nor a compiler.
    """

    def run(self) -> None:
        """Build, after a look at what there is to build with."""
        if importlib.util.find_spec("torch") is None:
            raise PlatformError(
                "lnl_ext is compiled against PyTorch, which this environment lacks (no module "
                f"named 'torch'): run `pip install '{TORCH_REQUIREMENT}'` first, or leave out "
                "--no-build-isolation"
            )
        check_compiler()
        self.plan = plan()
        if self.plan.toolkit is None:
            self.extensions = [part for part in self.extensions if part.name != CUDA]
        announce(self.plan.announcement)
        super().run()

    def build_extensions(self) -> None:
        """Compile and link."""
        if os.name == "nt":
            self.compiler.initialize()  # before several threads would
        else:
            self.compiler.src_extensions.append(".cu")
        self.flags = compiler_flags()
        self._write_flags()
        units = [(part, source) for part in self.extensions for source in part.sources]
        # CUDA units take minutes: begun first, they leave the rest to a processor that is free.
        units.sort(key=lambda unit: not unit[1].endswith(".cu"))
        with ThreadPoolExecutor(jobs()) as pool:
            objects = list(pool.map(lambda unit: self._compile(*unit), units))
        for part in self.extensions:
            own = [o for (of, _), o in zip(units, objects, strict=True) if of is part]
            self._link(part, own)

    @property
    def _flags(self) -> Path:
        return Path(self.build_temp) / "flags.txt"

    def _write_flags(self) -> None:
        """Note what units are compiled with, where that has changed: all depend on this file."""
        names = ("CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS")
        current = str([self.plan, self.flags, *(os.environ.get(name) for name in names)])
        if not self._flags.exists() or self._flags.read_text(encoding="utf-8") != current:
            self._flags.parent.mkdir(parents=True, exist_ok=True)
            self._flags.write_text(current, encoding="utf-8")

    def _is_current(self, target: Path) -> bool:
        """Whether an object is newer than all that its compiler noted to have read."""
        notes = target.with_suffix(".d")
        if not target.exists() or not notes.exists():
            return False
        _, _, read = notes.read_text(encoding="utf-8").replace("\\\n", " ").partition(": ")
        inputs = [self._flags, *map(Path, shlex.split(read))]
        made = target.stat().st_mtime
        return all(path.exists() and path.stat().st_mtime < made for path in inputs)

    def _compile(self, part: Extension, source: str) -> str:
        folder = str(Path(self.build_temp) / part.name)
        (target,) = self.compiler.object_filenames([source], output_dir=folder)
        if self._is_current(Path(target)):
            return str(target)
        if source.endswith(".cu"):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            command = self.plan.nvcc_command(source, target, jobs())
            print(" ".join(command), flush=True)
            if subprocess.run(command).returncode != 0:
                raise PlatformError(f"nvcc failed on {source}; the lines above say why")
            return str(target)
        notes = ["-MMD", "-MF", str(Path(target).with_suffix(".d"))]
        flags = self.flags if os.name == "nt" else [*self.flags, *notes]
        (made,) = self.compiler.compile(
            [source],
            output_dir=folder,
            macros=self.plan.macros(part.name),
            include_dirs=self.plan.include_folders(part.name),
            extra_postargs=flags,
        )
        return str(made)

    def _link(self, part: Extension, objects: Sequence[str]) -> None:
        libraries, folders = self.plan.libraries(part.name)
        # What is already loaded when a part is, is found by its name alone: no path is needed.
        self.compiler.link_shared_object(
            list(objects),
            self.get_ext_fullpath(part.name),
            libraries=libraries,
            library_dirs=folders,
            export_symbols=[],  # operators register themselves, pybind11 exports its own
            build_temp=self.build_temp,
            target_lang="c++",
        )
