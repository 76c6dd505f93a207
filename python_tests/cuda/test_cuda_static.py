"""What nvcc made of the kernels stays within committed bounds; no GPU is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import cuda_static
import emulated_cuda
import pytest
import torch
from compiled_kernels import Compiled, compile_all
from gpu import cost as launch_cost
from gpu import machine_code
from gpu.cost import Shape

# As sites_small: a turn is four sites. Inside, loops that read, sum and write; blocks that the hot
# path avoids: slow division, unreduced values, single elements; and what stands behind RET.
SASS = """
\tFunction : kernel
        /*0000*/                   S2R R0, SR_TID.X ;   /* 0x0 */
        /*0010*/              @!P0 BRA 0x40 ;
        /*0020*/                   CALL.REL.NOINC 0x1a0 ;
        /*0030*/                   BRA 0x50 ;
        /*0040*/                   IADD3 R1, R1, R2, RZ ;
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0060*/                   STS.128 [R3], R4 ;
        /*0070*/               @P1 BRA 0x50 ;
        /*0080*/                   LDS.128 R4, [R3] ;
        /*0090*/                   MUFU.EX2 R4, R4 ;
        /*00a0*/                   FADD R5, R5, R4 ;
        /*00b0*/                   BRA.U UP1, 0x80 ;
        /*00c0*/              @!P2 BRA 0xf0 ;
        /*00d0*/                   STG.E desc[UR4][R2.64], R5 ;
        /*00e0*/                   STG.E desc[UR4][R2.64+0x4], R5 ;
        /*00f0*/                   MUFU.RCP R5, R5 ;
        /*0100*/               @P4 LDG.E R6, desc[UR4][R2.64] ;
        /*0110*/                   BRA.DIV UR4, 0x150 ;
        /*0120*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0130*/               @P1 BRA 0x120 ;
        /*0140*/              @!P3 CALL.REL.NOINC 0x150 ;
        /*0148*/                   BRA 0x10 ;
        /*0150*/                   STG.E desc[UR4][R8.64], R4 ;
        /*0160*/                   EXIT ;
        /*01a0*/                   RET.REL.NODEC R18 0x0 ;
        /*01b0*/                   BRA 0x1b0;
