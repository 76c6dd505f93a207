"""The extension module lnl_ext._C: its sources, its flags, and whether it is built with CUDA."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CXX_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden"]


def sources(section: str) -> list[str]:
    """Return the paths under ``[section]`` of csrc/sources.txt."""
    current, paths = "", []
    for line in (ROOT / "csrc" / "sources.txt").read_text().splitlines():
        if line.startswith("["):
            current = line.strip("[] ")
        elif line and not line.startswith("#") and current == section:
            paths.append(line.strip())
    return paths


def find_nvcc() -> str | None:
    for home in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))):
        found = shutil.which("nvcc", path=os.path.join(home, "bin"))
        if found:
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def toolkit_of(nvcc: str) -> str:
    """Return the toolkit folder of an nvcc, which may be a wrapper script elsewhere."""
    run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
    )
    top = re.search(r"^#\$ TOP=(.*)$", run.stderr, re.MULTILINE)
    if top is None:
        raise RuntimeError(f"{nvcc} --dryrun does not say where its toolkit is")
    return os.path.realpath(top.group(1).strip())


def extension_module() -> Any:
    import torch

    mode = os.environ.get("LNL_EXT_CUDA", "auto")
    nvcc = find_nvcc() if mode != "0" and torch.version.cuda else None
    if nvcc:
        os.environ["CUDA_HOME"] = toolkit_of(nvcc)
    os.environ.setdefault("MAX_JOBS", "2")

    from torch.utils import cpp_extension

    macros = [("LNL_TORCH_VERSION", torch.__version__)]
    if not nvcc:
        extension = cpp_extension.CppExtension(
            "lnl_ext._C",
            sources("cpu"),
            define_macros=macros,
            extra_compile_args={"cxx": CXX_FLAGS},
        )
        return extension, cpp_extension.BuildExtension
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        known = subprocess.run(
            [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
        ).stdout.split()
        wanted = [flag for flag in torch._C._cuda_getArchFlags().split() if flag in known]
        numbers = [re.sub(r"sm_(\d+)(\d)", r"\1.\2", flag) for flag in wanted]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(numbers) + "+PTX"
    arch_flags = cpp_extension._get_cuda_arch_flags()
    codes = [flag.rsplit("code=", 1)[1] for flag in arch_flags]
    macros += [("LNL_WITH_CUDA", "1"), ("LNL_CUDA_ARCH_LIST", ",".join(codes))]
    wheel_headers = Path(torch.__file__).parent.parent / "nvidia" / "cu13" / "include"
    extension = cpp_extension.CUDAExtension(
        "lnl_ext._C",
        sources("cpu") + sources("cuda"),
        define_macros=macros,
        include_dirs=[str(Path(os.environ["CUDA_HOME"]) / "include"), str(wheel_headers)],
        extra_compile_args={
            "cxx": CXX_FLAGS,
            "nvcc": ["-O3", "--threads", os.environ["MAX_JOBS"], *arch_flags],
        },
    )
    return extension, cpp_extension.BuildExtension
