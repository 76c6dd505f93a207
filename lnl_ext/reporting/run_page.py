"""The page of a run: what it found, how it went, and all that it was made with."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lnl_ext.reporting.environment import environment
from lnl_ext.reporting.figures import confusion_figure, history_figure
from lnl_ext.reporting.page import Page
from lnl_ext.reporting.tables import Table
from lnl_ext.training.trainer import Trainer

__all__ = ["PAGE", "Confusion", "Leak", "RunSummary", "trainer_settings", "write_run_page"]

PAGE = "report.html"
"""Name of the page in a run's output folder."""

_CURVE = 3  # points that make a curve
_MATRIX = 30  # classes up to which a confusion matrix can be read
_MISTAKES = 20


@dataclasses.dataclass(frozen=True)
class Leak:
    """What a fresh probe on frozen features finds of a bias, and what it is to be compared with."""

    bias: str
    accuracy: float
    """Of the probe, after the training."""
    majority: float
    """Of always naming the most frequent bias."""
    before: float | None = None
    """Of the probe, before the bias was unlearned."""
    label_only: float | None = None
    """Of naming the most frequent bias of the sample's label."""
    information: float | None = None
    """In nats."""
    information_interval: tuple[float, float] | None = None
    """95 % of them."""
    samples: int | None = None


@dataclasses.dataclass(frozen=True)
class Confusion:
    """What the samples of a class are taken for."""

    title: str
    rows: Tensor
    """(N,) int64: the class of the row; negative: left out."""
    predicted: Tensor
    """(N,) int64."""
    classes: Sequence[str]
    row_name: str = "label"
    colors: Sequence[Sequence[float]] | None = None
    """Of the classes: red, green and blue in 0 to 1."""


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """Everything that the page of a run shows.

    Attributes
    ----------
    title
        Heading.
    about
        Paragraphs below it.
    results
        The most important numbers.
    command
        The command line.
    configuration
        Every setting, names and values, which may be nested.
    histories
        The records of training by stage, as `Trainer.fit` returns them.
    data
        What the training data are, by heading: labels and bias.
    groups
        Accuracy in groups, by heading.
    leaks
        What probes found.
    leakage_note
        What kind of probe it is and what it learned from.
    confusions
        Predictions, compared with the labels or with a bias.
    pictures
        Small images, PNG, and what to say about each; and the heading above them.
    environment
        Further facts beside `lnl_ext.reporting.environment`.
    """

    title: str
    about: Sequence[str]
    results: Table
    command: str
    configuration: Mapping[str, Any]
    histories: Mapping[str, Sequence[Mapping[str, Any]]]
    data: Mapping[str, Table] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, Table] = dataclasses.field(default_factory=dict)
    leaks: Sequence[Leak] = ()
    leakage_note: str = ""
    confusions: Sequence[Confusion] = ()
    pictures: tuple[str, Sequence[tuple[str, bytes]]] = ("", ())
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def write_run_page(path: str | os.PathLike[str], summary: RunSummary) -> str | None:
    """Write the page of a run.

    The run is over and its results are in other files, so that a missing page, or one without
    figures, is reported and does not raise.

    Parameters
    ----------
    path
        The file; it holds all of the page or what it held before.
    summary
        What the page is to show.

    Returns
    -------
    str or None
        A line that says why there is no page or why it has no figures; None where all is well.
    """
    path = Path(path)
    try:
        page, told = _page(summary)
        page.write(path)
    except OSError as error:
        return f"{path} was not written: {error.strerror or error}"
    except ImportError as error:  # of jinja2
        return f"{path} was not written: {error}; it needs: pip install 'lnl_ext[train]'"
    return f"{path}: {told}" if told else None


def trainer_settings(trainer: Trainer) -> dict[str, Any]:
    """Return the configuration of a trainer and of its adversaries, for the page."""
    heads = {
        name: f"{type(adversary.head).__name__}; {adversary.extra_repr()}"
        for name, adversary in trainer.adversaries.items()
    }
    settings = {**trainer.config.to_dict(), "bias heads": heads}
    if trainer.logit_adjustment is not None:
        settings["logit adjustment"] = trainer.logit_adjustment
    return settings


def _page(summary: RunSummary) -> tuple[Page, str]:
    """Return the page and what it lacks."""
    page = Page(summary.title)
    for paragraph in summary.about:
        page.text(paragraph)
    page.heading("Results")
    _table(page, summary.results)
    for heading, table in [*summary.data.items(), *summary.groups.items()]:
        page.heading(heading)
        _table(page, table)
    if summary.leaks:
        page.heading("Leakage: how well a fresh probe predicts the bias")
        _table(page, _leakage(summary.leaks, summary.leakage_note))
    lacks = ""
    try:
        with plain_style():
            _curves(page, summary)
            _confusions(page, summary.confusions, drawn=True)
    except ImportError as error:
        lacks = f"no figures: {error}; they need: pip install 'lnl_ext[train]'"
        page.heading("Figures").text(f"There are {lacks}")
        _confusions(page, summary.confusions, drawn=False)
    heading, pictures = summary.pictures
    if pictures:
        page.heading(heading).pictures(pictures)
    page.heading("Command").code(summary.command)
    page.heading("Configuration").mapping(summary.configuration)
    now = datetime.datetime.now(datetime.timezone.utc)
    made = {"page written": f"{now:%Y-%m-%d %H:%M} UTC"}
    page.heading("Environment").mapping({**environment(), **summary.environment, **made})
    return page, lacks


