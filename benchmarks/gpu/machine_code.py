"""Machine code of CUDA kernels: what ptxas and cuobjdump say, and its blocks and loops."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from pathlib import Path

SIZES = {"float": 4, "double": 8, "__half": 2, "__nv_bfloat16": 2}


def find_tool(name: str) -> str | None:
    """Return a CUDA tool from CUDA_HOME, PATH, /usr/local/cuda, or from Python's CUDA packages."""
    packages = Path(sysconfig.get_path("purelib"))
    folders = [
        *(Path(os.environ[key]) / "bin" for key in ("CUDA_HOME", "CUDA_PATH") if key in os.environ),
        *map(Path, os.environ.get("PATH", "").split(os.pathsep)),
        Path("/usr/local/cuda/bin"),
        *sorted(packages.glob("nvidia/*/bin")),
        packages / "triton" / "backends" / "nvidia" / "bin",
    ]
    return shutil.which(name, path=os.pathsep.join(map(str, folders)))


def missing() -> str | None:
    """Say which tool is missing for this, or return None."""
    for tool in ("nvcc", "cuobjdump"):
        if find_tool(tool) is None:
            return f"{tool} is not installed"
    return None


def run(command: list[str]) -> str:
    """Return a command's output on both streams; raise with it where the command fails."""
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}")
    return result.stdout


@dataclasses.dataclass
class Instruction:
    """One line of machine code."""

    address: int
    guarded: bool
    opcode: str  # with its modifiers: LDG.E.128
    operands: str

    @property
    def bytes(self) -> int:
        """How much one thread moves, for global loads and stores."""
        for text, count in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1)):
            if text in self.opcode:
                return count
        return 4

    @property
    def is_access(self) -> bool:
        """Tell whether this reads or writes global memory."""
        return self.opcode.startswith(("LDG", "STG"))

    @property
    def target(self) -> int | None:
        """Where a branch goes.

        A guarded call is a branch as well: ptxas leaves loops that way for sm_80. BRA.DIV, which
        leaves the way of a converged warp, goes nowhere.
        """
        call = self.guarded and self.opcode.startswith("CALL")
        if not (call or self.opcode.startswith("BRA")) or ".DIV" in self.opcode:
            return None
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        return int(found.group(1), 16) if found else None

    @property
    def goes_on(self) -> bool:
        """Tell whether the instruction after this one can be the next."""
        if self.opcode.startswith(("EXIT", "RET")):
            return self.guarded
        if self.target is None:
            return True
        # A branch on a uniform predicate names it among its operands.
        return self.guarded or not self.operands.lstrip("`(").startswith("0x")


@dataclasses.dataclass
class Kernel:
    """What is known of one instance of a kernel on one architecture."""

    name: str  # sites_small<float, false, 4, true>
    registers: int = 0
    stack: int = 0
    spills: int = 0
    static_shared_memory: int = 0
    code: list[Instruction] = dataclasses.field(default_factory=list)

    @property
    def base(self) -> str:
        """The kernel without its template arguments."""
        return self.name.partition("<")[0]

    @property
    def arguments(self) -> list[str]:
        """Its template arguments."""
        return self.name.partition("<")[2].rstrip(">").split(", ")

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return SIZES[self.arguments[0]]

    @property
    def accumulator(self) -> int:
        """Bytes of an accumulator."""
        return 8 if self.size == 8 else 4

    @property
    def is_dense(self) -> bool:
        """Tell whether every class has a target."""
        return self.arguments[1] == "true"

    @property
    def sites(self) -> int:
        """Sites of a thread of a kernel for sites."""
        return int(self.arguments[2])

    @property
    def is_vector(self) -> bool:
        """Tell whether a kernel for sites reads a thread's sites at once."""
        return self.arguments[3] == "true"

    @property
    def line(self) -> int:
        """Sites of a tile of sites_large."""
        return 128 // self.size

    @property
    def access(self) -> int:
        """Bytes of the accesses to logits and gradients where nothing is out of line."""
        if not self.base.startswith("sites_"):
            return 16
        return self.sites * self.size if self.is_vector else self.size

    @functools.cached_property
    def blocks(self) -> dict[int, Block]:
        """Its basic blocks by their first address."""
        return blocks_of(self.code)

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """Its natural loops, the outer before the inner."""
        return loops_of(self.blocks)


