"""How fast lnl_ext is, beside plain PyTorch, torch.compile and the floor, in one run.

    python benchmarks/throughput.py all

measures everything and writes ``benchmarks/results/throughput_*.json``,
``docs/images/throughput_*.png`` and the tables of
``docs/performance.md``. One subject alone: loss, linear, linear_large (many classes), adversary,
step, memory or scaling. ``--quick`` only shows that it runs; it writes
nothing unless ``--output`` says where.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import adversary, linear, losses, memory, plots, scaling, steps, tables
from timing.settings import Settings, describe, environment

ROOT = Path(__file__).resolve().parent.parent
SUBJECTS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "loss": losses.measure,
    "linear": linear.measure,
    "linear_large": linear.measure_large,
    "adversary": adversary.measure,
    "step": steps.measure,
    "memory": memory.measure,
    "scaling": scaling.measure,
}
PAGE = Path("docs") / "performance.md"


def measure(subject: str, settings: Settings, command: str) -> dict[str, Any]:
    """Measure a subject; return its report as plain data."""
    report = {"subject": subject, "command": command, "quick": settings.quick}
    return report | {"environment": environment(settings)} | SUBJECTS[subject](settings)


def write(report: dict[str, Any], output: Path) -> None:
    """Write a report's figures, plot and section of the page under the folder ``output``."""
    subject = report["subject"]
    results = output / "benchmarks" / "results" / f"throughput_{subject}.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plots.draw(report, output / "docs" / "images" / f"throughput_{subject}.png")
    page = output / PAGE
    source = page if page.exists() else ROOT / PAGE
    text = tables.replace_section(source.read_text(encoding="utf-8"), report)
    page.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, print and write."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=["all", *SUBJECTS])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=6.0, help="about, for one case")
    parser.add_argument("--quick", action="store_true", help="tiny cases, a fraction of a second")
    parser.add_argument("--output", type=Path, help="folder to write under (this repository)")
    options = parser.parse_args(arguments)
    if options.threads < 1 or options.seconds <= 0:
        parser.error("--threads must be at least 1, and --seconds above 0")
    torch.set_num_threads(options.threads)
    seconds = 0.1 if options.quick else options.seconds
    settings = Settings(options.device, options.threads, seconds, options.quick)
    output = options.output
    if output is None and not options.quick:
        output = ROOT
    # Where it is written changes nothing of what is measured.
    told = [*arguments]
    if options.output is not None and "--output" in told:
        del told[told.index("--output") : told.index("--output") + 2]
    command = " ".join(["python benchmarks/throughput.py", *told])
    print(describe(environment(settings)), flush=True)
    for subject in SUBJECTS if options.subject == "all" else [options.subject]:
        began = time.monotonic()
        report = measure(subject, settings, command)
        print(f"\n{report['title']} ({time.monotonic() - began:.0f} s)\n\n{tables.table(report)}")
        if "work" in report:
            print(f"\n{report['work']}\n\n{tables.work_table(report)}")
        sys.stdout.flush()
        if output is not None:
            write(report, output)


if __name__ == "__main__":
    main()
