"""What nvcc made of the CUDA kernels: registers, stack, accesses to memory, and their bounds."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = tuple(sorted((HERE.parents[1] / "csrc" / "cuda").glob("*_kernels.cu")))
BOUNDS = HERE / "bounds.json"
WARPS = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "sm_120": 48}
"""Most warps of a multiprocessor, from the CUDA C++ programming guide's table."""
REGISTERS = 16384
"""Of each of the four parts of a multiprocessor, which hold a quarter of its warps; likewise."""
SHARED_PTX = {"sm_80": "compute_80"} | dict.fromkeys(("sm_90", "sm_100", "sm_120"), "compute_90")
"""What the build makes their machine code of: build_support.cuda.with_shared_ptx."""
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 170}
SHARED_MEMORY = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99}
"""Most KiB of a block; the multiprocessor has one more, and takes one for each block."""
RESERVED = {"sm_80": 0} | dict.fromkeys(("sm_90", "sm_100", "sm_120"), 1024)
"""Bytes of that which cuobjdump counts to a kernel's own."""
IN_FLIGHT = {"sm_80": 40, "sm_90": 40, "sm_100": 40, "sm_120": 16}
"""Least KiB of logits that a multiprocessor asks for at a time: its share of the bandwidth, times
the memory's latency under load. An sm_120 has 40 % of an sm_90's bandwidth for each."""
MOST_BLOCKS = 24
"""Of a multiprocessor, on the architecture with the fewest."""
LINEAR_REGISTERS = 128
"""Most of `linear_on_chip`: two blocks of 256 threads, or one of 512, on a multiprocessor."""

SIZES = {"float": 4, "double": 8, "__half": 2, "__nv_bfloat16": 2}
# But for a coefficient that lies on the device as a float64, and is rounded when it is read.
FLOAT64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)\b|(?!F2F\.F32\.F64\b).*\.F64")

Bounds = dict[str, dict[str, list[int]]]
"""Most registers, least wide loads and least wide stores, by kernel and architecture."""


# ---- reading -------------------------------------------------------------------------------


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


def run(command: Sequence[str]) -> str:
    """Return a command's output on both streams; raise with it where the command fails."""
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}")
    return result.stdout


def bytes_of(opcode: str) -> int:
    """Return how much one thread moves by a load or store."""
    for text, count in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1)):
        if text in opcode:
            return count
    return 4


