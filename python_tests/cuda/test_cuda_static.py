"""What nvcc made of the kernels keeps the rules and the committed bounds; no GPU is needed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cuda_static
import pytest
from gpu import machine_code
from gpu.machine_code import Kernel

import lnl_ext

SASS = """
\tFunction : kernel
        /*0000*/                   S2R R0, SR_TID.X ;   /* 0x0 */
        /*0010*/              @!P0 BRA 0x40 ;
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0100*/             @!UP4 LDG.E R6, desc[UR4][R2.64] ;
        /*0110*/               @P0 UBLKCP.S.G [UR8], [UR6], UR4 ;
        /*0120*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*01b0*/                   BRA 0x1b0;
\tFunction : another
        /*0000*/                   STL [R1], R4 ;
"""


def test_reads_machine_code():
    kernel = Kernel("rows_small<float, false>")
    machine_code.read_code(SASS, {"kernel": kernel})
    assert kernel.opcodes == ["S2R", "BRA", "LDG.E.128", "LDG.E", "UBLKCP.S.G", "STG.E.64", "BRA"]
    assert [kernel.wide(kind) for kind in ("LDG", "STG", "STS")] == [2, 0, 0]


def test_reads_resources(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine_code, "demangle", lambda name: f"{name}<float, false>")
    text = (
        "Resource usage:\n Common:\n  GLOBAL:0\n"
        " Function k:\n  REG:72 STACK:8 SHARED:1040 LOCAL:0 CONSTANT[0]:648 TEXTURE:0\n"
    )
    (kernel,) = machine_code.read_resources(text, reserved=1024).values()
    assert kernel == Kernel("k<float, false>", 72, stack=8, shared_memory=16)


@pytest.mark.parametrize(
    ("registers", "architecture", "expected"),
    [(32, "sm_90", 1.0), (33, "sm_90", 48 / 64), (255, "sm_90", 8 / 64), (40, "sm_120", 1.0)],
)
def test_occupancy(registers: int, architecture: str, expected: float):
    assert Kernel("k", registers).occupancy(architecture) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rows_medium<__half, false, 16>", 16),
        ("sites_small<__half, false, 4, true>", 8),
        ("sites_large<__half, true, 2, false>", 2),
        ("sites_small<double, false, 2, true>", 16),
        ("linear_on_chip<float, 4>", 16),
        ("fold_totals<float>", None),
    ],
)
def test_wanted_accesses(name: str, expected: int | None):
    assert Kernel(name).access == expected


GOOD = Kernel(
    "linear_on_chip<float, 4>", 100, opcodes=["LDG.E.128", "STG.E.128", "LDS.128", "STS.128"]
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"opcodes": [*GOOD.opcodes, "LDL.64"]}, "1 local accesses"),
        ({"opcodes": [*GOOD.opcodes, "DFMA"]}, "1 float64 instructions"),
        ({"opcodes": [*GOOD.opcodes, "F2F.F64.F32"]}, "1 float64 instructions"),
        ({"shared_memory": 16}, "16 bytes of static shared memory"),
        ({"registers": 129}, "129 registers, at most 128"),
        ({"opcodes": ["LDG.E.64", *GOOD.opcodes[1:]]}, "no LDG of 16 bytes"),
        ({"opcodes": GOOD.opcodes[:-1]}, "no STS of 16 bytes"),
    ],
)
def test_broken_rules_are_named(change: dict[str, object], said: str):
    assert machine_code.broken_rules(GOOD) == []
    (problem,) = machine_code.broken_rules(dataclasses.replace(GOOD, **change))
    assert problem.startswith(GOOD.name)
    assert said in problem


def test_a_coefficient_may_be_a_float64():
    opcodes = [*GOOD.opcodes, "F2F.F32.F64", "F2F.F32.F64"]
    assert machine_code.broken_rules(dataclasses.replace(GOOD, opcodes=opcodes)) == []


@pytest.mark.parametrize(
    ("registers", "call", "blocks"),
    [
        (32, (128, 48 * 1024), 4),  # by shared memory: 228 KiB, of which each block takes one more
        (128, (128, 1024), 4),  # by registers: 16 warps
        (32, (512, 1024), 4),  # by warps: 64
        (32, (32, 1024), 24),
    ],
)
def test_bytes_in_flight(registers: int, call: tuple[int, int], blocks: int):
    kernel = Kernel("rows_large<float, false>", registers)
    found = machine_code.Call(*call, in_flight=1000, reads_once=True, shape="")
    assert machine_code.bytes_in_flight(kernel, found, "sm_90") == blocks * 1000


def test_too_few_bytes_in_flight_are_named():
    few = machine_code.Call(
        128, 1024, in_flight=9 * 1024, reads_once=False, shape="C = 4000, S = 9"
    )
    calls = {
        name: [few] for name in ("rows_large<float, false>", "sites_large<float, false, 1, false>")
    }
    rows, sites = (Kernel(name, 128) for name in calls)
    (problem,) = machine_code.too_few_in_flight([rows, sites], calls, "sm_90")
    assert (
        problem == "rows_large<float, false>: 36.0 KiB in flight for C = 4000, S = 9, at least 40"
    )
    assert machine_code.too_few_in_flight([rows, sites], calls, "sm_120") == []


def test_the_table_of_a_page_is_replaced():
    names = ("rows_large<float, false>", "rows_large<float, true>", "sum_heads<float>")
    calls = {names[0]: [machine_code.Call(128, 1024, 1024, reads_once=True, shape="")]}
    new = cuda_static.table("sm_90", [Kernel(name, 32) for name in names], calls)
    page = cuda_static.with_table("a\n\n| kernel | registers | x |\n|---|\n| old |\n\nb\n", new)
    first, header, _, row, *last = page.split("\n")[1:]
    assert (first, last) == ("", ["", "b", ""])
    assert header.endswith("| loads | stores | KiB in flight |")
    assert row.startswith("| `rows_large<float, false>` | 32 |")
    assert row.endswith("| 16 |")
    with pytest.raises(ValueError, match="has no table of kernels"):
        cuda_static.with_table("a\n", new)


def test_broken_bounds_are_named():
    bounds = machine_code.new_bounds({"sm_90": [GOOD]})
    assert json.loads(cuda_static.text_of(bounds)) == bounds
    assert machine_code.broken_bounds([GOOD], "sm_90", bounds) == []
    more = dataclasses.replace(GOOD, registers=110)
    narrow = dataclasses.replace(GOOD, opcodes=["LDG.E.128", "STG.E.64"])
    for kernels, architecture, said in (
        ([more], "sm_90", "110 registers, bound 108"),
        ([narrow], "sm_90", "0 STG of 16 bytes, bound 1"),
        ([GOOD], "sm_80", "no committed bound"),
        ([], "sm_90", "is not compiled"),
    ):
        (problem,) = machine_code.broken_bounds(kernels, architecture, bounds)
        assert said in problem


@pytest.mark.skipif(machine_code.missing() is not None, reason=str(machine_code.missing()))
@pytest.mark.parametrize(
    "architecture",
    [a if a == "sm_90" else pytest.param(a, marks=pytest.mark.long) for a in machine_code.WARPS],
)
def test_machine_code_keeps_rules_and_bounds(architecture: str, capsys: pytest.CaptureFixture[str]):
    arguments = ["--architectures", architecture]
    if architecture in lnl_ext.build_info()["cuda_arch_list"]:
        arguments.append(f"--module={next(Path(lnl_ext.__file__).parent.glob('_cuda.*'))}")
    status = cuda_static.main(arguments)
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    kernels = {line.split("`")[1] for line in printed.out.splitlines() if line.startswith("| `")}
    assert sum(name.startswith("linear_on_chip") for name in kernels) == 11
    assert sum(name.startswith(("rows_", "sites_")) for name in kernels) > 40
