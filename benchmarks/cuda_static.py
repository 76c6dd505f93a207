"""Read registers, spills and accesses of the CUDA kernels from their machine code, without a GPU.

    python benchmarks/cuda_static.py [--architectures sm_80 ...] [--write-bounds]

Compiles the kernels for each architecture, prints a table, and exits with 1 where a rule or a
committed bound (benchmarks/gpu/bounds.json) is broken.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from gpu.machine_code import (
    BOUNDS,
    WARPS,
    Bounds,
    Kernel,
    broken_bounds,
    broken_rules,
    compile_kernels,
    missing,
    new_bounds,
)
from recording.options import command


def table(architecture: str, kernels: Sequence[Kernel]) -> str:
    """Return the table in Markdown, a line a kernel, with its accesses of so many bytes."""
    from lnl_ext.reporting.tables import markdown  # imports torch, which --help does without

    rows = [
        (
            f"`{kernel.name}`",
            f"{kernel.registers}",
            f"{kernel.occupancy(architecture):.2f}",
            f"{kernel.spills}",
            f"{kernel.access or ''}",
            f"{kernel.wide('LDG') or ''}",
            f"{kernel.wide('STG') or ''}",
        )
        for kernel in kernels
    ]
    header = ("kernel", "registers", "occupancy by registers", "spills", "bytes", "loads", "stores")
    return f"### {architecture}\n\n{markdown(header, rows)}\n"


def text_of(bounds: Bounds) -> str:
    """Return bounds as JSON, a kernel a line."""
    lines = (f" {json.dumps(name)}: {json.dumps(most)}" for name, most in sorted(bounds.items()))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = command(__doc__)
    parser.add_argument("--architectures", nargs="+", choices=list(WARPS), default=list(WARPS))
    parser.add_argument(
        "--write-bounds", action="store_true", help="commit to what is found, for all architectures"
    )
    options = parser.parse_args(arguments)
    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    compiled = {}
    for architecture in WARPS if options.write_bounds else options.architectures:
        compiled[architecture] = compile_kernels(architecture)
        print(table(architecture, compiled[architecture]), flush=True)
    if options.write_bounds:
        BOUNDS.write_text(text_of(new_bounds(compiled)), encoding="utf-8")
    bounds = json.loads(BOUNDS.read_text(encoding="utf-8"))
    problems = [
        f"{architecture} {problem}"
        for architecture, kernels in compiled.items()
        for problem in [
            *(problem for kernel in kernels for problem in broken_rules(kernel)),
            *broken_bounds(kernels, architecture, bounds),
        ]
    ]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