@dataclasses.dataclass
class Kernel:
    """What is known of one instance of a kernel on one architecture."""

    name: str  # sites_small<float, false, 4, true>
    registers: int = 0
    stack: int = 0  # bytes of a thread, spilled registers among them
    shared_memory: int = 0  # static
    opcodes: list[str] = dataclasses.field(default_factory=list)  # with modifiers: LDG.E.128

    @property
    def base(self) -> str:
        """The kernel without its template arguments."""
        return self.name.partition("<")[0]

    @property
    def arguments(self) -> list[str]:
        """Its template arguments."""
        return self.name.partition("<")[2].rstrip(">").split(", ")

    @property
    def access(self) -> int | None:
        """Bytes of the accesses to logits, features and gradients; None if it has none of them."""
        if self.base.startswith(("rows_", "linear_on_chip")):
            return 16
        if not self.base.startswith("sites_"):
            return None
        size, sites, is_vector = SIZES[self.arguments[0]], *self.arguments[2:]
        return int(sites) * size if is_vector == "true" else size

    def wide(self, kind: str) -> int:
        """Return how many instructions of a kind (LDG, STG, LDS, STS) move `access` bytes.

        Copies to shared memory are loads (LDG); those in bulk (UBLKCP) move more than any access.
        """
        found = sum(o.startswith(kind) and bytes_of(o) == self.access for o in self.opcodes)
        return found + (kind == "LDG") * sum(o.startswith("UBLKCP") for o in self.opcodes)

    def occupancy(self, architecture: str) -> float:
        """Return the share of a multiprocessor's warps that its registers allow.

        A warp gets registers in units of 256. Shared memory and the size of blocks, which the
        launcher chooses by the call, may allow less.
        """
        of_warp = -(-self.registers * 32 // 256) * 256
        most = WARPS[architecture]
        return min(most, 4 * (REGISTERS // of_warp)) / most


@dataclasses.dataclass(frozen=True)
class Call:
    """What the launcher says of a call: csrc/tests/in_flight.cpp."""

    threads: int  # of a block, as all that follows
    shared_memory: int
    in_flight: int
    reads_once: bool
    shape: str


def calls_of(architecture: str) -> dict[str, list[Call]]:
    """Return calls that move more than 32 MiB, by the name of their kernel's instance."""
    csrc = HERE.parents[1] / "csrc"
    folders = [f"-I{csrc / 'emulator' / 'include'}", f"-I{csrc / 'emulator'}"]
    source = str(csrc / "tests" / "in_flight.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "in_flight")
        compiler = os.environ.get("CXX") or "c++"
        flags = ["-std=c++17", "-O1", "-Wno-unknown-pragmas"]
        run([compiler, *flags, *folders, source, "-o", program])
        facts = (MULTIPROCESSORS[architecture], SHARED_MEMORY[architecture] * 1024)
        printed = run([program, *map(str, facts)])
    calls: dict[str, list[Call]] = {}
    for line in printed.splitlines():
        name, threads, shared_memory, in_flight, once, shape = line.split("\t")
        call = Call(int(threads), int(shared_memory), int(in_flight), once == "1", shape)
        calls.setdefault(name, []).append(call)
    return calls


def bytes_in_flight(kernel: Kernel, call: Call, architecture: str) -> int:
    """Return how many bytes of logits a multiprocessor has asked for at a time.

    They are a block's, in registers or on their way to shared memory, times the blocks for which
    there are registers, shared memory and warps.
    """
    warps = kernel.occupancy(architecture) * WARPS[architecture] // (call.threads / 32)
    shared = (SHARED_MEMORY[architecture] + 1) * 1024 // (call.shared_memory + 1024)
    return int(min(warps, shared, MOST_BLOCKS)) * call.in_flight


def compile_kernels(architecture: str, sources: Iterable[Path] = SOURCES) -> list[Kernel]:
    """Compile files for one architecture, side by side, and return what their kernels are."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda source: _compile(architecture, source), sources)
        return sorted((kernel for found in compiled for kernel in found), key=lambda k: k.name)


def _compile(architecture: str, source: Path) -> list[Kernel]:
    nvcc = find_tool("nvcc")
    assert nvcc is not None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        gencode = f"-gencode=arch={SHARED_PTX[architecture]},code={architecture}"
        run([nvcc, "-std=c++17", "-O3", gencode, "-cubin", "-o", str(cubin), str(source)])
        return kernels_in(cubin, architecture)


def kernels_in(file: Path, architecture: str) -> list[Kernel]:
    """Return what the kernels of a compiled file are on an architecture that it has code for."""
    cuobjdump = find_tool("cuobjdump")
    assert cuobjdump is not None
    command = [cuobjdump, *(["-arch", architecture] if file.suffix == ".so" else [])]
    kernels = read_resources(
        run([*command, "--dump-resource-usage", str(file)]), RESERVED[architecture]
    )
    read_code(run([*command, "--dump-sass", str(file)]), kernels)
    return sorted(kernels.values(), key=lambda kernel: kernel.name)


def demangle(name: str) -> str:
    """Return kernel<arguments> of a mangled name in lnl::cuda."""
    text = run([find_tool("cu++filt") or find_tool("c++filt") or "c++filt", name]).strip()
    found = re.search(r"lnl::cuda::(\w+<.*?>)\(", text)
    if found is None:
        raise RuntimeError(f"{text} is not a kernel of lnl::cuda")
    return re.sub(r"\((?:bool|int)\)", "", found.group(1))


def read_resources(text: str, reserved: int) -> dict[str, Kernel]:
    """Return kernels by mangled name from the output of cuobjdump --dump-resource-usage.

    ``reserved``: bytes of shared memory that each of them has without having asked for it.
    """
    usage = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
    return {
        name: Kernel(demangle(name), int(registers), int(stack), int(shared) - reserved)
        for name, registers, stack, shared in usage.findall(text)
    }


def read_code(sass: str, kernels: Mapping[str, Kernel]) -> None:
    """Add the opcodes from cuobjdump --dump-sass to kernels by mangled name."""
    current: Kernel | None = None
    instruction = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
    for line in sass.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            current = kernels.get(found.group(1))
        elif current is not None and (found := instruction.match(line)):
            current.opcodes.append(found.group(1))


# ---- judging -------------------------------------------------------------------------------


def broken_rules(kernel: Kernel) -> list[str]:
    """Return which of the rules for all architectures a kernel breaks."""
    local = sum(o.startswith(("LDL", "STL")) for o in kernel.opcodes)
    float64 = sum(FLOAT64.match(o) is not None for o in kernel.opcodes)
    problems = []
    if kernel.stack or local:
        problems.append(f"{kernel.stack} bytes of stack, {local} local accesses")
    if float64 and "double" not in kernel.arguments:
        problems.append(f"{float64} float64 instructions")
    if kernel.shared_memory:  # launchers ask for all that a device has as dynamic
        problems.append(f"{kernel.shared_memory} bytes of static shared memory")
    kinds = ["LDG", "STG", "LDS", "STS"] if kernel.base == "linear_on_chip" else ["LDG", "STG"]
    if kernel.access is not None:
        missing_kinds = [kind for kind in kinds if not kernel.wide(kind)]
        problems += [f"no {kind} of {kernel.access} bytes" for kind in missing_kinds]
    if kernel.base == "linear_on_chip" and kernel.registers > LINEAR_REGISTERS:
        problems.append(f"{kernel.registers} registers, at most {LINEAR_REGISTERS}")
    return [f"{kernel.name}: {problem}" for problem in problems]


def too_few_in_flight(
    kernels: Iterable[Kernel], calls: Mapping[str, Sequence[Call]], architecture: str
) -> list[str]:
    """Return which large calls ask for too little at a time to keep the memory busy.

    Two kinds are slow and known to be: 16-bit logits of single sites, for which there is no
    asynchronous copy, and sites of so many classes that their logits are read twice.
    """
    problems = []
    for kernel in kernels:
        if kernel.access == 2:
            continue
        for call in calls.get(kernel.name, ()):
            if kernel.base == "sites_large" and not call.reads_once:
                continue
            found = bytes_in_flight(kernel, call, architecture) / 1024
            if found < IN_FLIGHT[architecture]:
                problems.append(
                    f"{kernel.name}: {found:.1f} KiB in flight for {call.shape}, "
                    f"at least {IN_FLIGHT[architecture]}"
                )
    return problems


def broken_bounds(kernels: Iterable[Kernel], architecture: str, bounds: Bounds) -> list[str]:
    """Return where the kernels of an architecture are not the bounds', or break them."""
    problems = []
    left = {name: bound[architecture] for name, bound in bounds.items() if architecture in bound}
    for kernel in kernels:
        bound = left.pop(kernel.name, None)
        if bound is None:
            problems.append(f"{kernel.name}: no committed bound, run with --write-bounds")
            continue
        registers, *accesses = bound
        if kernel.registers > registers:
            problems.append(f"{kernel.name}: {kernel.registers} registers, bound {registers}")
        for kind, least in zip(("LDG", "STG"), accesses, strict=True):
            if kernel.wide(kind) < least:
                problems.append(
                    f"{kernel.name}: {kernel.wide(kind)} {kind} of {kernel.access} bytes, "
                    f"bound {least}"
                )
    return problems + [f"{name}: has a bound but is not compiled" for name in left]


def new_bounds(compiled: Mapping[str, Sequence[Kernel]]) -> Bounds:
    """Return bounds by what was found; ptxas' next version may take a few registers more."""
    bounds: Bounds = {}
    for architecture, kernels in compiled.items():
        for kernel in kernels:
            registers = min(255, kernel.registers + 8)
            bound = [registers, kernel.wide("LDG"), kernel.wide("STG")]
            bounds.setdefault(kernel.name, {})[architecture] = bound
    return bounds
