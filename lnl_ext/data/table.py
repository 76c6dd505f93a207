"""A user's own data: images, labels and bias labels from a CSV file or a folder of classes.

Everything is read as text; what is a number, a class or missing is decided here, and whatever
cannot be used is an error that names the file, the line, the column and the value.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lnl_ext.data.bias_column import BiasColumn
from lnl_ext.data.csv_rows import CsvRows, examples
from lnl_ext.data.values import MISSING, by_size, reading
from lnl_ext.errors import UserError
from lnl_ext.ops.types import IGNORE_INDEX

__all__ = [
    "MISSING",
    "BiasColumn",
    "Table",
    "class_names",
    "encode",
    "read_folder",
    "read_table",
]

MAX_CLASSES = 1000
_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True)
class Table:
    """Samples with labels, all fields in the same order.

    Attributes
    ----------
    source : str
        Where they come from, for messages.
    paths : tuple of Path
        Absolute.
    names : tuple of str
        The images as the user wrote them.
    lines : tuple of int
        Line of the CSV file, 0 for none.
    labels : tuple of str, or None
        None where no label column was asked for.
    bias : dict of str to tuple of (str or None)
        By column; None is missing.
    split : tuple of str, or None
        ``"train"``, ``"validation"`` or ``"test"``; None without a split column.
    notes : tuple of str
        What was left out, and how cells were read that can be read in more than one way.
    """

    source: str
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    lines: tuple[int, ...]
    labels: tuple[str, ...] | None
    bias: dict[str, tuple[str | None, ...]]
    split: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.paths)

    def select(self, rows: Sequence[int]) -> Table:
        """Return some of the samples, in the order of ``rows``."""

        def take(values: Sequence[_Value]) -> tuple[_Value, ...]:
            return tuple(values[row] for row in rows)

        return Table(
            source=self.source,
            paths=take(self.paths),
            names=take(self.names),
            lines=take(self.lines),
            labels=None if self.labels is None else take(self.labels),
            bias={name: take(values) for name, values in self.bias.items()},
            split=None if self.split is None else take(self.split),
            notes=self.notes,
        )

    def where(self, row: int) -> str:
        """Say where a sample comes from."""
        return f"{self.source}, line {self.lines[row]}" if self.lines[row] else self.names[row]


def _wanted(*names: str | None, bias: Sequence[BiasColumn]) -> list[str]:
    wanted = [name for name in names if name is not None]
    wanted += [column.name for column in bias]
    for name in wanted:
        if wanted.count(name) > 1:
            raise UserError(f"column {name!r} is named for two purposes")
    return wanted


def _frozen(values: dict[str, list[str | None]]) -> dict[str, tuple[str | None, ...]]:
    return {name: tuple(cells) for name, cells in values.items()}


def read_table(
    path: str | os.PathLike[str],
    *,
    image_column: str,
    label_column: str | None = None,
    bias_columns: Sequence[BiasColumn] = (),
    split_column: str | None = None,
    root: str | os.PathLike[str] | None = None,
    exact: bool = False,
) -> Table:
    """Read a CSV file with a line per image.

    Parameters
    ----------
    path
        A file as `CsvRows.read` takes it, with a header line: comma-separated UTF-8, or what a
        spreadsheet writes instead.
    image_column
        Column of image paths, absolute or relative to ``root``.
    label_column
        Column of labels, any text; none for images to predict.
    bias_columns
        Columns of bias labels. The cells in `MISSING` are missing. As pandas has it, a column of
        numbers is one of numbers: 1 and 1.0 are one class. The table's notes say where this was
        done, for labels too.
    split_column
        Column that says train, validation or test.
    root
        Where relative paths start; the folder of the CSV file by default.
    exact
        For a file that a program wrote: spaces belong to the cells, and any label is one, "NA" too.

    Raises
    ------
    UserError
        The file, a column or a value cannot be used, an image is not there or named twice; the
        message names the line and says what is wanted.
    """
    path = Path(path)
    wanted = _wanted(image_column, label_column, split_column, bias=bias_columns)
    rows = CsvRows.read(path, wanted, exact=exact)
    labels = None
    if label_column is not None:
        labels = rows.columns[label_column] if exact else rows.labels(label_column)
    return Table(
        source=str(path),
        paths=tuple(rows.paths(image_column, path.parent if root is None else Path(root))),
        names=tuple(rows.columns[image_column]),
        lines=tuple(rows.lines),
        labels=None if labels is None else tuple(labels),
        bias=_frozen(rows.bias(bias_columns, exact=exact)),
        split=None if split_column is None else tuple(rows.split(split_column)),
        notes=tuple(rows.notes),
    )


def read_folder(
    folder: str | os.PathLike[str],
    *,
    csv_file: str | os.PathLike[str] | None = None,
    image_column: str = "path",
    bias_columns: Sequence[BiasColumn] = (),
    split_column: str | None = None,
) -> Table:
    """Read a folder with a subfolder of images per class (torchvision's ImageFolder).

    Parameters
    ----------
    folder
        The labels are the names of its subfolders. Hidden files and folders are left out; the
        table's notes count them.
    csv_file
        Bias labels: a CSV file whose ``image_column`` has paths relative to ``folder``. The bias
        of an image without a line is missing; with ``split_column`` it is training data.
    image_column, bias_columns, split_column
        As in `read_table`.

    Raises
    ------
    UserError
        As `read_table`; a line of the CSV file whose image is not in the folder is an error.
    """
    from lnl_ext.data.folder import find_images, is_hidden

    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        raise UserError(f"images {folder}: no such folder")
    paths, notes = find_images(root, classes=True)
    if not paths:
        raise UserError(
            f"images {folder}: no image in its subfolders, which are the classes"
            + "".join(f". {note}" for note in notes)
        )
    names = [path.relative_to(root) for path in paths]
    lines = [0] * len(paths)
    bias: dict[str, list[str | None]] = {c.name: [None] * len(paths) for c in bias_columns}
    split = None if split_column is None else ["train"] * len(paths)
    if csv_file is None:
        if bias_columns or split_column is not None:
            raise UserError("bias and split columns need a CSV file beside the folder of images")
    else:
        position = {path: at for at, path in enumerate(paths)}
        rows = CsvRows.read(Path(csv_file), _wanted(image_column, split_column, bias=bias_columns))
        values = rows.bias(bias_columns)
        parts = None if split_column is None else rows.split(split_column)
        passed = 0
        for row, path in enumerate(rows.paths(image_column, root)):
            if path.is_relative_to(root) and is_hidden(path.relative_to(root)):
                passed += 1
                continue
            if path not in position:
                raise UserError(
                    f"{csv_file}, line {rows.lines[row]}: {path} is not an image in a class of "
                    f"{folder}"
                )
            at = position[path]
            lines[at] = rows.lines[row]
            for name, cells in values.items():
                bias[name][at] = cells[row]
            if split is not None and parts is not None:
                split[at] = parts[row]
        if passed:
            notes.append(f"Left out: {passed} lines of hidden files in {csv_file}")
        notes += rows.notes
    return Table(
        source=str(folder if csv_file is None else csv_file),
        paths=tuple(paths),
        names=tuple(map(str, names)),
        lines=tuple(lines),
        labels=tuple(name.parts[0] for name in names),
        bias=_frozen(bias),
        split=None if split is None else tuple(split),
        notes=tuple(notes),
    )


def class_names(values: Iterable[str | None], column: BiasColumn | str) -> list[str]:
    """Return the classes of a column: the bins in order, or the values, numbers by size.

    Raises
    ------
    UserError
        There are more than `MAX_CLASSES` values: numbers, most likely, that need bins.
    """
    if isinstance(column, BiasColumn) and column.edges:
        return column.bins
    names = {value for value in values if value is not None}
    title = column if isinstance(column, str) else column.name
    if len(names) > MAX_CLASSES:
        raise UserError(
            f"column {title!r} has {len(names)} different values, expected at most {MAX_CLASSES} "
            f"classes; for numbers name bins, as in {title}:bins=0,20,40"
        )
    return by_size(names)


def encode(
    table: Table,
    values: Sequence[str | None],
    classes: Sequence[str],
    column: str,
) -> Tensor:
    """Return class numbers (N,), int64, `IGNORE_INDEX` where a value is missing.

    Parameters
    ----------
    table
        Where the values come from, for the message.
    values
        One per sample.
    classes
        Names in the order of their numbers. If these are numbers, values are compared as numbers.
    column
        Name of the column, for the message.

    Raises
    ------
    UserError
        A value is not in ``classes``.
    """
    read = reading(classes)
    numbers = {read(name): number for number, name in enumerate(classes)}
    wrong = [
        f"{table.where(row)}: {value!r}"
        for row, value in enumerate(values)
        if value is not None and read(value) not in numbers
    ]
    if wrong:
        raise UserError(
            f"column {column!r} has values that the model does not know ({examples(wrong)}); it "
            f"knows {', '.join(map(repr, classes))}"
        )
    return torch.tensor(
        [IGNORE_INDEX if value is None else numbers[read(value)] for value in values]
    )
