"""Tables: what is in them, and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

__all__ = ["Table", "align", "markdown"]


@dataclasses.dataclass(frozen=True)
class Table:
    """A header and rows, for a page.

    Attributes
    ----------
    header
        Names of the columns.
    rows
        Of cells: text, a number, None where there is nothing, or a pair of a number and how many
        samples it is of.
    note
        What a reader should know, below it.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if position else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)
