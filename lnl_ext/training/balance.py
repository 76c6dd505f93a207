"""Groups of samples by label and bias, and what keeps the bias from saying what the label is.

Batches may be drawn with weights under which the groups are as frequent. Or the label loss and the
heads' losses take into account what the bias says. Or part of it is done by drawing, and the rest
by the losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lnl_ext.adversary.reweighting import independence_weights, logit_adjustment
from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.training.target_names import ADJUSTMENT, by_name, head_weight

__all__ = ["Draws", "balanced_weights", "draws", "group_numbers"]

_ROUNDS = 50  # of the fit to several columns, which nears its end by a factor a round


def group_numbers(labels: Tensor, bias: Tensor | Sequence[Tensor]) -> Tensor:
    """Give every group a number: the combinations of label and bias values that occur.

    Parameters
    ----------
    labels
        ``(N,)`` integers.
    bias
        ``(N,)`` integers, or several such columns; -100 where the bias is not known.

    Returns
    -------
    Tensor
        ``(N,)`` int64 from 0, in the order of the label and then of the columns; -100 for samples
        of which a bias is not known.

    Raises
    ------
    TypeError, ValueError
        Not integers, or shapes that do not fit.
    """
    columns = [bias] if isinstance(bias, Tensor) else list(bias)
    if not columns:
        raise ValueError("bias has no column, expected one or more of shape (N,)")
    for name, given in (("labels", labels), *(("bias", column) for column in columns)):
        if given.is_floating_point() or given.is_complex():
            raise TypeError(f"{name} has dtype {given.dtype}, expected integers")
        if given.dim() != 1 or len(given) != len(labels):
            raise ValueError(f"{name} has shape {tuple(given.shape)}, expected ({len(labels)},)")
    values = torch.stack([column.long() for column in (labels, *columns)], 1)
    known = (values[:, 1:] != IGNORE_INDEX).all(1)
    numbers = torch.full((len(labels),), IGNORE_INDEX, device=labels.device)
    if known.any():
        numbers[known] = torch.unique(values[known], dim=0, return_inverse=True)[1]
    return numbers


def balanced_weights(labels: Tensor, bias: Tensor | Sequence[Tensor]) -> Tensor:
    """Weights of the samples under which all groups of label and bias weigh the same.

    With several bias columns the groups of the label and each single column do, so that the label
    says nothing about any of them. The groups of all columns together would often have a few
    samples each, of which batches would then consist. Such weights are found by iterative
    proportional fitting (Deming and Stephan 1940).

    Parameters
    ----------
    labels, bias
        As for `group_numbers`.

    Returns
    -------
    Tensor
        ``(N,)`` float64 with mean 1; of one column inversely proportional to the size of the
        sample's group. A column in which a sample's bias is not known has no influence on its
        weight, which is 1, as without balance, if no column has one.

    Examples
    --------
    >>> weights = balanced_weights(labels, [gender, age])
    >>> sampler = ShardedBatchSampler(len(labels), 64, weights=weights)
    """
    columns = [bias] if isinstance(bias, Tensor) else list(bias)
    group_numbers(labels, columns)  # checks them
    groups = [group_numbers(labels, c) for c in columns if (c != IGNORE_INDEX).any()]
    weights = torch.ones(len(labels), dtype=torch.float64, device=labels.device)
    for _ in range(1 if len(columns) == 1 else _ROUNDS):
        for numbers in groups:
            rows = (numbers != IGNORE_INDEX).nonzero().squeeze(1)
            own = numbers[rows]
            sums = torch.bincount(own, weights[rows])
            weights[rows] *= (sums.mean() / sums)[own]
    return weights / weights.mean()


class Draws(NamedTuple):
    """How samples are drawn, and what the losses need to know of it."""

    weights: Tensor | None
    """(N,) float64: of a sampler; None: every sample as often."""
    targets: dict[str, Tensor]
    """Further bias targets of the samples, which ``TrainerConfig(adjust=True)`` asks for."""


def draws(
    labels: Tensor,
    bias: Mapping[str, Tensor],
    *,
    balance: float = 0.0,
    adjust: bool = False,
    weights: Tensor | None = None,
) -> Draws:
    """Return the weights of the samples in the draws, and the targets of adjusted losses.

    Samples are drawn with `balanced_weights` to the power of ``balance``. With ``adjust`` what the
    bias then still says about the label is added to the logits of the label loss
    (`lnl_ext.logit_adjustment`, of the combinations of all columns; a bias that is not known is a
    value, too), and the head of each column weighs its samples so that label and bias are
    independent (`lnl_ext.independence_weights`).

    Parameters
    ----------
    labels
        ``(N,)`` integers from 0.
    bias
        By name ``(N,)`` integers from 0, or ``(N, K)`` for a head of K predictions; -100 where the
        bias is not known.
    balance
        0: as they come; 1: all groups as frequent.
    adjust
        Whether targets are wanted.
    weights
        ``(N,)``, of the draws, instead of those that ``balance`` says.

    Raises
    ------
    TypeError, ValueError
        `bias` has no names or is not integers, ``balance`` is not from 0 to 1, or shapes that do
        not fit.

    Examples
    --------
    >>> made = draws(labels, {"age": age}, balance=LNL.balance, adjust=True)
    >>> bias = {"age": age, **made.targets}
    >>> batches = TensorBatches(images, labels, bias, batch_size=64, weights=made.weights)
    """
    named = by_name("bias", bias)
    columns = [
        column
        for given in named.values()
        for column in (given.unbind(1) if given.dim() == 2 else [given])
    ]
    if not 0 <= balance <= 1:
        raise ValueError(f"balance is {balance}, expected a number from 0 to 1")
    if weights is None and balance:
        weights = balanced_weights(labels, columns) ** balance
    if not adjust:
        return Draws(weights, {})
    combined = torch.unique(torch.stack(columns, 1), dim=0, return_inverse=True)[1]
    targets = {ADJUSTMENT: logit_adjustment(labels, combined, weights=weights)}
    for name, column in named.items():
        targets[head_weight(name)] = independence_weights(labels, column, weights=weights)
    return Draws(weights, targets)
