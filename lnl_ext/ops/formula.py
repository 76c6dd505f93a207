"""The terms of a bias loss in plain PyTorch: the one place where the formula is written out.

`lnl_ext.reference` makes the losses of them. They branch on no tensor's data and wait for no
device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lnl_ext.gradient_reversal import scale_gradient
from lnl_ext.ops.checks import Coefficient, accumulation_dtype


class BiasTerms(NamedTuple):
    """The reduced terms of a bias loss, differentiable.

    Scalars, or ``(N, *S)`` with ``reduction="none"``.
    """

    cross_entropy: Tensor
    entropy: Tensor
    confusion: Tensor | None


def combine(
    terms: BiasTerms,
    *,
    reversal: Coefficient | None,
    entropy_weight: Coefficient | None,
    confusion_weight: Coefficient | None = None,
) -> Tensor:
    """Return ``CE - entropy_weight * H + confusion_weight * CE(uniform, p)``, CE reversed.

    Parameters
    ----------
    terms
        The result of `bias_terms`.
    reversal
        None for the true gradient. Otherwise CE keeps its value and its derivatives are multiplied
        by ``-reversal``: those of ``-reversal * CE + (1 + reversal) * CE.detach()``.
    entropy_weight, confusion_weight
        None or the number 0 leaves the term out.
    """
    loss = terms.cross_entropy
    if reversal is not None:
        # On the value and not on the logits: there the second derivative would be scaled twice. As
        # a product with a detached copy, CE = inf would become NaN.
        loss = scale_gradient(loss, -_like(reversal, loss))
    if not _absent(entropy_weight):
        loss = loss - _like(entropy_weight, loss) * terms.entropy
    if terms.confusion is not None and not _absent(confusion_weight):
        loss = loss + _like(confusion_weight, loss) * terms.confusion
    return loss


def bias_terms(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    mask_entropy: bool,
    heads: int,
    confusion: bool = False,
) -> BiasTerms:
    """Compute CE, H and, if asked for, ``CE(uniform, p)``: reduced, and summed over heads.

    Parameters
    ----------
    logits
        Shape ``(N, heads * C, *S)``.
    target
        Class indices ``(N, *S)`` or ``(N, heads, *S)``, or probabilities of the logits' shape.
    weight
        Class weights ``(C,)`` or None.
    confusion
        Whether to compute the confusion term; it is counted over the sites of the entropy.

    Notes
    -----
    Per site, with m the maximum, a the place of one maximum, d = z - m, and sums over c != a::

        t = sum e^d      u = sum e^d d      CE = log1p(t) - d_b      H = log1p(t) - u / (1 + t)

    Leaving the maximum out keeps CE, H and their gradients exact where one class is nearly certain.
    """
    accumulate = accumulation_dtype(logits.dtype)
    z = _split_heads(logits.to(accumulate), heads)  # (N, K, C, *S)
    if weight is not None:
        weight = weight.to(accumulate)

    top, place = z.max(dim=2, keepdim=True)
    # The maximum's own d is the constant 0 (NaN where an infinite or NaN maximum leaves no
    # probabilities): as z - top, its gradients of +1 and -1 would swamp the small one that is left.
    zero = (top - top).detach()
    d = (z - top).scatter(2, place, zero)
    rest = torch.exp(d).scatter(2, place, 0.0)
    # The second term makes the gradient NaN, too, where the value is.
    t = rest.sum(dim=2) + (top * zero).squeeze(2)
    u = (rest * d.masked_fill(d == -torch.inf, 0.0)).sum(dim=2)
    log_sum = torch.log1p(t)  # (N, K, *S)

    cross_entropy, valid, counted = _cross_entropy_sites(
        d, log_sum, target, weight, ignore_index, label_smoothing, heads
    )
    entropy = log_sum - u / (1.0 + t)
    uniform = log_sum - d.mean(dim=2) if confusion else None

    sites: Tensor | None = None
    if mask_entropy and valid is not None:
        sites = valid.to(accumulate)
        entropy = entropy.masked_fill(~valid, 0.0)
        if uniform is not None:
            uniform = uniform.masked_fill(~valid, 0.0)
    return BiasTerms(
        _reduce(cross_entropy, counted, reduction),
        _reduce(entropy, sites, reduction),
        None if uniform is None else _reduce(uniform, sites, reduction),
    )


def _cross_entropy_sites(
    d: Tensor,
    log_sum: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    heads: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return CE per site, the sites that are not ignored, and what each counts in the mean.

    The last two are None for probabilities: no site is ignored, and each counts 1.
    """
    classes = d.shape[2]
    if target.is_floating_point():
        y = _split_heads(target.to(d.dtype), heads)
        if label_smoothing:
            y = (1.0 - label_smoothing) * y + label_smoothing / classes
        return (_times_classes(y, weight) * (log_sum.unsqueeze(2) - d)).sum(dim=2), None, None

    index = target if heads > 1 else target.unsqueeze(1)  # (N, K, *S)
    valid = index != ignore_index
    index = index.masked_fill(~valid, 0).unsqueeze(2)
    counted = valid.to(d.dtype)
    cross_entropy = log_sum - d.gather(2, index).squeeze(2)
    if weight is not None:
        target_weight = weight[index.squeeze(2)]
        cross_entropy = cross_entropy * target_weight
        counted = counted * target_weight
    if label_smoothing:
        smooth = _times_classes(log_sum.unsqueeze(2) - d, weight).sum(dim=2)
        cross_entropy = (1.0 - label_smoothing) * cross_entropy + label_smoothing / classes * smooth
    return cross_entropy.masked_fill(~valid, 0.0), valid, counted


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """View ``(N, K * C, *S)`` as ``(N, K, C, *S)``."""
    return x.reshape(x.shape[0], heads, x.shape[1] // heads, *x.shape[2:])


def _times_classes(values: Tensor, weight: Tensor | None) -> Tensor:
    """Multiply ``(N, K, C, *S)`` by the class weights ``(C,)``."""
    if weight is None:
        return values
    return values * weight.reshape(-1, *(1,) * (values.dim() - 3))


def _reduce(values: Tensor, counted: Tensor | None, reduction: str) -> Tensor:
    """Reduce each head of ``(N, K, *S)`` on its own and sum over heads.

    `counted` is what each site counts in the mean, None for 1.
    """
    if reduction == "none":
        return values.sum(dim=1)
    if reduction == "sum":
        return values.sum()
    dims = [i for i in range(values.dim()) if i != 1]
    total = values.sum(dim=dims)
    if counted is None:
        return (total / (values.numel() // values.shape[1])).sum()
    return (total / counted.sum(dim=dims)).sum()


def _absent(coefficient: Coefficient | None) -> bool:
    return coefficient is None or (not isinstance(coefficient, Tensor) and coefficient == 0)


def _like(coefficient: Coefficient | None, value: Tensor) -> Coefficient:
    """Return the coefficient so that a product with `value` keeps its dtype."""
    assert coefficient is not None
    return coefficient.to(value.dtype) if isinstance(coefficient, Tensor) else coefficient
