"""The result type that the losses share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BiasLoss(NamedTuple):
    """A bias loss with the two terms it is made of.

    Every field is a scalar, or has shape ``(N, *S)`` with ``reduction="none"``. The dtype is
    float32, or float64 for float64 logits.
    """

    loss: Tensor
    """The value to call ``backward`` on."""
    cross_entropy: Tensor
    """The cross-entropy of the bias head, detached: for logging."""
    entropy: Tensor
    """The entropy of the bias head's predictions, detached: for logging."""
