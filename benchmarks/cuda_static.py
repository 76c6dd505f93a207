"""What nvcc made of the CUDA kernels, read without a GPU.

    python benchmarks/cuda_static.py [--architectures sm_80 ...] [--json FILE] [--write-bounds]

Compiles csrc/cuda/bias_loss_kernels.cu alone for each architecture, reads ptxas' report and the
machine code, holds both against benchmarks/gpu/bounds.json and prints a table. Exits with
1 where a bound is broken. What is counted is said in benchmarks/gpu/cost.py. The last
column is a roofline estimate from these figures and data sheet numbers, not a measurement: nothing
here has run on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu.cost import (
    LIMITS,
    Shape,
    cost_of,
    occupancy,
    shapes_of,
    shared_memory_of,
    threads_of,
    widest,
)
from gpu.machine_code import Kernel, find_tool, missing, read_code, read_report, run

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "cuda" / "bias_loss_kernels.cu"
BOUNDS = Path(__file__).resolve().parent / "gpu" / "bounds.json"
ARCHITECTURES = tuple(LIMITS)


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


@dataclasses.dataclass
class ShapeFacts:
    """What a kernel's call of one shape comes to, per element."""

    instructions: float
    mufu: float
    estimate: str


@dataclasses.dataclass
class Facts:
    """What is known of a kernel on one architecture."""

    kernel: str
    registers: int
    stack: int
    spills: int
    local: int
    double_instructions: int
    static_shared_memory: int
    shared_memory: int  # dynamic, of the first shape's call
    occupancy: float  # likewise
    wide_loads: int
    wide_stores: int
    size: int  # instructions of the whole machine code
    shapes: dict[str, ShapeFacts]


def is_double(opcode: str) -> bool:
    """Tell whether an instruction computes in float64."""
    return re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b", opcode) is not None or ".F64" in opcode


def judge(kernel: Kernel, architecture: str) -> Facts:
    """Work out what is known of a kernel."""
    shapes = shapes_of(kernel)
    costs = {} if not shapes or kernel.is_dense else {s: cost_of(kernel, s) for s in shapes}
    shared = shared_memory_of(kernel, shapes[0]) if shapes else 0
    threads = threads_of(kernel, shapes[0]) if shapes else 256
    return Facts(
        kernel=kernel.name,
        registers=kernel.registers,
        stack=kernel.stack,
        spills=kernel.spills,
        local=sum(i.opcode.startswith(("LDL", "STL")) for i in kernel.code),
        double_instructions=sum(is_double(i.opcode) for i in kernel.code),
        static_shared_memory=kernel.static_shared_memory,
        shared_memory=shared,
        occupancy=occupancy(LIMITS[architecture], kernel.registers, threads, shared),
        wide_loads=widest(kernel, "LDG") if shapes else 0,
        wide_stores=widest(kernel, "STG") if shapes else 0,
        size=len(kernel.code),
        shapes={
            str(shape): ShapeFacts(
                cost.instructions,
                cost.mufu,
                estimate(kernel, shape, architecture, cost.instructions),
            )
            for shape, cost in costs.items()
        },
    )


def estimate(kernel: Kernel, shape: Shape, architecture: str, instructions: float) -> str:
    """Return which of memory and instruction issue bounds a call, and by how much.

    Logits once, two gradients, and a label a site; a multiprocessor issues four warp instructions a
    cycle at best.
    """
    gpu = GPUS.get(architecture)
    if gpu is None:
        return ""
    memory = (3 * kernel.size + 8 / shape.classes) / gpu.bandwidth
    issue = instructions / (gpu.multiprocessors * 4 * 32 * gpu.clock)
    return f"{'memory' if memory >= issue else 'issue'}, issue/memory {issue / memory:.2f}"


def broken_bounds(facts: list[Facts], bounds: dict[str, dict[str, Any]]) -> list[str]:
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
        if row.static_shared_memory:  # launchers ask for all that a device has as dynamic
            problems.append(
                f"{row.kernel}: {row.static_shared_memory} bytes of static shared memory"
            )
        if row.kernel not in bounds:
            problems.append(f"{row.kernel}: no committed bound, run with --write-bounds")
            continue
        bound = bounds[row.kernel]
        for name in ("registers", "size"):
            if getattr(row, name) > bound[name]:
                problems.append(f"{row.kernel}: {name} {getattr(row, name)}, bound {bound[name]}")
        if row.occupancy < bound["occupancy"]:
            problems.append(
                f"{row.kernel}: occupancy {row.occupancy:.2f}, bound {bound['occupancy']:.2f}"
            )
        for name in ("wide_loads", "wide_stores"):
            if getattr(row, name) < bound[name]:
                problems.append(
                    f"{row.kernel}: {name} of {getattr(row, name)} bytes, bound {bound[name]}"
                )
        if row.shapes.keys() != bound["shapes"].keys():
            problems.append(f"{row.kernel}: shapes {[*row.shapes]}, bounds {[*bound['shapes']]}")
            continue
        for shape, got in row.shapes.items():
            for name, most in zip(("instructions", "mufu"), bound["shapes"][shape], strict=True):
                if getattr(got, name) > most:
                    problems.append(
                        f"{row.kernel} {shape}: {getattr(got, name):.2f} {name} per element, "
                        f"bound {most:.2f}"
                    )
    for kernel in bounds.keys() - {row.kernel for row in facts}:
        problems.append(f"{kernel}: has a bound but is not compiled")
    return problems


def new_bounds(facts: list[Facts]) -> dict[str, dict[str, Any]]:
    """Return bounds a little above what was found: ptxas' next version may differ by as much."""
    return {
        row.kernel: {
            "registers": min(255, row.registers + 8),
            "size": round(1.1 * row.size),
            "occupancy": round(0.8 * row.occupancy, 3),
            "wide_loads": row.wide_loads,
            "wide_stores": row.wide_stores,
            "shapes": {
                shape: [round(1.05 * got.instructions, 1), round(1.05 * got.mufu, 2)]
                for shape, got in row.shapes.items()
            },
        }
        for row in facts
    }


def text_of_bounds(bounds: dict[str, dict[str, Any]]) -> str:
    """Return all bounds as JSON, a kernel a line."""
    architectures = []
    for architecture, kernels in sorted(bounds.items()):
        lines = (f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(kernels.items()))
        architectures.append(f' "{architecture}": {{\n' + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(architectures) + "\n}\n"


def table(architecture: str, facts: list[Facts]) -> str:
    """Return the table in Markdown: a line for every kernel and shape."""
    lines = [
        f"### {architecture}",
        "",
        "| kernel | registers | spills | shared | occupancy | load | store | shape | instr./elem. |"
        " MUFU/elem. | estimate, not run on a GPU |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in facts:
        about = (
            f"| `{row.kernel}` | {row.registers} | {row.spills} | {row.shared_memory} |"
            f" {row.occupancy:.2f} | {row.wide_loads or ''} | {row.wide_stores or ''} |"
        )
        if not row.shapes:
            lines.append(about + " | | | |")
        for shape, got in row.shapes.items():
            lines.append(
                f"{about} {shape} | {got.instructions:.1f} | {got.mufu:.2f} | {got.estimate} |"
            )
            about = "| | | | | | | |"
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
        BOUNDS.write_text(text_of_bounds(bounds))
    if options.json:
        options.json.write_text(json.dumps(all_facts, indent=1) + "\n")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
