"""A run as a line of a results file, as a row of a table, and as a page."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lnl_ext.reporting import PAGE, RunSummary, write_run_page
from lnl_ext.reporting.tables import align


def append(path: Path, run: Any) -> None:
    """Add a run, a dataclass, to a results file: one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(dataclasses.asdict(run)) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a results file.

    Raises
    ------
    ValueError
        A line is not JSON; the message has its number.
    """
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not a run: {error!r}") from error
    return runs


def text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table for a terminal."""
    rule = ["-" * max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(align([header, rule, *rows]))


def command_line(script: str, arguments: Sequence[str] | None) -> str:
    """Return the command that a page shows."""
    given = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", f"benchmarks/{script}.py", *given])


def write_page(folder: Path, summary: RunSummary) -> None:
    """Write the page of a run into a folder, and print where it is."""
    page = folder / PAGE
    print(write_run_page(page, summary) or f"page: {page}")
