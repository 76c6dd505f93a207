"""Images of the worst group that are classified wrongly, for the page of a run."""

from __future__ import annotations

import io

from lnl_ext.cli.report import Report
from lnl_ext.cli.samples import Samples
from lnl_ext.data.decoding import load_image

__all__ = ["worst_images"]

_SHOWN = 12
_SIDE = 160  # pixels


def worst_images(
    report: Report, samples: Samples, label: str
) -> tuple[str, list[tuple[str, bytes]]]:
    """Return a heading, and the mistakes in the worst group of all bias columns.

    Parameters
    ----------
    report
        Of the samples.
    samples
        Those, with their images.
    label
        What the label is called.

    Returns
    -------
    str, list of (caption, PNG)
        The surest mistakes first; none without groups.
    """
    if not report.columns:
        return "", []
    column = min(report.columns, key=lambda found: found.groups.worst)
    number, value = column.groups.worst_group
    logits, labels = report.predictions
    sure, predicted = logits.softmax(1).max(1)
    inside = (labels == number) & (samples.bias[column.name] == value)
    wrong = (inside & (predicted != labels)).nonzero().flatten().tolist()
    chosen = sorted(wrong, key=lambda row: -sure[row].item())[:_SHOWN]
    shown = [
        (
            f"{column.labels[int(predicted[row])]}, {sure[row]:.2f}: "
            f"{samples.table.names[samples.rows[row]]}",
            _png(samples, row),
        )
        for row in chosen
    ]
    return (
        f"Mistakes in the worst group ({label} {column.labels[number]}, {column.name} "
        f"{column.classes[value]}): predicted as, probability",
        shown,
    )


def _png(samples: Samples, row: int) -> bytes:
    image = load_image(samples.paths[row])
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
