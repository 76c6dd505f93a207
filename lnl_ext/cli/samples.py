"""From a table of samples to batches of images: encoded, checked, split, decoded by workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lnl_ext.cli.options import DataOptions
from lnl_ext.data.images import (
    ImageDataset,
    Sample,
    SquareTransform,
    evaluation_transform,
    readable,
)
from lnl_ext.data.table import (
    BiasColumn,
    Table,
    class_names,
    encode,
    read_folder,
    read_table,
)
from lnl_ext.errors import UserError
from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.training.distributed import shard

__all__ = ["Samples", "encoded", "evaluation_batches", "read_samples", "tell"]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples of a table with class numbers instead of names."""

    table: Table
    rows: tuple[int, ...]
    """Of the table: those that are used."""
    labels: Tensor
    """(N,) int64."""
    bias: dict[str, Tensor]
    """(N,) int64 by column, `IGNORE_INDEX` where missing."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)

    def part(self, positions: Sequence[int]) -> Samples:
        """Return some of the samples."""
        chosen = torch.tensor(positions, dtype=torch.long)
        return Samples(
            self.table,
            tuple(self.rows[position] for position in positions),
            self.labels[chosen],
            {name: target[chosen] for name, target in self.bias.items()},
        )

    @property
    def paths(self) -> list[Path]:
        """Of the images."""
        return [self.table.paths[row] for row in self.rows]

    def dataset(
        self,
        transform: SquareTransform,
        more: Mapping[str, Tensor] | None = None,
        *,
        cache: float = 0.0,
        workers: int = 0,
    ) -> ImageDataset:
        """Return a data set of the images, with more bias targets if there are any.

        Where they fit into ``cache`` GiB, ``workers`` processes decode them now.
        """
        dataset = ImageDataset(self.paths, self.labels, self.bias | dict(more or {}), transform)
        if 3 * transform.side**2 * len(self) <= cache * 2**30:
            dataset.keep_decoded(workers=workers)
        return dataset


def read_samples(
    options: DataOptions, columns: Sequence[BiasColumn], split_column: str | None = None
) -> Table:
    """Read the table that the options describe, and say what is to be known of it."""
    table = _read(options, columns, split_column)
    tell(table)
    return table


def tell(table: Table) -> None:
    """Print what was left out of a table, and how its cells were read."""
    for note in table.notes:
        print(note if note.startswith("Left out") else f"Note: {note}")


def _read(options: DataOptions, columns: Sequence[BiasColumn], split_column: str | None) -> Table:
    if options.images is not None and options.label_column is None:
        return read_folder(
            options.images,
            csv_file=options.csv,
            image_column=options.image_column,
            bias_columns=columns,
            split_column=split_column,
        )
    if options.csv is None:
        raise UserError("--label-column is a column of a CSV file: give --csv FILE")
    return read_table(
        options.csv,
        image_column=options.image_column,
        label_column=options.label_column,
        bias_columns=columns,
        split_column=split_column,
        root=options.images,
    )


def bias_classes(table: Table, columns: Sequence[BiasColumn]) -> dict[str, list[str]]:
    """Return the classes of every bias column.

    Raises
    ------
    UserError
        A column has a single class: there is nothing to unlearn.
    """
    classes = {column.name: class_names(table.bias[column.name], column) for column in columns}
    for name, names in classes.items():
        if len(set(table.bias[name]) - {None}) < 2:
            raise UserError(
                f"{table.source}, column {name!r}: only {', '.join(map(repr, names))} occurs, "
                "expected two bias classes or more"
            )
    return classes


def encoded(
    table: Table,
    label_column: str,
    labels: Sequence[str],
    bias: Mapping[str, Sequence[str]],
    *,
    workers: int,
) -> Samples:
    """Return the samples whose image can be read.

    Raises
    ------
    UserError
        A label, or a bias value, is not among the classes.
    TooManyUnreadableError
        More than one image in a hundred cannot be read.
    """
    numbers = torch.zeros(len(table), dtype=torch.long)
    if table.labels is not None:
        numbers = encode(table, table.labels, labels, label_column)
    targets = {n: encode(table, table.bias[n], classes, n) for n, classes in bias.items()}
    everything = Samples(table, tuple(range(len(table))), numbers, targets)
    kept = readable(table.paths, workers=workers)
    return everything if len(kept) == len(table) else everything.part(kept)


def evaluation_batches(
    samples: Samples,
    image_size: int,
    options: DataOptions,
    *,
    batch_size: int | None = None,
    cache: float = 0.0,
) -> DataLoader[Sample]:
    """Return batches in order, without augmentation: of this process's share of the samples.

    Images that fit into ``cache`` GiB are decoded once, for several passes.
    """
    transform = evaluation_transform(image_size)
    return DataLoader(
        shard(samples.dataset(transform, cache=cache, workers=options.workers)),
        batch_size=batch_size or options.batch_size,
        num_workers=options.workers,
        # Of its own, so that an evaluation leaves the random numbers of the training alone.
        generator=torch.Generator(),
    )


def counts(target: Tensor, classes: int) -> list[int]:
    """Return the number of samples of every class."""
    return torch.bincount(target[target != IGNORE_INDEX], minlength=classes).tolist()
