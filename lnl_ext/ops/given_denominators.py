"""Bias losses whose sums are divided by given numbers instead of the batch's own.

Sums per head are needed for that, which the operator does not return: it runs without a reduction,
with the heads side by side in the batch dimension.
"""

from __future__ import annotations

import math

from torch import Tensor

from lnl_ext.ops.formula import BiasTerms
from lnl_ext.ops.types import BiasLoss


def check_denominators(denominators: Tensor, heads: int, reduction: str) -> None:
    """Raise unless `denominators` has shape ``(heads, 2)`` and there is a reduction."""
    if denominators.shape != (heads, 2):
        raise ValueError(
            f"denominators has shape {tuple(denominators.shape)}, expected ({heads}, 2)"
        )
    if reduction == "none":
        raise ValueError('denominators: there is nothing to divide with reduction="none"')


def fold_heads(logits: Tensor, target: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Turn logits ``(N, heads * C, *S)`` into ``(N * heads, C, *S)``, and their target likewise."""
    if heads == 1:
        return logits, target
    samples, channels, *sites = logits.shape
    folded = logits.reshape(samples * heads, channels // heads, *sites)
    if target.is_floating_point():
        return folded, target.reshape(folded.shape)
    return folded, target.reshape(samples * heads, *sites)


def divide_sums(
    loss: Tensor, cross_entropy: Tensor, entropy: Tensor, denominators: Tensor
) -> BiasLoss:
    """Reduce the values per site of `fold_heads` logits, ``(N * heads, *S)``, and sum over heads.

    Everything in the loss that is not CE is divided as H is.
    """
    by_cross_entropy, by_entropy = denominators.unbind(1)
    reduced = divide_by_head(cross_entropy, by_cross_entropy)
    infinite = cross_entropy.isinf()  # inf - inf would be NaN
    others = divide_by_head((loss - cross_entropy).masked_fill(infinite, 0.0), by_entropy)
    return BiasLoss(reduced + others, reduced, divide_by_head(entropy, by_entropy))


def divide_terms(terms: BiasTerms, denominators: Tensor) -> BiasTerms:
    """Do so with the differentiable terms of the plain path."""
    by_cross_entropy, by_entropy = denominators.unbind(1)
    return BiasTerms(
        divide_by_head(terms.cross_entropy, by_cross_entropy),
        divide_by_head(terms.entropy, by_entropy),
        None if terms.confusion is None else divide_by_head(terms.confusion, by_entropy),
    )


def divide_by_head(values: Tensor, by: Tensor) -> Tensor:
    """Sum values per site of `fold_heads` logits by head, divide each by its own, add them up."""
    heads, sites = len(by), math.prod(values.shape[1:])
    sums = values.reshape(len(values) // heads, heads, sites).sum((0, 2))
    return (sums / by.to(sums.dtype)).sum()
