"""Accuracy of a classifier by label and bias."""

from __future__ import annotations

import torch
from torch import Tensor

from lnl_ext.measuring.report import GroupAudit


def group_audit(
    predicted: Tensor, labels: Tensor, bias: Tensor, aligned: Tensor | None
) -> GroupAudit:
    """Count right predictions in every group of one label and one bias class.

    Parameters
    ----------
    predicted, labels, bias
        Shape (N,) int64; a negative bias is unknown, and the sample in no group.
    aligned
        Shape (N,) bool: the samples whose bias is what a classifier that relies on it expects;
        None where nobody said.
    """
    right = predicted == labels
    known = bias >= 0
    cells = {}
    for label, group in torch.unique(torch.stack([labels, bias], 1)[known], dim=0).tolist():
        inside = right[known & (labels == label) & (bias == group)]
        cells[label, group] = (inside.double().mean().item(), len(inside))

    def mean(rows: Tensor) -> float | None:
        return right[rows].double().mean().item() if rows.any() else None

    return GroupAudit(
        accuracy={group: cell[0] for group, cell in cells.items()},
        samples={group: cell[1] for group, cell in cells.items()},
        aligned=None if aligned is None else mean(aligned & known),
        conflicting=None if aligned is None else mean(~aligned & known),
    )
