"""What nvcc made of the CUDA kernels, read without a GPU.

    python benchmarks/cuda_static.py [--architectures sm_80 ...] [--json FILE] [--write-bounds]

Compiles csrc/cuda/bias_loss_kernels.cu alone for each architecture, reads ptxas' report and the
machine code, holds both against benchmarks/cuda_static_bounds.json and prints a table. Exits with 1
where a bound is broken. The roofline columns are an estimate from these figures and data sheet
numbers, not a measurement: nothing here has run on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "cuda" / "bias_loss_kernels.cu"
BOUNDS = Path(__file__).resolve().parent / "cuda_static_bounds.json"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
SIZES = {"float": 4, "double": 8, "__half": 2, "__nv_bfloat16": 2}


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
class Nominal:
    """A typical call of a kernel: the occupancy is that of this call."""

    classes: int
    positions: int = 1
    threads: int = 128  # of a block, where it does not follow from the shared memory


# What follows from these is held against the launcher itself by python_tests/test_cuda_static.py.
NOMINAL = {
    "rows_small": Nominal(12),
    "rows_medium<16>": Nominal(256),
    "rows_medium<32>": Nominal(992),
    "rows_large": Nominal(4096, threads=256),
    "sites_small": Nominal(8, 1024),
    "sites_large": Nominal(64, 1024),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Data sheet figures for the estimate."""

    name: str
    multiprocessors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes/s


GPUS = {
    "sm_80": Gpu("A100 SXM 80 GB", 108, 1.41e9, 2.04e12),
    "sm_90": Gpu("H100 SXM", 132, 1.98e9, 3.35e12),
}


# ---- the toolkit ---------------------------------------------------------------------------


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


# ---- reading -------------------------------------------------------------------------------


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
    def target(self) -> int | None:
        """Where a branch goes."""
        if not self.opcode.startswith("BRA"):
            return None
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        return int(found.group(1), 16) if found else None


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
    def group(self) -> str:
        """The key of NOMINAL."""
        return f"rows_medium<{self.arguments[2]}>" if self.base == "rows_medium" else self.base


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


def compile_kernels(architecture: str, source: Path = KERNELS) -> list[Kernel]:
    """Compile a file for one architecture and read everything."""
    nvcc, cuobjdump = find_tool("nvcc"), find_tool("cuobjdump")
    assert nvcc is not None
    assert cuobjdump is not None
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        flags = ["-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-cubin"]
        kernels = read_report(run([nvcc, *flags, "-o", cubin, str(source)]))
        read_code(run([cuobjdump, "--dump-sass", cubin]), kernels)
    return sorted(kernels.values(), key=lambda kernel: kernel.name)


# ---- judging -------------------------------------------------------------------------------


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


@dataclasses.dataclass
class Loop:
    """A main loop: what it costs per element."""

    elements: int
    instructions: float
    mufu: float
    loads: int  # widest global load, bytes
    stores: int