def _table(page: Page, table: Table) -> None:
    page.table(table.header, table.rows)
    if table.note:
        page.note(table.note)


def _leakage(leaks: Sequence[Leak], note: str) -> Table:
    columns: dict[str, list[Any]] = {
        "bias": [leak.bias for leak in leaks],
        "before": [leak.before for leak in leaks],
        "after": [leak.accuracy for leak in leaks],
        "label alone": [leak.label_only for leak in leaks],
        "majority": [leak.majority for leak in leaks],
        "information (nats)": [leak.information for leak in leaks],
        "95 %": [
            None if interval is None else "{:.3f} to {:.3f}".format(*interval)
            for interval in (leak.information_interval for leak in leaks)
        ],
        "samples": [leak.samples for leak in leaks],
    }
    measured = {
        name: values for name, values in columns.items() if any(v is not None for v in values)
    }
    return Table(tuple(measured), list(zip(*measured.values(), strict=True)), note)


# ------------------------------------------------------------------ figures


@contextmanager
def plain_style() -> Iterator[None]:
    """Draw in matplotlib's own style, whatever the user's is, and names as they are.

    Raises
    ------
    ImportError
        There is no matplotlib.
    """
    from matplotlib import style

    with style.context(["default", {"text.parse_math": False}]):
        yield


def _curves(page: Page, summary: RunSummary) -> None:
    panels = _panels([record for records in summary.histories.values() for record in records])
    if not panels:
        return
    drawn = {
        title: history_figure(summary.histories, {title: fields})
        for title, fields in panels.items()
    }
    page.heading("Training").gallery(
        drawn,
        "label_accuracy is the mean over the training batches of an epoch, the other accuracies "
        "are those at its end. Losses are those of single steps, where such were recorded, or "
        "means over epochs.",
    )


def _panels(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the fields to draw by title: those that have enough points for a curve."""
    points = Counter(
        name for record in records for name, value in record.items() if value is not None
    )
    names = [name for name, count in points.items() if count >= _CURVE]
    cross_entropy = [name for name in names if name.endswith("_cross_entropy")]
    panels = {
        "label loss": [name for name in names if name == "label_loss"],
        "accuracy": [name for name in names if name.endswith("_accuracy")],
        "cross-entropy of the bias heads": cross_entropy,
        "entropy of the bias heads' predictions": [
            name for name in names if name.endswith("_entropy") and name not in cross_entropy
        ],
    }
    return {title: fields for title, fields in panels.items() if fields}


def _confusions(page: Page, confusions: Sequence[Confusion], *, drawn: bool) -> None:
    if not confusions:
        return
    page.heading("Confusion")
    figures, unknown = {}, {}
    for confusion in confusions:
        if not drawn or len(confusion.classes) > _MATRIX:
            page.text(f"{confusion.title}: the most frequent mistakes.")
            _table(page, _mistakes(confusion))
            continue
        names = confusion.classes
        if not _drawable("".join(names)):
            unknown = dict(enumerate(names))
            names = [str(number) for number in unknown]
        figures[confusion.title] = confusion_figure(
            {confusion.title: (confusion.rows, confusion.predicted)},
            classes=len(names),
            colors=confusion.colors,
            row_name=confusion.row_name,
            names=names,
        )
    if figures:
        numbers = ", ".join(f"{number}: {name}" for number, name in unknown.items())
        page.gallery(
            figures,
            "Shares of each row." + (f" The classes: {numbers}." if numbers else ""),
        )


def _drawable(text: str) -> bool:
    """Say whether the font of the figures has all letters."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    return all(ord(letter) in known for letter in text)


def _mistakes(confusion: Confusion) -> Table:
    size = len(confusion.classes)
    known = confusion.rows >= 0
    rows, predicted = confusion.rows[known], confusion.predicted[known]
    counts = torch.bincount(rows * size + predicted, minlength=size**2).view(size, size)
    totals = counts.sum(1).tolist()
    counts.fill_diagonal_(0)
    most = counts.flatten().topk(min(_MISTAKES, size**2))
    found = []
    for count, place in zip(most.values.tolist(), most.indices.tolist(), strict=True):
        row, column = divmod(place, size)
        if count:
            names = (confusion.classes[row], confusion.classes[column])
            found.append((*names, count, count / totals[row]))
    return Table((confusion.row_name, "predicted", "samples", "share of the row"), found)
