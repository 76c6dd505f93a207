"""What nvcc made of the linear head's CUDA kernels, read without a GPU.

    python benchmarks/cuda_static_linear.py [--architectures sm_80 ...] [--write-bounds]

As cuda_static.py, for csrc/cuda/linear_bias_loss_kernels.cu and gpu/linear_bounds.json.
Instructions are per element of the features, of all that linear_on_chip does with them: the copy to
shared memory and three products, in a call with all gradients. The losses of a row are not in them.
The roofline columns are an estimate, not a measurement: nothing here has run on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_static
from cuda_static import ARCHITECTURES, GPUS, Facts, ShapeFacts
from gpu.cost import LIMITS, occupancy
from gpu.machine_code import Instruction, Kernel, missing

KERNELS = cuda_static.KERNELS.with_name("linear_bias_loss_kernels.cu")
BOUNDS = Path(__file__).resolve().parent / "gpu" / "linear_bounds.json"
GROUP = 4  # rows that a thread works on at a time: kGroup
WARP = 32
DOUBLE_LANES = {"sm_80": 32, "sm_90": 64}
"""float64 multiply-adds of a multiprocessor per cycle, from NVIDIA's architecture papers."""


def up(value: int, multiple: int) -> int:
    """Round up."""
    return -(-value // multiple) * multiple


# ---- the nominal call ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """How csrc/cuda/linear_bias_loss_launchers.cuh launches labels with all gradients, one head.

    python_tests/cuda/test_cuda_static_linear.py holds it against the launcher.
    """

    size: int  # bytes of an element
    columns: int
    width: int
    tile_columns: int
    threads: int
    resident: int
    rows: int
    shared_memory: int

    @property
    def wide(self) -> int:
        """Elements of one 128-bit access."""
        return 16 // self.size

    @property
    def chunks(self) -> int:
        """128-bit accesses of a row."""
        return -(-self.width // self.wide)

    @property
    def slices(self) -> int:
        """Warps that share a group of rows."""
        return self.threads // WARP // (self.rows // GROUP)

    @property
    def sum_columns(self) -> int:
        """Columns of the weights' gradient that a thread sums up at a time: kSumColumns."""
        return GROUP if self.size == 2 else self.tile_columns


def make_plan(size: int, columns: int, width: int, available: int) -> Plan:
    """Return the plan of a call on a device that gives a block `available` bytes."""
    accumulator = 8 if size == 8 else 4
    most = 6 if size == 8 else 12
    wanted = -(-columns // -(-columns // most))
    tile = 6 if wanted > 4 and most == 6 else up(wanted, 4)
    padded = up(columns, tile)
    chunks = -(-width // (16 // size))
    pitch = up(chunks, 8) * 8 if size == 2 else chunks * (16 // size)
    row_pitch = (-(-columns // 4) | 1) * 4
    candidates = ((256, 32, 2), (256, 16, 2), (512, 32, 1), (512, 16, 1), (512, 8, 1), (512, 4, 1))
    for threads, rows, resident in candidates:
        slices = threads // WARP // (rows // GROUP)
        in_accumulators = (
            padded * pitch,  # weight
            columns * pitch,  # its gradient
            max(slices, 2) * rows * row_pitch,  # tiles
            columns * rows,  # what rows of the weight are multiplied with
            padded * rows,  # and rows of features
            columns,  # bias
            6,  # scales
            6 * rows,  # totals
            2 * columns,  # sums of the bias' gradient
        )
        shared = sum(up(count * accumulator, 16) for count in in_accumulators)
        shared += rows * chunks * 16
        if resident * (shared + 1024) <= available + 1024:
            return Plan(size, columns, width, tile, threads, resident, rows, shared)
    raise ValueError(f"{width} features of {size} bytes and {columns} columns do not fit")


def nominal_plan(kernel: Kernel, architecture: str) -> Plan:
    """Return the plan of a kernel's nominal call: as many columns as its tile, 512 features.

    256 of float64, so that they fit everywhere.
    """
    available = LIMITS[architecture].shared_memory - LIMITS[architecture].shared_reserved
    width = 256 if kernel.size == 8 else 512
    tile = int(kernel.arguments[1])
    columns = 12 if tile == 6 else tile  # the issue of the kernel: 512 to 12
    return make_plan(kernel.size, columns, width, available)


# ---- reading -------------------------------------------------------------------------------


@dataclasses.dataclass
class Product:
    """One of the three products: its inner loop, and the loop around it without inner loops."""

    multiply_adds: int
    inner: int  # instructions
    around: int


def inside(code: list[Instruction], first: int, last: int) -> list[Instruction]:
    """Return the instructions from one address to another."""
    return [i for i in code if first <= i.address <= last]


def count(code: list[Instruction], *opcodes: str) -> int:
    """Count instructions whose opcode begins with one of these."""
    return sum(i.opcode.startswith(opcodes) for i in code)


def loops(code: list[Instruction]) -> Iterator[tuple[int, int]]:
    """Yield (first address, address of the branch back) of every loop but traps at the end."""
    for instruction in code:
        target = instruction.target
        if target is not None and target < instruction.address:
            yield target, instruction.address


def hot(code: list[Instruction], width: int) -> list[Instruction]:
    """Leave out basic blocks with global accesses narrower than `width`: the way around alignment.

    Reads of labels, coefficients and weights are narrow as well; the blocks that they stand in are
    those of a site, not of a class.
    """
    starts = {code[0].address} if code else set()
    for instruction in code:
        if instruction.target is not None:
            starts.add(instruction.target)
    blocks: list[list[Instruction]] = []
    for instruction in code:
        if not blocks or instruction.address in starts or blocks[-1][-1].target is not None:
            blocks.append([])
        blocks[-1].append(instruction)
    kept: list[Instruction] = []
    for block in blocks:
        narrow = [i for i in block if i.opcode.startswith(("LDG", "STG")) and i.bytes < width]
        if not narrow:
            kept.extend(block)
    return kept


def products(kernel: Kernel) -> list[Product]:
    """Return the three products in the order of the source: logits, weights', features' gradient.

    Their inner loops are those that multiply and read shared memory in 128 bits, and much of both.
    """
    ranges = sorted(set(loops(kernel.code)))

    def within(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and b[0] <= a[0] and a[1] <= b[1]

    found = []
    for loop in ranges:
        body = inside(kernel.code, *loop)
        multiply_adds = count(body, "FFMA", "DFMA")
        innermost = not any(within(other, loop) for other in ranges)
        if not innermost or multiply_adds < 32 or count(body, "LDS.128") < 6:
            continue
        outer = min((r for r in ranges if within(loop, r)), key=lambda r: r[1] - r[0])
        inner_loops = [r for r in ranges if within(r, outer)]
        around = [
            i
            for i in hot(inside(kernel.code, *outer), 16)
            if not any(a <= i.address <= b for a, b in inner_loops)
        ]
        found.append(Product(multiply_adds, len(body), len(around)))
    if len(found) != 3:
        raise RuntimeError(f"{kernel.name} has {len(found)} products, expected 3")
    return found


def copy_loop(kernel: Kernel) -> tuple[float, int]:
    """Return instructions and elements of the loop that copies features to shared memory."""
    best: list[Instruction] = []
    for first, last in loops(kernel.code):
        body = hot(inside(kernel.code, first, last), 16)
        if count(body, "FFMA", "DFMA", "BAR"):
            continue
        if count(body, "LDG.E.128") > count(best, "LDG.E.128"):
            best = body
    return len(best), count(best, "LDG.E.128") * (16 // kernel.size)


def instructions_of(kernel: Kernel, plan: Plan) -> float:
    """Return the instructions of a thread per element of features that it has."""
    logits, weights, features = products(kernel)
    of_chunk = GROUP * plan.wide
    passes = -(-plan.columns // plan.tile_columns)
    unrolled = logits.multiply_adds / (of_chunk * plan.tile_columns)
    iterations = max(1, -(-plan.chunks // (WARP * plan.slices)))
    total = passes * (logits.inner / unrolled + logits.around / iterations) / of_chunk

    units = -(-plan.columns // plan.sum_columns)
    unrolled = weights.multiply_adds / (of_chunk * plan.sum_columns)
    groups = plan.rows // GROUP
    total += units * (weights.inner / unrolled + weights.around / groups) / of_chunk

    unrolled = features.multiply_adds / of_chunk  # columns
    total += (plan.columns * features.inner / unrolled + features.around) / of_chunk

    instructions, elements = copy_loop(kernel)
    return total + instructions / elements


def shared_bytes_of(plan: Plan) -> float:
    """Return the bytes that shared memory delivers per element of features.

    A value that all lanes of a warp read alike, 16 bytes for four rows' factors, is one request of
    128 bytes for 32 lanes.
    """
    accumulator = 8 if plan.size == 8 else 4
    of_chunk = GROUP * plan.wide
    passes = -(-plan.columns // plan.tile_columns)
    weight = plan.wide * accumulator  # a chunk of one column
    factor = 128 / WARP * accumulator / 4
    logits = passes * (GROUP * 16 + plan.tile_columns * weight)
    units = -(-plan.columns // plan.sum_columns)
    weights = units * (GROUP * 16 + plan.sum_columns * factor)
    features = plan.columns * (weight + factor)
    return (logits + weights + features) / of_chunk + plan.size  # and the copy in


def estimate(plan: Plan, architecture: str, instructions: float) -> str:
    """Return what bounds the products and how many times longer than memory it takes."""
    gpu = GPUS.get(architecture)
    if gpu is None:
        return ""
    cycles = gpu.multiprocessors * gpu.clock
    memory = 2 * plan.size / gpu.bandwidth
    times = {
        "memory": memory,
        "issue": instructions / (4 * WARP * cycles),
        "shared memory": shared_bytes_of(plan) / (128 * cycles),
    }
    if plan.size == 8:
        passes = -(-plan.columns // plan.tile_columns) * plan.tile_columns
        times["float64"] = (2 * passes + plan.columns) / (DOUBLE_LANES[architecture] * cycles)
    bound = max(times, key=lambda name: times[name])
    return f"{bound}, {times[bound] / memory:.2f} of memory's time"


# ---- judging -------------------------------------------------------------------------------


def judge(kernel: Kernel, architecture: str) -> Facts:
    """Work out one kernel's row."""
    facts = cuda_static.judge(kernel, architecture)
    if kernel.base != "linear_on_chip":
        return facts
    plan = nominal_plan(kernel, architecture)
    instructions = instructions_of(kernel, plan)
    loaded = [i.bytes for i in kernel.code if i.opcode.startswith("LDG")]
    stored = [i.bytes for i in kernel.code if i.opcode.startswith("STG")]
    return dataclasses.replace(
        facts,
        shared_memory=plan.shared_memory,
        occupancy=occupancy(
            LIMITS[architecture], kernel.registers, plan.threads, plan.shared_memory
        ),
        wide_loads=max(loaded),
        wide_stores=max(stored),
        shapes={
            f"{plan.columns} x {plan.width}": ShapeFacts(
                instructions, 0.0, estimate(plan, architecture, instructions)
            )
        },
    )


def table(architecture: str, facts: list[Facts]) -> str:
    """Return the table in Markdown."""
    lines = [
        f"### {architecture}",
        "",
        "| kernel | columns x features | registers | spills | shared | occupancy |"
        " instr./elem. | estimate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in facts:
        call = instructions = limit = ""
        if row.shapes:
            ((call, got),) = row.shapes.items()
            instructions, limit = f"{got.instructions:.1f}", got.estimate
        lines.append(
            f"| `{row.kernel}` | {call} | {row.registers} | {row.spills} | {row.shared_memory} |"
            f" {row.occupancy:.2f} | {instructions} | {limit} |"
        )
    return "\n".join(lines) + "\n"


def missing_wide_accesses(kernels: list[Kernel]) -> list[str]:
    """Return which of the 128-bit accesses to global and shared memory are not there."""
    problems = []
    for kernel in kernels:
        if kernel.base != "linear_on_chip":
            continue
        for opcode in ("LDG.E.128", "STG.E.128", "LDS.128", "STS.128"):
            if not any(re.match(rf"{re.escape(opcode)}\b", i.opcode) for i in kernel.code):
                problems.append(f"{kernel.name}: no {opcode}")
    return problems


def check(
    architecture: str, kernels: list[Kernel], bounds: dict[str, dict[str, Any]]
) -> tuple[list[Facts], list[str]]:
    """Return the rows of compiled kernels and what breaks a rule or a bound."""
    facts = [judge(kernel, architecture) for kernel in kernels]
    problems = cuda_static.broken_bounds(facts, bounds) + missing_wide_accesses(kernels)
    return facts, problems


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--write-bounds", action="store_true", help="commit to the figures found")
    options = parser.parse_args(arguments)
    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    bounds = json.loads(BOUNDS.read_text()) if BOUNDS.exists() else {}
    all_problems = []
    for architecture in options.architectures:
        kernels = cuda_static.compile_kernels(architecture, KERNELS)
        facts, problems = check(architecture, kernels, bounds.get(architecture, {}))
        print(table(architecture, facts), flush=True)
        if options.write_bounds:
            bounds[architecture] = cuda_static.new_bounds(facts)
            problems = cuda_static.broken_bounds(facts, bounds[architecture])
        all_problems += [f"{architecture} {problem}" for problem in problems]
    if options.write_bounds:
        BOUNDS.write_text(cuda_static.text_of_bounds(bounds))
    for problem in all_problems:
        print(problem, file=sys.stderr)
    return 1 if all_problems else 0


if __name__ == "__main__":
    sys.exit(main())
