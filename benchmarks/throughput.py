"""Time lnl_ext beside plain PyTorch, torch.compile and the floor, in one run.

    python benchmarks/throughput.py all

measures everything and writes ``benchmarks/results/throughput_*.json``,
``docs/images/throughput_*.png`` and the tables of
``docs/performance.md``. One subject alone: loss, small (a call's fixed cost), linear, linear_large
(many classes), adversary, step, memory or scaling. ``--quick`` only shows that it runs; it writes
nothing unless ``--output`` says where.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from recording.options import command

ROOT = Path(__file__).resolve().parent.parent
SUBJECTS = ("loss", "small", "linear", "linear_large", "adversary", "step", "memory", "scaling")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, print and write."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = command(__doc__)
    parser.add_argument("subject", choices=["all", *SUBJECTS])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's choice by default")
    parser.add_argument("--seconds", type=float, default=6.0, help="about, for one case")
    parser.add_argument("--quick", action="store_true", help="tiny cases, a fraction of a second")
    parser.add_argument("--output", type=Path, help="folder to write under (this repository)")
    options = parser.parse_args(arguments)
    threads = options.threads
    if (threads is not None and threads < 1) or options.seconds <= 0:
        parser.error("--threads must be at least 1, and --seconds above 0")
    import torch
    from timing import reports, tables
    from timing.settings import Settings, describe, environment

    threads = torch.get_num_threads() if threads is None else threads
    torch.set_num_threads(threads)
    seconds = 0.1 if options.quick else options.seconds
    settings = Settings(torch.device(options.device), threads, seconds, options.quick)
    output = options.output
    if output is None and not options.quick:
        output = ROOT
    # Where it is written changes nothing of what is measured.
    told = [*arguments]
    if options.output is not None and "--output" in told:
        del told[told.index("--output") : told.index("--output") + 2]
    shown = " ".join(["python benchmarks/throughput.py", *told])
    print(describe(environment(settings)), flush=True)
    for subject in SUBJECTS if options.subject == "all" else [options.subject]:
        began = time.monotonic()
        report = reports.measure(subject, settings, shown)
        print(f"\n{report['title']} ({time.monotonic() - began:.0f} s)\n\n{tables.table(report)}")
        if "work" in report:
            print(f"\n{report['work']}\n\n{tables.work_table(report)}")
        sys.stdout.flush()
        if output is not None:
            reports.write(report, output)


if __name__ == "__main__":
    main()
