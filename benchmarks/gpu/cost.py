"""What a call costs by its kernel's machine code: instructions, MUFU operations, occupancy.

A kernel's threads go round one loop, a turn for a site, a tile or a row; inside it are loops over
classes. An instruction of the outer loop counts once a turn, one of an inner loop once for each of
its turns, which follow from the shape. Counted is the hot path of a call for labels without class
weights, reduced, of aligned tensors, that writes both gradients: blocks that go element by element
around alignment, write unreduced values, or call the slow division are left out, with all that
only they lead to. What cannot be told apart is counted: rescaling a running sum, both sides of
other branches, and a whole batch of loads where the classes fill a part of it. So the count is
rather too high than too low. What a block does once (its coefficients, the sum over its threads)
is not in it.

Variants for targets of every class are not counted: nothing tells their code for probabilities,
for smoothing and for weights apart.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect
from collections import Counter

from gpu.machine_code import Block, Instruction, Kernel, Loop, backwards, reachable


@dataclasses.dataclass(frozen=True)
class Limits:
    """A multiprocessor, from the CUDA C++ programming guide's table of compute capabilities."""

    warps: int
    blocks: int
    shared_memory: int
    registers: int = 65536
    shared_reserved: int = 1024  # per block, by the system


LIMITS = {
    "sm_80": Limits(64, 32, 164 * 1024),
    "sm_90": Limits(64, 32, 228 * 1024),
    "sm_100": Limits(64, 32, 228 * 1024),
    "sm_120": Limits(48, 24, 100 * 1024),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Classes and positions of a call; the kernel it gets follows from them."""

    classes: int
    positions: int = 1

    def __str__(self) -> str:
        """Name it as the table and the bounds do."""
        return f"C={self.classes}" + (f" S={self.positions}" if self.positions > 1 else "")


def shapes_of(kernel: Kernel) -> list[Shape]:
    """Return typical shapes; the first one's occupancy is committed to.

    That such a call gets this kernel is held against the launcher by
    python_tests/cuda/test_cuda_static.py.
    """
    if kernel.base in {"sites_small", "sites_large"}:
        positions = 49 if not kernel.is_vector else 196 if kernel.access == 8 else 1024
        small = kernel.base == "sites_small"
        return [Shape(c, positions) for c in ((8, 2, 32) if small else (64, 256))]
    if kernel.base == "rows_small":
        return [Shape(12), Shape(2), Shape(32)]
    if kernel.base == "rows_medium":
        if kernel.arguments[2] == "32":
            return [Shape(992), Shape(256)] if kernel.size == 2 else [Shape(992)]
        return [Shape(48)] if kernel.size == 2 else [Shape(256), Shape(48)]
    if kernel.base == "rows_large":
        return [Shape(4096), Shape(16000 if kernel.size == 8 else 32000)]
    return []


# ---- the launcher's arithmetic -------------------------------------------------------------


def small_threads(bytes_of_thread: int) -> int:
    """Return small_threads of csrc/cuda/bias_loss_kernels.cuh."""
    return 32 * max(1, min(4, 48 * 1024 // (bytes_of_thread * 32)))


def bytes_of_thread(kernel: Kernel, shape: Shape) -> int:
    """Return the shared memory of a thread of rows_small or sites_small."""
    if kernel.base == "sites_small":
        each = kernel.size + (kernel.accumulator if kernel.is_dense else 0)
        return shape.classes * kernel.sites * each
    pitch = (-(-shape.classes // 4) | 1) * 4
    return pitch * kernel.accumulator * (3 if kernel.is_dense else 2)


def threads_of(kernel: Kernel, shape: Shape) -> int:
    """Return the threads of a block."""
    if kernel.base in {"rows_small", "sites_small"}:
        return small_threads(bytes_of_thread(kernel, shape))
    if kernel.base == "rows_large":
        accesses = -(-window_of(kernel, shape) * kernel.size // 16)
        return 128 if accesses <= 512 else 256 if accesses <= 1024 else 512
    if kernel.base == "sites_large":
        return 128 if shape.classes <= 128 else 256
    return 128


def window_of(kernel: Kernel, shape: Shape) -> int:
    """Return the elements of a row and the most before it in its first 32-byte sector."""
    return shape.classes + (32 - math.gcd(32, shape.classes * kernel.size)) // kernel.size


def lanes_of_row(kernel: Kernel, shape: Shape) -> int:
    """Return the lanes that share a row of rows_medium."""
    lanes = 4
    while lanes * int(kernel.arguments[2]) < window_of(kernel, shape):
        lanes *= 2
    return lanes


def shared_memory_of(kernel: Kernel, shape: Shape) -> int:
    """Return the dynamic shared memory of a block, where a row or a tile fits in."""
    threads, accumulator = threads_of(kernel, shape), kernel.accumulator
    if kernel.base in {"rows_small", "sites_small"}:
        totals = 3 * accumulator if kernel.base == "sites_small" else 0
        return max(bytes_of_thread(kernel, shape), totals) * threads
    online = accumulator * (9 if kernel.is_dense else 4)
    if kernel.base == "rows_large":
        return 32 * online + -(-window_of(kernel, shape) * kernel.size // 16) * 16
    if kernel.base == "sites_large":
        factors = accumulator * (10 if kernel.is_dense else 6) + 4
        return kernel.line * (threads // 32 * online + factors) + shape.classes * 128
    return 3 * accumulator * (threads // lanes_of_row(kernel, shape))  # rows_medium


def occupancy(limits: Limits, registers: int, threads: int, shared_memory: int) -> float:
    """Return resident warps over the most that a multiprocessor holds.

    Registers come in units of 256 for a warp and shared memory in units of 128 bytes.
    """
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = limits.registers // per_warp // warps
    per_block = -(-(shared_memory + limits.shared_reserved) // 128) * 128
    by_shared = limits.shared_memory // per_block
    blocks = min(by_registers, by_shared, limits.blocks, limits.warps // warps)
    return blocks * warps / limits.warps


# ---- counting ------------------------------------------------------------------------------


def is_cold(kernel: Kernel, block: Block) -> bool:
    """Tell whether a block is off the hot path for what it does.

    Guarded narrow accesses are, in kernels for rows,
    the elements around a window; in those for sites, values of a site that are not wanted. A single
    guarded read of an element's size is a coefficient, and so may be a float64 kernel's label, or,
    on the other side of a barrier, the label's logit.
    """
    accesses = [i for i in block.code if i.is_access]
    if any(i.opcode.startswith("CALL") and not i.guarded for i in block.code):
        return True
    narrow = [i for i in accesses if i.bytes < kernel.access]
    if any(i.opcode.startswith("STG") and not i.guarded for i in narrow):
        return True
    if len(narrow) < len(accesses):
        return False
    elements = [i for i in narrow if i.bytes == kernel.size]
    if kernel.base.startswith("sites_"):
        elements = [i for i in elements if not i.guarded]
    barriers = [i.address for i in block.code if i.opcode.startswith("BAR")]
    sides = Counter(bisect(barriers, i.address) for i in elements)
    return max(sides.values(), default=0) > 1 or (
        kernel.size < 8 and any(not i.guarded for i in elements)
    )


def main_loop(kernel: Kernel) -> Loop:
    """Return the loop that a kernel's threads go round: the outermost one that reads memory."""
    return next(
        loop
        for loop in kernel.loops
        if any(i.opcode.startswith("LDG") for a in loop.blocks for i in kernel.blocks[a].code)
    )


def widest(kernel: Kernel, opcode: str) -> int:
    """Return the bytes of the widest global loads or stores in the loops over classes.

    rows_medium has no such loops: a turn of its main loop holds all classes.
    """
    outer = main_loop(kernel)
    inside = [loop for loop in kernel.loops if loop.blocks < outer.blocks]
    if kernel.base == "rows_medium":
        inside = [outer]
    code = [i for loop in inside for a in loop.blocks for i in kernel.blocks[a].code]
    return max(i.bytes for i in code if i.opcode.startswith(opcode))


def hot_path(kernel: Kernel, loop: Loop) -> set[int]:
    """Return the blocks of a loop on ways round it that pass no cold one."""
    warm = {a for a in loop.blocks if not is_cold(kernel, kernel.blocks[a])}
    edges = {
        a: [b for b in kernel.blocks[a].following if b in loop.blocks and b != loop.header]
        for a in loop.blocks
    }
    return reachable(edges, [loop.header], warm) & reachable(backwards(edges), loop.ends, warm)


@dataclasses.dataclass
class Count:
    """Instructions of some blocks."""

    all: float = 0
    mufu: float = 0

    def add(self, code: list[Instruction], times: float) -> None:
        """Count instructions as often as they run."""
        self.all += times * len(code)
        self.mufu += times * sum(i.opcode.startswith("MUFU") for i in code)


@dataclasses.dataclass
class Cost:
    """A call's cost per element."""

    instructions: float
    mufu: float


def is_copy(code: list[Instruction]) -> bool:
    """Tell whether a loop of rows_small copies between global and shared memory."""
    return any(i.is_access for i in code)


def turns_of(kernel: Kernel, shape: Shape, loops: list[list[Instruction]]) -> list[float]:
    """Return how often each inner loop is gone round in a turn of the outer one.

    The loops come in the order of the source, and how much each does at a time is that of the
    source: its kBatch classes or accesses, or one.
    """
    classes, threads = shape.classes, threads_of(kernel, shape)
    expected: list[float]
    if kernel.base == "sites_small":
        expected = [math.ceil(classes / 4), classes, classes]
    elif kernel.base == "sites_large":
        groups = threads * kernel.sites // kernel.line
        warps = threads // 32
        expected = [math.ceil(classes / (4 * groups)), warps, warps, math.ceil(classes / groups)]
    elif kernel.base == "rows_large":
        windows = math.ceil(classes * kernel.size / 16)
        expected = [math.ceil(windows / (2 * threads)), math.ceil(windows / threads)]
    elif kernel.base == "rows_medium":  # maximum, three sums, the label's logit
        expected = [math.log2(lanes_of_row(kernel, shape))] * 5
    else:  # in; fill up to four, maximum, sum, gradient; out, twice
        expected = []
        row = [-classes % 4, *[math.ceil(classes / 4)] * 3]
        windows = math.ceil(classes * kernel.size / 16)
        fours = classes % 4 == 0 and kernel.size < 8
        for code in loops:
            if not is_copy(code):
                if not row:
                    raise RuntimeError(f"{kernel.name} has another loop over a row than expected")
                expected.append(row.pop(0))
                continue
            # Copies are there in whole fours and one by one; a shape takes one of them.
            reads = any(i.opcode.startswith("LDG") for i in code)
            shared = [i for i in code if i.opcode.startswith("STS" if reads else "LDS")]
            in_fours = any(i.bytes == 16 for i in shared)
            turns = math.ceil(windows / 4) if reads else windows
            expected.append(turns if in_fours == fours else 0)
    if len(expected) != len(loops):
        raise RuntimeError(f"{kernel.name} has {len(loops)} inner loops, expected {len(expected)}")
    return expected


def sharing_of(kernel: Kernel, shape: Shape) -> tuple[int, int]:
    """Return the threads that share a turn of the main loop, and the elements that they share."""
    if kernel.base == "rows_medium":
        return lanes_of_row(kernel, shape), shape.classes
    if kernel.base == "rows_large":
        return threads_of(kernel, shape), shape.classes
    if kernel.base == "sites_large":
        return threads_of(kernel, shape), shape.classes * kernel.line
    return 1, shape.classes * (kernel.sites if kernel.base == "sites_small" else 1)


def cost_of(kernel: Kernel, shape: Shape) -> Cost:
    """Return what a call of this shape costs."""
    outer = main_loop(kernel)
    hot = hot_path(kernel, outer)
    if not hot:
        raise RuntimeError(f"{kernel.name} has no hot path")
    inner = [loop for loop in kernel.loops if loop.blocks < outer.blocks]
    # The innermost loop of a block is the last in the list.
    loop_of = {address: loop.header for loop in inner for address in loop.blocks}
    threads, count = threads_of(kernel, shape), Count()
    finish, share = finishing(kernel, hot), min(1, kernel.line / threads)
    headers = sorted(loop.header for loop in inner if loop.header in hot)
    bodies = [
        [i for a in sorted(hot) if loop_of.get(a) == header for i in kernel.blocks[a].code]
        for header in headers
    ]
    for code, turns in zip(bodies, turns_of(kernel, shape, bodies), strict=True):
        count.add(code, turns * (share if code[0].address in finish else 1))
    rest = [i for a in hot if a not in loop_of for i in kernel.blocks[a].code]
    count.add([i for i in rest if i.address not in finish], 1)
    count.add([i for i in rest if i.address in finish], share)
    sharing, elements = sharing_of(kernel, shape)
    scale = sharing / elements
    return Cost(count.all * scale, count.mufu * scale)


def finishing(kernel: Kernel, hot: set[int]) -> range:
    """Return the addresses between two barriers where sites_large has a thread a site at work."""
    if kernel.base != "sites_large":
        return range(0)
    barriers = [
        i.address for a in sorted(hot) for i in kernel.blocks[a].code if i.opcode.startswith("BAR")
    ]
    if len(barriers) != 2:
        raise RuntimeError(f"{kernel.name} has {len(barriers)} barriers in its loop, expected 2")
    return range(barriers[0], barriers[1])
