"""What a table's cells mean: which are missing, and which are one value, by the rules of pandas."""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from decimal import Decimal

__all__ = ["MISSING", "by_size", "is_missing", "one_spelling", "reading", "told"]

MISSING = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"}
    | {"<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
)
"""Cells that stand for a missing value: those of ``pandas.read_csv``."""

_IN_SMALL_LETTERS = {name.lower() for name in MISSING}
_NUMBER = re.compile(
    r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]{1,6})?|inf(?:inity)?)", re.IGNORECASE
)
_TRUTH = dict.fromkeys(("True", "TRUE", "true"), True) | dict.fromkeys(
    ("False", "FALSE", "false"), False
)


def is_missing(cell: str) -> bool:
    """Tell whether a cell stands for a missing value."""
    return cell.strip() in MISSING


def _number(text: str) -> Decimal | None:
    # Exact: a long identifier is not rounded to its neighbour.
    return Decimal(text) if _NUMBER.fullmatch(text) else None


_READINGS: tuple[Callable[[str], Decimal | bool | None], ...] = (_number, _TRUTH.get)


def reading(values: Iterable[str]) -> Callable[[str], Hashable]:
    """Return what is equal for equal values of a column, as pandas reads the column.

    A column of numbers is read as numbers, one of truth values as these, any other as text.
    """
    names = set(values)
    for read in _READINGS:
        if names and not any(read(name) is None for name in names):
            return functools.partial(_read_or_text, read)
    return str


def _read_or_text(read: Callable[[str], Hashable], text: str) -> Hashable:
    value = read(text)
    return text if value is None else value


def one_spelling(cells: Iterable[str | None]) -> dict[str, str]:
    """Return the spelling of each value of a column: the shortest one that occurs."""
    names = {cell for cell in cells if cell is not None}
    read = reading(names)
    spellings: defaultdict[Hashable, list[str]] = defaultdict(list)
    for name in names:
        spellings[read(name)].append(name)
    return {
        name: min(same, key=lambda spelling: (len(spelling), spelling))
        for same in spellings.values()
        for name in same
    }


def by_size(names: Iterable[str]) -> list[str]:
    """Return names in order: numbers by size if all are numbers."""
    ordered = sorted(names)
    numbers = {name: _number(name) for name in ordered}
    if None not in numbers.values():
        ordered.sort(key=lambda name: numbers[name] or Decimal(0))
    return ordered


def told(cells: Iterable[str], spelling: dict[str, str]) -> list[str]:
    """Say which cells of a column were read as something other than what they say.

    Parameters
    ----------
    cells
        As they stand in the table.
    spelling
        The values of `one_spelling`; none for bins.
    """
    counts = Counter(cells)
    notes = []
    for name in by_size(set(spelling.values())):
        same = sorted(other for other, chosen in spelling.items() if chosen == name)
        if len(same) > 1:
            notes.append(f"{_listed(same)} are one class, {name!r}")
    missing = sorted(cell for cell in counts if cell and is_missing(cell))
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        notes.append(f"{_listed(missing, counts)} {verb} missing")
    almost = sorted(name for name in spelling if name.lower() in _IN_SMALL_LETTERS)
    if almost:
        what = "is a class" if len(almost) == 1 else "are classes"
        notes.append(f"{_listed(almost)} {what}, not missing")
    return notes


def _listed(names: list[str], counts: Counter[str] | None = None) -> str:
    shown = [repr(name) + (f" ({counts[name]})" if counts else "") for name in names]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
