"""CUDA files compiled for all architectures, a compiler for every core at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cuda_static
from gpu.machine_code import Kernel

Compiled = dict[str, Future[list[Kernel]]]
"""By architecture: kernels that are there once they are compiled."""


@contextlib.contextmanager
def compile_all(source: Path) -> Iterator[Compiled]:
    """Start compilers for `source`, in the order of the architectures."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            a: pool.submit(cuda_static.compile_kernels, a, source)
            for a in cuda_static.ARCHITECTURES
        }
        pool.shutdown(cancel_futures=True)
