"""The cells of a CSV file, with the line of each in every message."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from lnl_ext.data.bias_column import BiasColumn
from lnl_ext.data.values import is_missing, one_spelling, told
from lnl_ext.errors import UserError

__all__ = ["CsvRows", "columns_of_parts", "examples"]

_SPLITS = {"train": "train"} | dict.fromkeys(("validation", "val", "valid"), "validation")
_SPLITS["test"] = "test"
_SHOWN = 5  # examples in a message
_SEPARATORS = (",", ";", "\t", "|")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def examples(items: Sequence[str]) -> str:
    """Return the first of many items as text."""
    shown = "; ".join(items[:_SHOWN])
    return shown + (f"; and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def _separator(text: str, wanted: Sequence[str]) -> str:
    """Return what separates the cells of a header: a comma, if that gives the wanted columns."""

    def fit(separator: str) -> tuple[bool, int]:
        header = _header(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
        return all(name in header for name in wanted), len(header)

    return max(_SEPARATORS, key=fit)


def _header(reader: Iterator[list[str]]) -> list[str]:
    return [name.strip() for name in next(reader, [])]


@dataclasses.dataclass
class CsvRows:
    """The cells of a CSV file by column, with the line of each row."""

    path: Path
    columns: dict[str, list[str]]
    lines: list[int]
    notes: list[str]
    """How cells were read that can be read in more than one way."""

    @classmethod
    def read(cls, path: Path, wanted: Iterable[str] | None, *, exact: bool = False) -> CsvRows:
        """Read the columns called ``wanted``; None: those whose name occurs once.

        A byte order mark (UTF-8 or UTF-16) and a first line ``sep=;``, which spreadsheets write,
        are understood. Without that line the separator is the one of comma, semicolon, tab and bar
        that gives the wanted columns. ``exact`` is for a file that a program wrote: commas separate
        its cells, and spaces around them are kept.

        Raises
        ------
        UserError
            The file or a column is not there, or not in the form of a CSV file.
        """
        try:
            content = path.read_bytes()
            text = content.decode("utf-16" if content[:2] in _UTF16 else "utf-8-sig")
            return cls._parse(path, text, None if wanted is None else list(wanted), exact)
        except FileNotFoundError:
            raise UserError(f"no CSV file at {path}") from None
        except IsADirectoryError:
            raise UserError(f"{path} is a folder, expected a CSV file") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from None
        except csv.Error as error:
            raise UserError(f"{path} is not a CSV file: {error}") from None

    @classmethod
    def _parse(cls, path: Path, text: str, wanted: list[str] | None, exact: bool) -> CsvRows:
        separator, above = ",", 0
        if not exact:
            named = re.match(r'"?sep=([^\r\n])"?[ \t]*(?:\r\n|\r|\n)', text, re.IGNORECASE)
            if named:
                text, above = text[named.end() :], 1
            separator = named[1] if named else _separator(text, wanted or [])
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        header = _header(reader)
        if not header:
            raise UserError(f"{path} is empty, expected a header line with the names of columns")
        if wanted is None:
            wanted = [name for name in header if header.count(name) == 1]
        for name in wanted:
            if name not in header:
                raise UserError(
                    f"{path} has no column {name!r}; it has {', '.join(map(repr, header))}"
                )
            if header.count(name) > 1:
                raise UserError(f"{path} has {header.count(name)} columns called {name!r}")
        at = {name: header.index(name) for name in wanted}
        columns: dict[str, list[str]] = {name: [] for name in wanted}
        lines = []
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{path}, line {above + reader.line_num}: {len(row)} cells, expected "
                    f"{len(header)} as in the header"
                )
            lines.append(above + reader.line_num)
            for name, position in at.items():
                columns[name].append(row[position] if exact else row[position].strip())
        if not lines:
            raise UserError(f"{path} has a header and no row")
        notes = [] if separator == "," else [f"{path} is separated by {separator!r}"]
        return cls(path, columns, lines, notes)

    def cells(self, name: str) -> Iterator[tuple[int, str]]:
        """Return line and cell of every row."""
        return zip(self.lines, self.columns[name], strict=True)

    def required(self, name: str, what: str) -> list[str]:
        """Return a column in which nothing may be missing."""
        empty = [
            f"{line} ({cell!r})" if cell else str(line)
            for line, cell in self.cells(name)
            if is_missing(cell)
        ]
        if empty:
            raise UserError(
                f"{self.path}, column {name!r}: no {what} in line {examples(empty)}: every image "
                "needs one; remove the lines or fill them in"
            )
        return self.columns[name]

    def convert(self, name: str, value: Callable[[str], str | None]) -> list[str | None]:
        """Return the values of a column's cells."""
        values, wrong = [], []
        for line, cell in self.cells(name):
            try:
                values.append(value(cell))
            except ValueError as error:
                wrong.append(f"line {line} has {cell!r}, {error}")
        if wrong:
            raise UserError(f"{self.path}, column {name!r}: {examples(wrong)}")
        return values

    def labels(self, name: str) -> list[str]:
        """Return the classes of a column of labels, of which none may be missing."""
        cells = self.required(name, "label")
        spelling = one_spelling(cells)
        self._tell(name, spelling)
        return [spelling[cell] for cell in cells]

    def bias(
        self, columns: Sequence[BiasColumn], *, exact: bool = False
    ) -> dict[str, list[str | None]]:
        """Return the classes of bias columns, in none of which all may be missing.

        ``exact``: cells that differ are different classes.
        """
        values = {}
        for column in columns:
            found = self.convert(column.name, column.value)
            if all(value is None for value in found):
                raise UserError(f"{self.path}, column {column.name!r}: every value is missing")
            if not exact:
                spelling = {} if column.edges else one_spelling(found)
                self._tell(column.name, spelling)
                found = [None if value is None else spelling.get(value, value) for value in found]
            values[column.name] = found
        return values

    def _tell(self, name: str, spelling: dict[str, str]) -> None:
        told_ = told(self.columns[name], spelling)
        self.notes += [f"{self.path}, column {name!r}: {note}" for note in told_]

    def split(self, name: str) -> list[str]:
        """Return the part of every row: train, validation or test."""

        def value(cell: str) -> str:
            if cell.lower() not in _SPLITS:
                raise ValueError("expected train, validation or test")
            return _SPLITS[cell.lower()]

        return [str(part) for part in self.convert(name, value)]

    def paths(self, name: str, root: Path) -> list[Path]:
        """Return absolute paths, each of a file that is there, each once."""
        paths = [
            Path(os.path.abspath(root / cell)) for cell in self.required(name, "path of an image")
        ]
        seen: dict[Path, int] = {}
        twice = []
        for line, path in zip(self.lines, paths, strict=True):
            if path in seen:
                twice.append(f"{path} in lines {seen[path]} and {line}")
            seen.setdefault(path, line)
        if twice:
            raise UserError(
                f"{self.path}, column {name!r}: an image may come once: {examples(twice)}"
            )
        gone = [
            f"line {n}: {p}"
            for n, p in zip(self.lines, paths, strict=True)
            if not os.path.isfile(p)  # unlike Path.is_file, also of a name that is too long
        ]
        if gone:
            raise UserError(
                f"{self.path}, column {name!r}: {len(gone)} of {len(paths)} images are not there "
                f"({examples(gone)}); relative paths start at {root}"
            )
        return paths


def columns_of_parts(path: Path) -> list[str]:
    """Return the columns of a CSV file that say train and another part in every row.

    Raises
    ------
    UserError
        As `CsvRows.read`.
    """
    names = []
    for name, cells in CsvRows.read(path, None).columns.items():
        words = {cell.lower() for cell in cells}
        if words <= _SPLITS.keys() and "train" in words and len(words) > 1:
            names.append(name)
    return names
