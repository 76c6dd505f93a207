"""What nvcc made of the linear head's kernels stays within committed bounds; no GPU is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import cuda_static
import cuda_static_linear as linear
import emulated_cuda
import pytest
import torch
from compiled_kernels import Compiled, compile_all
from gpu import machine_code

SIZES = {torch.float32: 4, torch.float64: 8, torch.float16: 2, torch.bfloat16: 2}


@pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))
@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("kibibytes", [227, 163, 99])
def test_plans_are_the_launchers(dtype: torch.dtype, kibibytes: int):
    available = kibibytes * 1024
    fitted = 0
    for columns in (1, 2, 4, 5, 6, 7, 8, 12, 13, 16, 25, 33, 64):
        for width in (1, 8, 100, 256, 512, 1000):
            launched = emulated_cuda.linear_launch(
                dtype, 10**6, 1, columns, width, shared_memory=available
            )
            if launched is None:
                with pytest.raises(ValueError, match="do not fit"):
                    linear.make_plan(SIZES[dtype], columns, width, available)
                continue
            plan = linear.make_plan(SIZES[dtype], columns, width, available)
            fitted += 1
            mine = (plan.threads, plan.resident, plan.rows, plan.tile_columns, plan.shared_memory)
            assert mine == launched, (columns, width)
    assert fitted > 20


@pytest.fixture(scope="module")
def compiled() -> Iterator[Compiled]:
    with compile_all(linear.KERNELS) as running:
        yield running


@pytest.mark.skipif(machine_code.missing() is not None, reason=str(machine_code.missing()))
@pytest.mark.parametrize("architecture", cuda_static.ARCHITECTURES)
def test_machine_code_stays_within_its_bounds(architecture: str, compiled: Compiled):
    bounds = json.loads(linear.BOUNDS.read_text())[architecture]
    facts, problems = linear.check(architecture, compiled[architecture].result(), bounds)
    assert not problems, "\n".join(problems)
    main = [row for row in facts if row.kernel.startswith("linear_on_chip")]
    assert len(main) == 11  # tiles of 4, 8 and 12 columns, float64 of 4 and 6
    for row in main:
        assert row.registers <= 128, row.kernel  # two blocks of 256 threads, or one of 512


PRODUCTS = "".join(
    f"        /*{first + 16 * i:04x}*/   {opcode} ;\n"
    for first, body in ((0x0, 8), (0x1000, 6), (0x2000, 8))
    for i, opcode in enumerate(
        ["IADD3 R1, R1, 1, RZ"]
        + ["LDS.128 R4, [R2]"] * body
        + ["FFMA R0, R1, R2, R3"] * 64
        + [f"@P0 BRA 0x{first + 16:x}", "STS [R2], R1", f"@P1 BRA 0x{first:x}"]
    )
)


def test_products_are_found_in_machine_code():
    kernel = machine_code.Kernel("linear_on_chip<float, 4>")
    machine_code.read_code(f"\tFunction : kernel\n{PRODUCTS}", {"kernel": kernel})
    # An inner loop's own instructions, and two around it with the branch back.
    assert linear.products(kernel) == [
        linear.Product(64, 73, 3),
        linear.Product(64, 71, 3),
        linear.Product(64, 73, 3),
    ]
    del kernel.code[-70:]
    with pytest.raises(RuntimeError, match="has 2 products, expected 3"):
        linear.products(kernel)