def main_loops(kernel: Kernel) -> list[Loop]:
    """Return the loops over classes: of each kind, the one that does most at a time."""
    width = 16
    if kernel.base == "sites_large":  # a warp's request is one line of 128 bytes
        width = 4
    elif kernel.base == "sites_small":
        vector = kernel.arguments[3] == "true"
        width = min(16, int(kernel.arguments[2]) * kernel.size) if vector else 2
    ranges = list(loops(kernel.code))
    if kernel.base != "rows_medium":
        ranges = [
            (a, b)
            for a, b in ranges
            if not any((a, b) != (c, d) and a <= c and d <= b for c, d in ranges)
        ]
    best: dict[str, Loop] = {}
    for first, last in ranges:
        body = hot([i for i in kernel.code if first <= i.address <= last], width)
        powers = sum(i.opcode.startswith("MUFU.EX2") for i in body)
        loads = [i.bytes for i in body if i.opcode.startswith("LDG") and i.bytes >= width]
        stores = [i.bytes for i in body if i.opcode.startswith("STG") and i.bytes >= width]
        from_shared = [i.bytes for i in body if i.opcode.startswith("LDS")]
        to_shared = [i.bytes for i in body if i.opcode.startswith("STS")]
        # rows_small writes one gradient in a loop, the others both.
        gradients = 1 if kernel.base == "rows_small" else 2
        role = "write" if stores else "sum" if powers else "read"
        elements = max(powers, sum(loads) // kernel.size, sum(stores) // (gradients * kernel.size))
        if kernel.base == "rows_medium":
            if powers < int(kernel.arguments[2]):
                continue
            elements = int(kernel.arguments[2])
        elif kernel.base == "rows_small" and not (powers or loads or stores):
            # From shared memory to shared memory: the maximum, and d and e^d into both gradients.
            role = "gradient" if to_shared else "maximum"
            elements = sum(from_shared) // (4 * (2 if to_shared else 1))
        if elements == 0:
            continue
        loop = Loop(
            elements,
            len(body) / elements,
            sum(i.opcode.startswith("MUFU") for i in body) / elements,
            max(loads, default=0),
            max(stores, default=0),
        )
        known = best.get(role)
        if known is None or (known.elements, -known.instructions) < (
            loop.elements,
            -loop.instructions,
        ):
            best[role] = loop
    return list(best.values())


def shared_memory_of(kernel: Kernel) -> int:
    """Return the dynamic shared memory of the kernel's nominal call."""
    nominal = NOMINAL[kernel.group]
    dense = kernel.arguments[1] == "true"
    accumulator = 8 if kernel.size == 8 else 4
    if kernel.base == "sites_small":
        sites = int(kernel.arguments[2])
        row = nominal.classes * sites * accumulator * (3 if dense else 2)
        return row * small_threads(row)
    if kernel.base == "rows_small":
        row = nominal.classes * accumulator * (3 if dense else 2)
        return row * small_threads(row)
    online = accumulator * (9 if dense else 4)
    if kernel.base == "rows_large":
        window = 32 // kernel.size - 1 + nominal.classes
        return 32 * online + -(-window * kernel.size // 16) * 16
    if kernel.base == "sites_large":
        sites = max(1, 4 // kernel.size)
        return nominal.threads * sites * online + nominal.classes * 32 * sites * kernel.size
    return 3 * accumulator * 4  # rows_medium: the totals of four rows


def small_threads(bytes_of_thread: int) -> int:
    """Return small_threads of csrc/cuda/bias_loss_kernels.cuh."""
    return 32 * max(1, min(4, 48 * 1024 // (bytes_of_thread * 32)))


def threads_of(kernel: Kernel) -> int:
    """Return the threads of a block in the kernel's nominal call."""
    if kernel.base in {"rows_small", "sites_small"}:
        nominal = NOMINAL[kernel.group]
        dense = kernel.arguments[1] == "true"
        sites = int(kernel.arguments[2]) if kernel.base == "sites_small" else 1
        accumulator = 8 if kernel.size == 8 else 4
        return small_threads(nominal.classes * sites * accumulator * (3 if dense else 2))
    return NOMINAL[kernel.group].threads


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


@dataclasses.dataclass
class Facts:
    """One row of the table."""

    kernel: str
    registers: int
    stack: int
    spills: int
    local: int
    double_instructions: int
    shared_memory: int
    occupancy: float
    instructions: float | None  # per element, of the loops over classes
    mufu: float | None
    wide_loads: int
    wide_stores: int
    estimate: str


def is_double(opcode: str) -> bool:
    """Tell whether an instruction computes in float64."""
    return re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b", opcode) is not None or ".F64" in opcode


def judge(kernel: Kernel, architecture: str) -> Facts:
    """Work out one kernel's row."""
    found = main_loops(kernel) if kernel.group in NOMINAL else []
    shared = shared_memory_of(kernel) if kernel.group in NOMINAL else 0
    threads = threads_of(kernel) if kernel.group in NOMINAL else 256
    instructions = sum(loop.instructions for loop in found) if found else None
    return Facts(
        kernel=kernel.name,
        registers=kernel.registers,
        stack=kernel.stack,
        spills=kernel.spills,
        local=sum(i.opcode.startswith(("LDL", "STL")) for i in kernel.code),
        double_instructions=sum(is_double(i.opcode) for i in kernel.code),
        shared_memory=shared,
        occupancy=occupancy(LIMITS[architecture], kernel.registers, threads, shared),
        instructions=instructions,
        mufu=sum(loop.mufu for loop in found) if found else None,
        wide_loads=max((loop.loads for loop in found), default=0),
        wide_stores=max((loop.stores for loop in found), default=0),
        estimate=estimate(kernel, architecture, instructions),
    )


def estimate(kernel: Kernel, architecture: str, instructions: float | None) -> str:
    """Return which of memory and instruction issue bounds the loops over classes, and by how much.

    One gradient; a multiprocessor issues four warp instructions a cycle at best.
    """
    gpu = GPUS.get(architecture)
    if gpu is None or instructions is None:
        return ""
    memory = 2 * kernel.size / gpu.bandwidth
    issue = instructions / (gpu.multiprocessors * 4 * 32 * gpu.clock)
    return f"{'memory' if memory >= issue else 'issue'}, issue/memory {issue / memory:.2f}"


def broken_bounds(facts: list[Facts], bounds: dict[str, dict[str, float]]) -> list[str]:
    """Return what breaks a rule or a committed bound of one architecture."""
    problems = []
    for row in facts:
        floating = "double" not in row.kernel
        if row.spills or row.stack or row.local:
            problems.append(
                f"{row.kernel}: {row.spills} bytes of spills, {row.stack} of stack, "
                f"{row.local} local accesses"
            )
        if floating and row.double_instructions:
            problems.append(f"{row.kernel}: {row.double_instructions} float64 instructions")
        if row.kernel not in bounds:
            problems.append(f"{row.kernel}: no committed bound, run with --write-bounds")
            continue
        bound = bounds[row.kernel]
        if row.registers > bound["registers"]:
            problems.append(f"{row.kernel}: {row.registers} registers, bound {bound['registers']}")
        if row.occupancy < bound["occupancy"]:
            problems.append(
                f"{row.kernel}: occupancy {row.occupancy:.2f}, bound {bound['occupancy']:.2f}"
            )
        for name in ("instructions", "mufu"):
            value = getattr(row, name)
            if (value is None) != (name not in bound):
                problems.append(f"{row.kernel}: {name} {value}, bound {bound.get(name)}")
            elif value is not None and value > bound[name]:
                problems.append(
                    f"{row.kernel}: {value:.2f} {name} per element, bound {bound[name]:.2f}"
                )
        for name in ("wide_loads", "wide_stores"):
            if getattr(row, name) < bound[name]:
                problems.append(
                    f"{row.kernel}: {name} of {getattr(row, name)} bytes, bound {bound[name]}"
                )
    for kernel in bounds.keys() - {row.kernel for row in facts}:
        problems.append(f"{kernel}: has a bound but is not compiled")
    return problems


def new_bounds(facts: list[Facts]) -> dict[str, dict[str, float]]:
    """Return bounds a little above what was found: ptxas' next version may differ by as much."""
    bounds = {}
    for row in facts:
        bound: dict[str, float] = {
            "registers": min(255, row.registers + 8),
            "occupancy": round(0.8 * row.occupancy, 3),
            "wide_loads": row.wide_loads,
            "wide_stores": row.wide_stores,
        }
        if row.instructions is not None and row.mufu is not None:
            bound["instructions"] = round(1.1 * row.instructions, 1)
            bound["mufu"] = round(1.1 * row.mufu, 2)
        bounds[row.kernel] = bound
    return bounds


def table(architecture: str, facts: list[Facts]) -> str:
    """Return the table in Markdown."""
    lines = [
        f"### {architecture}",
        "",
        "| kernel | registers | spills | shared | occupancy | instr./elem. | MUFU/elem. |"
        " load | store | estimate |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in facts:
        cost = ["" if n is None else f"{n:.2f}" for n in (row.instructions, row.mufu)]
        lines.append(
            f"| `{row.kernel}` | {row.registers} | {row.spills} | {row.shared_memory} |"
            f" {row.occupancy:.2f} | {cost[0]} | {cost[1]} | {row.wide_loads or ''} |"
            f" {row.wide_stores or ''} | {row.estimate} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--write-bounds", action="store_true", help="commit to the figures found")
    options = parser.parse_args(arguments)
    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    bounds = json.loads(BOUNDS.read_text()) if BOUNDS.exists() else {}
    all_facts, problems = {}, []
    for architecture in options.architectures:
        facts = [judge(kernel, architecture) for kernel in compile_kernels(architecture)]
        all_facts[architecture] = [dataclasses.asdict(row) for row in facts]
        print(table(architecture, facts), flush=True)
        if options.write_bounds:
            bounds[architecture] = new_bounds(facts)
        problems += [
            f"{architecture} {problem}"
            for problem in broken_bounds(facts, bounds.get(architecture, {}))
        ]
    if options.write_bounds:
        BOUNDS.write_text(json.dumps(bounds, indent=1, sort_keys=True) + "\n")
    if options.json:
        options.json.write_text(json.dumps(all_facts, indent=1) + "\n")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
