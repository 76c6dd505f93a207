"""The images of a training run: read, checked, split, and in batches."""

from __future__ import annotations

import dataclasses
import os

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lnl_ext.cli.options import (
    ARCH,
    EPOCHS,
    GROUP,
    IMAGE_SIZE,
    SMALL_IMAGE_SIZE,
    SMALL_SIDE,
    STEPS,
    TrainOptions,
)
from lnl_ext.cli.run_folder import split_text
from lnl_ext.cli.samples import Samples, bias_classes, counts, encoded, read_samples
from lnl_ext.data.images import Sample, training_transform, typical_side
from lnl_ext.data.split import balanced_split, stratified_split
from lnl_ext.data.table import BiasColumn, class_names
from lnl_ext.errors import UserError
from lnl_ext.files import check_names
from lnl_ext.models.backbones import SMALL
from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.training.balance import Draws, balanced_weights, draws, group_numbers
from lnl_ext.training.batches import ShardedBatchSampler
from lnl_ext.training.distributed import Processes
from lnl_ext.training.methods import METHODS

__all__ = ["RunData", "decided_by_the_data", "draws_of", "training_batches"]


@dataclasses.dataclass(frozen=True)
class RunData:
    """The samples of a run, in two parts, and the names of their classes."""

    train: Samples
    validation: Samples
    labels: list[str]
    bias: dict[str, list[str]]
    split: str
    """As a CSV file."""

    @classmethod
    def load(cls, options: TrainOptions) -> RunData:
        """Read and split what the options name.

        Raises
        ------
        UserError
            It cannot be used.
        """
        columns = [BiasColumn.parse(text) for text in options.bias_column]
        table = read_samples(options, columns, options.split_column)
        assert table.labels is not None
        check_names([os.path.abspath(table.source), *map(str, table.paths)])
        label_column = options.label_column or "folder"
        labels = class_names(table.labels, label_column)
        if len(labels) < 2:
            raise UserError(
                f"{table.source}: only label {labels[0]!r} occurs, expected two or more"
            )
        if len(labels) == len(table):
            raise UserError(
                f"{table.source}, column {label_column!r}: {len(labels)} different labels of as "
                "many images, expected classes of several images each"
            )
        bias = bias_classes(table, columns)
        samples = encoded(table, label_column, labels, bias, workers=options.workers)
        train, validation, parts = _split(samples, options)
        data = cls(train, validation, labels, bias, split_text(samples, parts))
        data._check()
        return data

    def _check(self) -> None:
        for name, classes, target in [
            ("labels", self.labels, self.train.labels),
            *((name, classes, self.train.bias[name]) for name, classes in self.bias.items()),
        ]:
            unseen = [
                c for c, n in zip(classes, counts(target, len(classes)), strict=True) if not n
            ]
            if unseen and name == "labels":
                raise UserError(
                    f"no training image has label {', '.join(map(repr, unseen))}: it could not be "
                    "learned; put some into training or remove it"
                )
            if unseen:
                print(
                    f"Note: no training image has {name} {', '.join(map(repr, unseen))}; the "
                    "heads cannot learn it"
                )

    def describe(self) -> str:
        """Say what there is."""
        lines = [
            f"{len(self.train)} training and {len(self.validation)} validation images; labels: "
            + _counted(self.labels, torch.cat([self.train.labels, self.validation.labels]))
        ]
        for name, classes in self.bias.items():
            target = torch.cat([self.train.bias[name], self.validation.bias[name]])
            missing = int((target == IGNORE_INDEX).sum())
            lines.append(
                f"bias {name}: {_counted(classes, target)}"
                + (f"; missing {missing}" if missing else "")
            )
        return "\n".join(lines)


def _counted(classes: list[str], target: Tensor) -> str:
    sizes = zip(classes, counts(target, len(classes)), strict=True)
    return ", ".join(f"{name} {size}" for name, size in sizes)


def _split(samples: Samples, options: TrainOptions) -> tuple[Samples, Samples, list[str]]:
    table = samples.table
    if table.split is not None:
        parts = [table.split[row] for row in samples.rows]
    else:
        assert table.labels is not None
        split = balanced_split if options.balance_validation else stratified_split
        _, held = split(
            [table.labels[row] for row in samples.rows],
            [[values[row] for row in samples.rows] for values in table.bias.values()],
            options.validation,
            options.seed,
        )
        inside = set(held)
        parts = ["validation" if n in inside else "train" for n in range(len(samples))]
    chosen = {
        part: [n for n, name in enumerate(parts) if name == part]
        for part in ("train", "validation")
    }
    for part, positions in chosen.items():
        if not positions:
            raise UserError(f"column {options.split_column!r} leaves no image for {part}")
    return samples.part(chosen["train"]), samples.part(chosen["validation"]), parts


def decided_by_the_data(options: TrainOptions, data: RunData) -> TrainOptions:
    """Return the options with what the images decide where nothing is given."""
    side = options.image_size or typical_side(data.train.paths)
    small = side <= SMALL_SIDE and options.weights == "none"
    arch = options.arch or (SMALL if small else ARCH)
    size = options.image_size or min(side, SMALL_IMAGE_SIZE if arch == SMALL else IMAGE_SIZE)
    steps = options.steps
    if options.epochs is None and steps is None:
        steps = max(STEPS, EPOCHS * max(1, len(data.train) // options.batch_size))
    return dataclasses.replace(options, arch=arch, image_size=size, steps=steps)


def draws_of(data: RunData, options: TrainOptions) -> Draws:
    """Return how the training images are drawn, and what the losses need of every one, by name."""
    method, labels = METHODS[options.method], data.train.labels
    columns = list(data.train.bias.values())
    made = draws(
        labels,
        data.train.bias,
        balance=options.balance or 0.0,
        adjust=bool(options.adjust),
    )
    if method.reweighted:
        made.targets[GROUP] = balanced_weights(labels, columns).float()
    if method.group_dro:
        made.targets[GROUP] = group_numbers(labels, columns)
    return made


def training_batches(
    samples: Samples,
    options: TrainOptions,
    processes: Processes,
    made: Draws,
) -> DataLoader[Sample]:
    """Return this process's share of shuffled batches, varied as the options say.

    Parameters
    ----------
    samples, options, processes
        Of the run.
    made
        How images are drawn, and further bias targets (`draws_of`).

    Raises
    ------
    UserError
        There are fewer than two images for every process.
    """
    if len(samples) < 2 * processes.world_size:  # batch norm cannot take a batch of one
        raise UserError(
            f"{len(samples)} training images for {processes.world_size} processes, expected at "
            "least two for each: start fewer processes"
        )
    assert options.image_size is not None
    transform = training_transform(options.image_size, options.augment)
    sampler = ShardedBatchSampler(
        len(samples),
        options.batch_size,
        drop_last=len(samples) >= options.batch_size,  # batch norm cannot take a batch of one
        weights=made.weights,
        processes=processes,
    )
    return DataLoader(
        samples.dataset(transform, made.targets, cache=options.cache, workers=options.workers),
        batch_sampler=sampler,
        num_workers=options.workers,
        generator=sampler.generator,
        pin_memory=torch.cuda.is_available(),
    )
