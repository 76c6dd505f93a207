"""What nvcc made of the kernels stays within committed bounds; no GPU is needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import cuda_static
import emulated_cuda
import torch

SASS = """
\tFunction : kernel
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;   /* 0x0 */
        /*0010*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0020*/              @!P0 BRA 0x60 ;
        /*0030*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E R5, desc[UR4][R2.64+0x4] ;
        /*0050*/                   BRA 0x70 ;
        /*0060*/                   MUFU.EX2 R4, R4 ;
        /*0070*/               @P1 BRA 0x0 ;
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
"""


def test_reads_machine_code():
    kernel = cuda_static.Kernel("rows_small<float, false>")
    cuda_static.read_code(SASS, {"kernel": kernel})
    assert [i.opcode for i in kernel.code][:4] == ["LDG.E.128", "LDG.E.128", "BRA", "LDG.E"]
    moved = [i.bytes for i in kernel.code if i.opcode.startswith(("LDG", "STG"))]
    assert moved == [16, 16, 4, 4, 8]
    assert list(cuda_static.loops(kernel.code)) == [(0, 0x70)]
    (loop,) = cuda_static.main_loops(kernel)
    # Eight elements; the block with narrow loads is the way around alignment.
    assert (loop.elements, loop.instructions, loop.mufu) == (8, 5 / 8, 1 / 8)


def test_reads_the_report_of_ptxas(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_static, "demangle", lambda name: f"{name}<float, false>")
    report = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 72 registers, used 1 barriers, 16 bytes smem\n"
    )
    (kernel,) = cuda_static.read_report(report).values()
    assert (kernel.registers, kernel.stack, kernel.spills) == (72, 8, 16)
    assert kernel.static_shared_memory == 16


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "expected"),
    [(32, 256, 0, 1.0), (64, 256, 0, 0.5), (32, 128, 100 * 1024, 8 / 64), (255, 128, 0, 8 / 64)],
)
def test_occupancy(registers: int, threads: int, shared: int, expected: float):
    limits = cuda_static.LIMITS["sm_90"]
    assert cuda_static.occupancy(limits, registers, threads, shared) == expected


def test_broken_bounds_are_named():
    good = cuda_static.Facts("k<float>", 40, 0, 0, 0, 0, 0, 0.5, 10.0, 1.0, 16, 16, "")
    bounds = cuda_static.new_bounds([good])
    assert cuda_static.broken_bounds([good], bounds) == []
    for name, value in {
        "registers": 60,
        "stack": 8,
        "spills": 4,
        "local": 1,
        "double_instructions": 1,
        "occupancy": 0.25,
        "instructions": 12.0,
        "mufu": 2.0,
        "wide_loads": 4,
        "wide_stores": 8,
    }.items():
        bad = cuda_static.dataclasses.replace(good, **{name: value})
        assert len(cuda_static.broken_bounds([bad], bounds)) == 1, name
    assert cuda_static.broken_bounds([], bounds)
    assert cuda_static.broken_bounds([good], {})


@pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float", torch.float32), ("double", torch.float64), ("__nv_bfloat16", torch.bfloat16)],
)
def test_nominal_calls_are_what_the_launcher_makes_of_them(
    name: str, dtype: torch.dtype, dense: bool
):
    for group, nominal in cuda_static.NOMINAL.items():
        base, _, elements = group.rstrip(">").partition("<")
        if elements == "32" and dtype == torch.float64:
            continue  # has no such instance
        sites = ", " + {"double": "2", "float": "4"}.get(name, "8") + ", true"
        arguments = f"{name}, {str(dense).lower()}" + (f", {elements}" if elements else "")
        arguments += sites if base == "sites_small" else ""
        kernel = cuda_static.Kernel(f"{base}<{arguments}>")
        launched = emulated_cuda.launch(dtype, 4096, nominal.classes, nominal.positions, dense)
        expected = (base, cuda_static.threads_of(kernel), cuda_static.shared_memory_of(kernel))
        assert launched == expected, kernel.name


@pytest.mark.skipif(cuda_static.missing() is not None, reason=str(cuda_static.missing()))
@pytest.mark.parametrize("architecture", cuda_static.ARCHITECTURES)
def test_machine_code_stays_within_its_bounds(architecture: str):
    bounds = json.loads(cuda_static.BOUNDS.read_text())[architecture]
    facts = [cuda_static.judge(k, architecture) for k in cuda_static.compile_kernels(architecture)]
    problems = cuda_static.broken_bounds(facts, bounds)
    assert not problems, "\n".join(problems)
