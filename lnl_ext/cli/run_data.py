"""The images of a training run: read, checked, split, and in batches."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lnl_ext.adversary.reweighting import logit_adjustment
from lnl_ext.cli.options import (
    ADJUSTMENT,
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
from lnl_ext.training.balance import balanced_weights, group_numbers
from lnl_ext.training.batches import ShardedBatchSampler
from lnl_ext.training.distributed import Processes
from lnl_ext.training.methods import METHODS

__all__ = [
    "RunData",
    "decided_by_the_data",
    "label_adjustment",
    "label_targets",
    "training_batches",
]


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


def label_adjustment(data: RunData) -> Tensor:
    """Return what the bias says about the label of every training image, ``(N, C)``.

    A combination of values is one bias, and a missing value is a value: columns may depend on each
    other, and being missing may depend on the label.
    """
    columns = torch.stack(list(data.train.bias.values()), 1)
    combined = torch.unique(columns, dim=0, return_inverse=True)[1]
    return logit_adjustment(data.train.labels, combined, classes=len(data.labels))


def label_targets(data: RunData, options: TrainOptions) -> dict[str, Tensor]:
    """Return what the label loss of the method needs of every training image, by name."""
    method, columns = METHODS[options.method], list(data.train.bias.values())
    targets = {}
    if options.logit_adjustment and not options.balance:
        targets[ADJUSTMENT] = label_adjustment(data)
    if method.reweighted:
        targets[GROUP] = balanced_weights(data.train.labels, columns).float()
    if method.group_dro:
        targets[GROUP] = group_numbers(data.train.labels, columns)
    return targets


def predicted_by_the_bias(data: RunData, adjustment: Tensor) -> str:
    """Say how many labels the bias predicts, and how many the most frequent label does."""
    labels = data.train.labels
    shares = torch.bincount(labels, minlength=len(data.labels))
    guessed = (adjustment + (shares / len(labels)).log()).argmax(1)
    named = int((guessed == labels).sum())
    text = (
        f"the bias alone predicts the label of {named} of {len(labels)} training images, the most "
        f"frequent label that of {int(shares.max())}"
    )
    if named == len(labels):
        text += (
            "\nNote: the bias determines every label, so that the adjusted label loss leaves "
            "little to learn: leave out --logit-adjustment"
        )
    return text


def training_batches(
    samples: Samples,
    options: TrainOptions,
    processes: Processes,
    more: Mapping[str, Tensor],
) -> DataLoader[Sample]:
    """Return this process's share of shuffled batches, varied as the options say.

    Parameters
    ----------
    samples, options, processes
        Of the run.
    more
        Further bias targets: what the label loss needs (`label_targets`).

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
    columns = list(samples.bias.values())
    sampler = ShardedBatchSampler(
        len(samples),
        options.batch_size,
        drop_last=len(samples) >= options.batch_size,  # batch norm cannot take a batch of one
        weights=balanced_weights(samples.labels, columns) if options.balance else None,
        processes=processes,
    )
    return DataLoader(
        samples.dataset(transform, more, cache=options.cache, workers=options.workers),
        batch_sampler=sampler,
        num_workers=options.workers,
        generator=sampler.generator,
        pin_memory=torch.cuda.is_available(),
    )
