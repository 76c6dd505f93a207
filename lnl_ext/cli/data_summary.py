"""What the training images are, said before the training: how labels and bias go together."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from lnl_ext.cli.options import TrainOptions
from lnl_ext.cli.run_data import RunData
from lnl_ext.cli.samples import Samples
from lnl_ext.data.association import Association
from lnl_ext.data.csv_rows import columns_of_parts
from lnl_ext.reporting.tables import Table, align

__all__ = ["associations", "contingency", "hint", "summarize"]

_WIDE = 8  # labels up to which there is a column for each


def associations(
    samples: Samples, labels: Sequence[str], bias: Mapping[str, Sequence[str]]
) -> dict[str, Association]:
    """Return how labels and every bias column go together in samples."""
    return {
        name: Association.of(samples.labels, samples.bias[name], (len(labels), len(classes)))
        for name, classes in bias.items()
    }


def contingency(
    found: Association, name: str, classes: Sequence[str], labels: Sequence[str], label: str
) -> Table:
    """Return the table of labels and a bias, a row per bias class, for a page."""
    rows = [
        [name_of, *column, sum(column)]
        for name_of, column in zip(classes, found.counts.T.tolist(), strict=True)
    ]
    missing = f"; {name} missing: {found.missing}" if found.missing else ""
    return Table([name, *labels, "all"], rows, note=found.text(label, name) + missing)


def summarize(data: RunData, options: TrainOptions) -> str:
    """Return the table of labels and each bias column of the training images, as text.

    Warns where no image tells label and bias apart.
    """
    label = options.label_column or "folder"
    found = associations(data.train, data.labels, data.bias)
    lines = []
    for name, classes in data.bias.items():
        table = contingency(found[name], name, classes, data.labels, label)
        lines += ["", f"Training images by {label} and {name}: {table.note}"]
        if len(data.labels) <= _WIDE:
            cells = [[str(cell) for cell in row] for row in table.rows]
            lines += align([[*table.header], *cells])
        if found[name].aligned and not found[name].exceptions:
            warnings.warn(
                f"all training images are aligned: none tells {label} and {name} apart, so that no "
                f"method can learn one without the other; add images of other groups of {label} "
                f"and {name}",
                stacklevel=2,
            )
    return "\n".join(lines)


def hint(options: TrainOptions) -> str:
    """Point to a column that says which part an image belongs to and is not used."""
    if options.csv is None or options.split_column is not None:
        return ""
    used = [options.image_column, options.label_column]
    names = [name for name in columns_of_parts(options.csv) if name not in used]
    if not names:
        return ""
    which = ", ".join(map(repr, names))
    return (
        f"Note: column {which} of {options.csv} says train, validation or test and is not used: "
        f"--split-column {names[0]} keeps to it"
    )
