"""Read registers, stack, accesses and bytes in flight of the CUDA kernels, without a GPU.

    python benchmarks/cuda_static.py [--architectures sm_80 ...] [--write-bounds] [--write-docs]

Compiles the kernels for each architecture, or reads them from a compiled module (--module), asks
the launchers how they call them, prints a table, and exits with 1 where a rule or a committed bound
(benchmarks/gpu/bounds.json) is broken.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpu.machine_code import (
    BOUNDS,
    WARPS,
    Bounds,
    Call,
    Kernel,
    broken_bounds,
    broken_rules,
    bytes_in_flight,
    calls_of,
    compile_kernels,
    kernels_in,
    missing,
    new_bounds,
    too_few_in_flight,
)
from recording.options import command

DOCS = Path(__file__).resolve().parents[1] / "docs" / "cuda.md"


def table(architecture: str, kernels: Sequence[Kernel], calls: Mapping[str, Sequence[Call]]) -> str:
    """Return the table in Markdown, a line a kernel, with its accesses of so many bytes."""
    from lnl_ext.reporting.tables import markdown  # imports torch, which --help does without

    def least_and_most(kernel: Kernel) -> list[int]:
        found = {bytes_in_flight(kernel, c, architecture) for c in calls.get(kernel.name, ())}
        return sorted({min(found), max(found)}) if found else []

    rows = [
        (
            f"`{kernel.name}`",
            f"{kernel.registers}",
            f"{kernel.occupancy(architecture):.2f}",
            f"{kernel.stack}",
            f"{kernel.access or ''}",
            f"{kernel.wide('LDG') or ''}",
            f"{kernel.wide('STG') or ''}",
            " to ".join(f"{found / 1024:.0f}" for found in least_and_most(kernel)),
        )
        for kernel in kernels
    ]
    accesses = ("bytes", "loads", "stores", "KiB in flight")
    header = ("kernel", "registers", "occupancy by registers", "stack", *accesses)
    return f"### {architecture}\n\n{markdown(header, rows)}\n"


def with_table(page: str, new: str) -> str:
    """Return a page with the table of the kernels for labels in the place of its former one."""
    lines = [line for line in new.splitlines() if line.startswith("|")]
    labels = [line for line in lines if "`" not in line or is_for_labels(line.split("`")[1])]
    before, header, rest = page.partition("| kernel | registers |")
    if not header:
        raise ValueError(f"{DOCS} has no table of kernels and their registers")
    return before + "\n".join(labels) + rest[rest.index("\n\n") :]


def is_for_labels(name: str) -> bool:
    """Whether a kernel reads logits or features, and is not for a target of every class."""
    kernel = Kernel(name)
    return kernel.access is not None and kernel.arguments[1] != "true"


def text_of(bounds: Bounds) -> str:
    """Return bounds as JSON, a kernel a line."""
    lines = (f" {json.dumps(name)}: {json.dumps(most)}" for name, most in sorted(bounds.items()))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = command(__doc__)
    parser.add_argument("--architectures", nargs="+", choices=list(WARPS), default=list(WARPS))
    parser.add_argument(
        "--module",
        type=Path,
        metavar="FILE",
        help="read this instead of compiling: lnl_ext/_cuda*.so, built for the architectures",
    )
    parser.add_argument(
        "--write-bounds", action="store_true", help="commit to what is found, for all architectures"
    )
    parser.add_argument(
        "--write-docs", action="store_true", help="put what sm_90 has into docs/cuda.md"
    )
    options = parser.parse_args(arguments)
    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    compiled, calls = {}, {}
    for architecture in WARPS if options.write_bounds else options.architectures:
        compiled[architecture] = (
            kernels_in(options.module, architecture)
            if options.module
            else compile_kernels(architecture)
        )
        calls[architecture] = calls_of(architecture)
        print(table(architecture, compiled[architecture], calls[architecture]), flush=True)
    if options.write_docs:
        new = table("sm_90", compiled["sm_90"], calls["sm_90"])
        DOCS.write_text(with_table(DOCS.read_text(encoding="utf-8"), new), encoding="utf-8")
    if options.write_bounds:
        BOUNDS.write_text(text_of(new_bounds(compiled)), encoding="utf-8")
    bounds = json.loads(BOUNDS.read_text(encoding="utf-8"))
    problems = [
        f"{architecture} {problem}"
        for architecture, kernels in compiled.items()
        for problem in [
            *(problem for kernel in kernels for problem in broken_rules(kernel)),
            *too_few_in_flight(kernels, calls[architecture], architecture),
            *broken_bounds(kernels, architecture, bounds),
        ]
    ]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