@dataclasses.dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may follow."""

    code: list[Instruction]
    following: list[int]


@dataclasses.dataclass
class Loop:
    """A natural loop: the blocks from which its header is reached again without leaving it."""

    header: int
    blocks: set[int]
    ends: set[int]  # blocks that branch back to the header


def blocks_of(code: list[Instruction]) -> dict[int, Block]:
    """Return basic blocks by their first address."""
    starts = {i.target for i in code} - {None}
    blocks: dict[int, Block] = {}
    current: Block | None = None
    successors = [*(i.address for i in code[1:]), -1]
    for instruction, successor in zip(code, successors, strict=True):
        if current is None or instruction.address in starts:
            if current is not None and current.code[-1].goes_on:
                current.following.append(instruction.address)
            current = blocks[instruction.address] = Block([], [])
        current.code.append(instruction)
        target = instruction.target
        if target is not None:
            current.following.append(target)
        if target is not None or not instruction.goes_on:
            if instruction.goes_on:
                current.following.append(successor)
            current = None
    for block in blocks.values():  # a listing cut off in the middle leads nowhere
        block.following = [address for address in block.following if address in blocks]
    return blocks


def reachable(edges: dict[int, list[int]], starts: Iterable[int], within: set[int]) -> set[int]:
    """Return what can be reached from `starts`, themselves included, without leaving `within`."""
    found: set[int] = set()
    waiting = [start for start in starts if start in within]
    while waiting:
        address = waiting.pop()
        if address not in found:
            found.add(address)
            waiting.extend(a for a in edges[address] if a in within)
    return found


def backwards(edges: dict[int, list[int]]) -> dict[int, list[int]]:
    """Return the same edges the other way round."""
    turned: dict[int, list[int]] = {address: [] for address in edges}
    for address, following in edges.items():
        for other in following:
            turned[other].append(address)
    return turned


def loops_of(blocks: dict[int, Block]) -> list[Loop]:
    """Return the natural loops, the outer before the inner."""
    if not blocks:
        return []
    edges = {address: block.following for address, block in blocks.items()}
    before = backwards(edges)
    entry = min(blocks)
    everything = reachable(edges, [entry], set(blocks))
    loops = {}
    for header in everything:
        # A block that cannot be reached without passing the header is dominated by it.
        others = reachable(edges, [entry], everything - {header})
        ends = {b for b in before[header] if b in everything and (b == header or b not in others)}
        if ends:
            body = reachable(before, ends - {header}, everything - {header}) | {header}
            loops[header] = Loop(header, body, ends)
    return sorted(loops.values(), key=lambda loop: (-len(loop.blocks), loop.header))


def demangle(name: str) -> str:
    """Return kernel<arguments> of a mangled name in lnl::cuda."""
    text = run([find_tool("cu++filt") or find_tool("c++filt") or "c++filt", name]).strip()
    found = re.search(r"lnl::cuda::(\w+<.*?>)\(", text)
    if found is None:
        raise RuntimeError(f"{text} is not a kernel of lnl::cuda")
    return re.sub(r"\((?:bool|int)\)", "", found.group(1))


def read_report(report: str) -> dict[str, Kernel]:
    """Return kernels by mangled name from the output of ptxas -v."""
    kernels: dict[str, Kernel] = {}
    current: Kernel | None = None
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)'", line):
            current = kernels.setdefault(found.group(1), Kernel(demangle(found.group(1))))
        elif current is None:
            continue
        elif found := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            current.stack = int(found.group(1))
            current.spills = int(found.group(2)) + int(found.group(3))
        elif found := re.search(r"Used (\d+) registers", line):
            current.registers = int(found.group(1))
            shared = re.search(r"(\d+) bytes smem", line)
            current.static_shared_memory = int(shared.group(1)) if shared else 0
    return kernels


LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def read_code(sass: str, kernels: dict[str, Kernel]) -> None:
    """Add the machine code from cuobjdump --dump-sass."""
    current: Kernel | None = None
    for line in sass.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            current = kernels.get(found.group(1))
        elif current is not None and (found := LINE.match(line)):
            address, guard, opcode, operands = found.groups()
            current.code.append(Instruction(int(address, 16), guard is not None, opcode, operands))
