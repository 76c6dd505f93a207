"""The operators on CUDA tensors, unmodified, on CPU tensors and emulated kernels.

csrc/cuda/*_cuda.cpp and the operators themselves, with csrc/emulator/torch in the place of the
functions of torch's CUDA half, as ``torch.ops.lnl_emulated``. Their products are torch's own on
the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import emulated_cuda
import torch
from emulated_cuda import CSRC, MULTIPROCESSORS, SHARED_MEMORY

TORCH = Path(torch.__file__).parent
UNITS = (
    "schemas.cpp",
    "operators.cpp",
    "arguments.cpp",
    "tensor.cpp",
    "cuda/bias_loss_cuda.cpp",
    "cuda/linear_bias_loss_cuda.cpp",
)
FLAGS = ("-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique")
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # as in build_support/extension.py
CHUNK_BYTES, CHUNK_ROWS = 64 << 20, 256
"""Limits of csrc/cuda/linear_bias_loss_chunks.h."""


@functools.cache
def load() -> ctypes.CDLL:
    """Compile (once) and load ``torch.ops.lnl_emulated``."""
    kernels = emulated_cuda.library_path()
    folders = (CSRC, CSRC / "cuda", CSRC / "emulator", CSRC / "emulator/torch")
    sources = sorted(p for f in folders for p in f.iterdir())
    sources = [path for path in sources if path.suffix in {".cpp", ".h"}]
    compile_ = [str(emulated_cuda.compiler()), *FLAGS, TARGET, "-isystem", str(TORCH / "include")]
    renamed = ["-include", str(folders[-1] / "registration.h")]
    commands = [[*compile_, *renamed, "-c", str(CSRC / unit)] for unit in UNITS]
    commands.append([*compile_, *renamed, "-c", str(folders[-1] / "device.cpp")])
    objects = [f"{Path(unit).stem}.o" for unit in (*UNITS, "device.cpp")]
    libraries = [str(kernels), f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    commands.append([str(emulated_cuda.compiler()), "-shared", *objects, *libraries])
    path = emulated_cuda.compiled("operators", sources, commands)
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


@contextlib.contextmanager
def emulated_device(
    shared_memory: int = SHARED_MEMORY,
    multiprocessors: int = MULTIPROCESSORS,
    chunk_bytes: int = CHUNK_BYTES,
    chunk_rows: int = CHUNK_ROWS,
) -> Iterator[None]:
    """Run with a device of these facts, and with these limits of a linear head's chunks."""
    library = load()
    library.lnl_emulated_device(multiprocessors, shared_memory)
    library.lnl_emulated_chunks(ctypes.c_int64(chunk_bytes), ctypes.c_int64(chunk_rows))
    try:
        yield
    finally:
        library.lnl_emulated_device(MULTIPROCESSORS, SHARED_MEMORY)
        library.lnl_emulated_chunks(ctypes.c_int64(CHUNK_BYTES), ctypes.c_int64(CHUNK_ROWS))


@contextlib.contextmanager
def in_place_of_the_cpu_kernels(*names: str) -> Iterator[None]:
    """Let the package's operators of these names be the emulated ones for CPU tensors."""
    load()
    library = torch.library.Library("lnl_ext", "IMPL")
    for name in names:
        library.impl(name, getattr(torch.ops.lnl_emulated, name), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