"""


@pytest.fixture
def kernel() -> machine_code.Kernel:
    result = machine_code.Kernel("sites_small<float, false, 4, true>")
    machine_code.read_code(SASS, {"kernel": result})
    return result


def test_reads_machine_code(kernel: machine_code.Kernel):
    assert [i.opcode for i in kernel.code][:3] == ["S2R", "BRA", "CALL.REL.NOINC"]
    moved = [i.bytes for i in kernel.code if i.is_access]
    assert moved == [16, 4, 4, 4, 16, 4]


def test_finds_natural_loops(kernel: machine_code.Kernel):
    headers = [loop.header for loop in kernel.loops]
    assert headers == [0x10, 0x50, 0x80, 0x120]
    assert kernel.loops[0].blocks > {0x20, 0x40, 0x50, 0x80, 0xD0, 0xF0, 0x120, 0x140, 0x148}
    assert kernel.loops[1].blocks == {0x50}


def test_counts_the_hot_path_of_a_shape(kernel: machine_code.Kernel):
    # Once a turn: 0x10, 0x40, 0xc0, 0xf0, 0x100, 0x110, 0x140, 0x148; the loops take 3, 4
    # and 2.
    outer = 8
    for classes, batches in ((8, 2), (2, 1), (5, 2)):
        cost = launch_cost.cost_of(kernel, Shape(classes, 64))
        elements = 4 * classes
        inner = 3 * batches + 4 * classes + 2 * classes
        assert cost.instructions == pytest.approx((outer + inner) / elements)
        assert cost.mufu == pytest.approx((1 + classes) / elements)


def test_other_loops_than_the_source_has_are_an_error(kernel: machine_code.Kernel):
    kernel.code = [i for i in kernel.code if i.address != 0x130]
    with pytest.raises(RuntimeError, match="2 inner loops, expected 3"):
        launch_cost.cost_of(kernel, Shape(8, 64))


def test_reads_the_report_of_ptxas(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine_code, "demangle", lambda name: f"{name}<float, false>")
    report = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 72 registers, used 1 barriers, 16 bytes smem\n"
    )
    (kernel,) = machine_code.read_report(report).values()
    assert (kernel.registers, kernel.stack, kernel.spills) == (72, 8, 16)
    assert kernel.static_shared_memory == 16


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "expected"),
    [(32, 256, 0, 1.0), (64, 256, 0, 0.5), (32, 128, 100 * 1024, 8 / 64), (255, 128, 0, 8 / 64)],
)
def test_occupancy(registers: int, threads: int, shared: int, expected: float):
    limits = launch_cost.LIMITS["sm_90"]
    assert launch_cost.occupancy(limits, registers, threads, shared) == expected


def test_broken_bounds_are_named():
    shapes = {"C=8": cuda_static.ShapeFacts(10.0, 1.0, "")}
    good = cuda_static.Facts("k<float>", 40, 0, 0, 0, 0, 0, 0, 0.5, 16, 16, 500, shapes)
    bounds = cuda_static.new_bounds([good])
    assert json.loads(cuda_static.text_of_bounds({"sm_90": bounds})) == {"sm_90": bounds}
    assert cuda_static.broken_bounds([good], bounds) == []
    for name, value in {
        "registers": 60,
        "stack": 8,
        "spills": 4,
        "local": 1,
        "double_instructions": 1,
        "static_shared_memory": 16,
        "occupancy": 0.25,
        "wide_loads": 4,
        "wide_stores": 8,
        "size": 600,
        "shapes": {},
    }.items():
        bad = cuda_static.dataclasses.replace(good, **{name: value})
        assert len(cuda_static.broken_bounds([bad], bounds)) == 1, name
    for bad_shape in (cuda_static.ShapeFacts(12, 1, ""), cuda_static.ShapeFacts(10, 2, "")):
        bad = cuda_static.dataclasses.replace(good, shapes={"C=8": bad_shape})
        assert len(cuda_static.broken_bounds([bad], bounds)) == 1
    assert cuda_static.broken_bounds([], bounds)
    assert cuda_static.broken_bounds([good], {})


def kernels_of(name: str, dense: bool) -> list[machine_code.Kernel]:
    """Return an instance of every main kernel for a dtype."""
    start = f"{name}, {str(dense).lower()}"
    narrow, scalars = (2, 1) if name == "double" else (4, 1 if name == "float" else 2)
    wide = 8 if name == "__nv_bfloat16" else narrow
    instances = [f"rows_small<{start}>", f"rows_medium<{start}, 16>", f"rows_large<{start}>"]
    if name != "double":
        instances.append(f"rows_medium<{start}, 32>")
    for base, unaligned in (("sites_small", narrow), ("sites_large", scalars)):
        instances += [f"{base}<{start}, {sites}, true>" for sites in sorted({narrow, wide})]
        instances.append(f"{base}<{start}, {unaligned}, false>")
    return [machine_code.Kernel(instance) for instance in instances]


@pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float", torch.float32), ("double", torch.float64), ("__nv_bfloat16", torch.bfloat16)],
)
def test_shapes_are_what_the_launcher_makes_of_them(name: str, dtype: torch.dtype, dense: bool):
    for kernel in kernels_of(name, dense):
        shapes = launch_cost.shapes_of(kernel)
        assert shapes
        for shape in shapes:
            launched = emulated_cuda.launch(dtype, 4096, shape.classes, shape.positions, dense)
            threads = launch_cost.threads_of(kernel, shape)
            shared = launch_cost.shared_memory_of(kernel, shape)
            assert launched == (kernel.base, threads, shared), (kernel.name, shape)


@pytest.fixture(scope="module")
def compiled() -> Iterator[Compiled]:
    with compile_all(cuda_static.KERNELS) as running:
        yield running


@pytest.mark.skipif(machine_code.missing() is not None, reason=str(machine_code.missing()))
@pytest.mark.parametrize("architecture", cuda_static.ARCHITECTURES)
def test_machine_code_stays_within_its_bounds(architecture: str, compiled: Compiled):
    bounds = json.loads(cuda_static.BOUNDS.read_text())[architecture]
    facts = [cuda_static.judge(k, architecture) for k in compiled[architecture].result()]
    problems = cuda_static.broken_bounds(facts, bounds)
    assert not problems, "\n".join(problems)
    for row in facts:
        kernel = machine_code.Kernel(row.kernel)
        is_main = kernel.base.startswith(("rows_", "sites_"))
        assert bool(row.shapes) == (is_main and not kernel.is_dense), row.kernel
        if is_main and kernel.access == 16:
            assert (row.wide_loads, row.wide_stores) == (16, 16), row.kernel
