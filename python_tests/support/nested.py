"""Nested tensors of both layouts, which no loss takes."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def nested(rows: Tensor, layout: torch.layout) -> Tensor:
    """Return the rows as a nested tensor of two sequences of different length."""
    with warnings.catch_warnings():  # torch's own: a prototype
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([rows[:1], rows[1:]], layout=layout)
