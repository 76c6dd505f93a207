"""What a run leaves in its folder, and how a model comes back from there."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import types
import typing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lnl_ext.cli.samples import Samples
from lnl_ext.data.association import Association
from lnl_ext.data.images import IMAGENET_MEAN, IMAGENET_STD
from lnl_ext.errors import UserError
from lnl_ext.files import write_whole
from lnl_ext.models.backbones import build_network
from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.reporting import PAGE
from lnl_ext.training.trainer import CHECKPOINT

__all__ = ["BEST", "CONFIG", "MODEL", "ModelCard", "check_output", "split_text"]

CONFIG = "config.toml"
MODEL = "model.pt"
BEST = "best.pt"
CARD = "model.json"
REPORT = "report.json"
SPLIT = "split.csv"
IMAGE_COLUMN, LABEL_COLUMN, PART_COLUMN = "path", "label", "part"


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What is needed to use ``model.pt``: the contents of ``model.json``."""

    arch: str
    """``lnl_ext.models.backbones.build_network(arch, len(classes))`` takes the weights; so does
    ``torchvision.models.get_model(arch, num_classes=len(classes))`` of torchvision's."""
    classes: list[str]
    """Labels in the order of the outputs."""
    image_size: int
    feature_layer: str
    grey: bool
    """Whether the model was trained on grey images and takes them."""
    image_column: str
    label_column: str | None
    bias_columns: list[str]
    """As given, with bins."""
    bias_classes: dict[str, list[str]]
    mean: list[float] = dataclasses.field(default_factory=lambda: list(IMAGENET_MEAN))
    """Of red, green and blue: an input is (value in [0, 1] - mean) / std."""
    std: list[float] = dataclasses.field(default_factory=lambda: list(IMAGENET_STD))
    keep: str = dataclasses.field(default_factory=lambda: "last")
    """Which weights ``model.pt`` has: those of the best epoch for ``"best"``, else of the last."""

    def network(self) -> nn.Module:
        """Make the network, with new weights."""
        return build_network(self.arch, len(self.classes))

    def save(self, folder: Path) -> None:
        """Write it."""
        text = json.dumps(dataclasses.asdict(self), indent=2)
        write_whole(folder / CARD, text + "\n")

    @classmethod
    def load(cls, folder: Path) -> ModelCard:
        """Read it.

        Raises
        ------
        UserError
            The folder has none, or another file of this name.
        """
        try:
            values = json.loads((folder / CARD).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder} is not a run folder: it has no {CARD}") from None
        except ValueError as error:
            raise UserError(f"{folder / CARD} is damaged: {error}") from None
        wrong = cls._wrong(values)
        if wrong:
            raise UserError(f"{folder / CARD} is damaged: {wrong}")
        return cls(**values)

    @classmethod
    def _wrong(cls, values: Any) -> str:
        """Say what keeps ``values`` from being a card; nothing where they are one."""
        if not isinstance(values, dict):
            return "expected names and values"
        hints = typing.get_type_hints(cls)
        fields = dataclasses.fields(cls)
        missing = dataclasses.MISSING
        needed = [f.name for f in fields if f.default is missing and f.default_factory is missing]
        for what, names in (
            ("it lacks", [name for name in needed if name not in values]),
            ("it has unknown", [name for name in values if name not in hints]),
            (
                "of another type is",
                [n for n, v in values.items() if n in hints and not _is(v, hints[n])],
            ),
        ):
            if names:
                return f"{what} {', '.join(names)}"
        return ""


def _is(value: Any, hint: Any) -> bool:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return isinstance(value, tuple(typing.get_origin(kind) or kind for kind in kinds))


def run_files(folder: Path) -> list[Path]:
    """Return the files of a run, there or not."""
    return [folder / name for name in (CONFIG, CARD, SPLIT, MODEL, BEST, REPORT, PAGE, CHECKPOINT)]


def weights_of(folder: Path, card: ModelCard, use: str) -> Path:
    """Return the file of the weights that ``--use`` names.

    Raises
    ------
    UserError
        The run did not keep them.
    """
    if use == "model" or card.keep == "best":
        return folder / MODEL
    if not (folder / BEST).exists():
        raise UserError(f"{folder} has no {BEST}: it was trained with --keep {card.keep}")
    return folder / BEST


def check_output(folder: Path, *, resume: bool) -> bool:
    """Refuse a folder whose files a run would overwrite; return whether it has a checkpoint.

    Raises
    ------
    UserError
        It holds a run and ``resume`` is not given, or other files of such names.
    """
    there = {path.name for path in run_files(folder) if path.exists()}
    if CHECKPOINT in there:
        if not resume:
            raise UserError(
                f"{folder} holds a run: --resume continues it, or give another --output"
            )
        return True
    # What a run writes before its first checkpoint, in this order: the weights of the first epoch
    # are the best so far.
    begun = there <= {CARD, SPLIT} or there - {BEST} == {CARD, SPLIT, CONFIG}
    if there and not (resume and begun):
        raise UserError(
            f"{folder} holds {', '.join(sorted(there))} and no checkpoint: give another --output"
            + (", or --resume if this is a run that ended early" if begun else "")
        )
    return False


def split_text(samples: Samples, parts: list[str]) -> str:
    """Return the samples of a run as a CSV file: image, part, label and bias classes."""
    table = samples.table
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([IMAGE_COLUMN, PART_COLUMN, LABEL_COLUMN, *(f"bias:{n}" for n in table.bias)])
    assert table.labels is not None
    for row, part in zip(samples.rows, parts, strict=True):
        bias = ["" if values[row] is None else values[row] for values in table.bias.values()]
        writer.writerow([str(table.paths[row]), part, table.labels[row], *bias])
    return buffer.getvalue()


def trained_on(folder: Path) -> set[Path]:
    """Return the paths of the images that a run was trained on.

    Raises
    ------
    UserError
        The folder has no list of them.
    """
    return {Path(row[IMAGE_COLUMN]) for row in _training_rows(folder, [IMAGE_COLUMN])}


def training_associations(folder: Path, card: ModelCard) -> dict[str, Association]:
    """Return how labels and each bias column went together in the training of a run.

    Raises
    ------
    UserError
        The folder does not say it.
    """
    columns = {name: f"bias:{name}" for name in card.bias_classes}
    rows = _training_rows(folder, [LABEL_COLUMN, *columns.values()])

    def numbers(column: str, names: list[str]) -> Tensor:
        number = {name: at for at, name in enumerate(names)} | {"": IGNORE_INDEX}
        try:
            return torch.tensor([number[row[column]] for row in rows], dtype=torch.long)
        except KeyError as error:
            raise UserError(
                f"{folder / SPLIT} is damaged: column {column!r} has {error}, which {CARD} lacks"
            ) from None

    labels = numbers(LABEL_COLUMN, card.classes)
    return {
        name: Association.of(labels, numbers(columns[name], names), (len(card.classes), len(names)))
        for name, names in card.bias_classes.items()
    }


def _training_rows(folder: Path, columns: list[str]) -> list[dict[str, str]]:
    try:
        with (folder / SPLIT).open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run folder: it has no {SPLIT}") from None
    for name in (PART_COLUMN, *columns):
        if rows and name not in rows[0]:
            raise UserError(f"{folder / SPLIT} is damaged: it has no column {name!r}")
    return [row for row in rows if row[PART_COLUMN] == "train"]
