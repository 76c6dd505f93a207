"""The terms of a bias loss in plain PyTorch: the one place where the formula is written out.

`lnl_ext.reference` makes the losses of them. They branch on no tensor's data and wait for no
device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lnl_ext.ops.checks import accumulation_dtype
from lnl_ext.ops.loss_arguments import NONE, SUM, LossArguments
from lnl_ext.ops.scale_gradient import scale_gradient


class BiasTerms(NamedTuple):
    """The reduced terms of a bias loss, differentiable.

    Scalars, or ``(N, *S)`` with ``reduction="none"``.
    """

    cross_entropy: Tensor
    entropy: Tensor
    confusion: Tensor | None


def combine(terms: BiasTerms, arguments: LossArguments) -> Tensor:
    """Return ``CE - entropy_weight * H + confusion_weight * CE(uniform, p)``, CE reversed.

    With `reversal` CE keeps its value and its derivatives are multiplied by ``-reversal``: those of
    ``-reversal * CE + (1 + reversal) * CE.detach()``. A term of weight None or 0 is left out.
    """
    loss = terms.cross_entropy
    if arguments.reversal is not None:
        # On the value and not on the logits: there the second derivative would be scaled twice. As
        # a product with a detached copy, CE = inf would become NaN.
        loss = scale_gradient(loss, -arguments.reversal.to(loss.dtype))
    loss = _with_term(loss, arguments.entropy_weight, -terms.entropy)
    if terms.confusion is not None:
        loss = _with_term(loss, arguments.confusion_weight, terms.confusion)
    return loss


def _with_term(loss: Tensor, coefficient: Tensor | None, term: Tensor) -> Tensor:
    """Add a term, but not with a coefficient of 0: that of an ignored site may be NaN."""
    if coefficient is None:
        return loss
    added = loss + coefficient.to(loss.dtype) * term
    zero = (coefficient == 0).to(loss.device, non_blocking=True)
    return torch.where(zero, loss, added)


def bias_terms(logits: Tensor, arguments: LossArguments) -> BiasTerms:
    """Compute CE, H and, with a `confusion_weight`, ``CE(uniform, p)``: reduced, summed over heads.

    The confusion term is counted over the sites of the entropy. Where neither H nor this term has a
    weight, sites whose target is ignored get a gradient of 0 also if their logits are NaN or
    infinite.

    Notes
    -----
    Per site, with m the maximum, a the place of one maximum, d = z - m, and sums over c != a::

        t = sum e^d      u = sum e^d d      CE = log1p(t) - d_b      H = log1p(t) - u / (1 + t)

    Leaving the maximum out keeps CE, H and their gradients exact where one class is nearly certain.
    """
    accumulate = accumulation_dtype(logits.dtype)
    z = _split_heads(logits.to(accumulate), arguments.heads)  # (N, K, C, *S)
    valid: Tensor | None = None
    target = arguments.target
    if not target.is_floating_point():
        index = target if arguments.heads > 1 else target.unsqueeze(1)  # (N, K, *S)
        valid = index != arguments.ignore_index
        # 0 * NaN is what the gradient would be where no term has one.
        silent = ~valid if arguments.mask_entropy else ~valid & arguments.unregularised
        z = torch.where(silent.unsqueeze(2), z.detach(), z)

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

    cross_entropy, counted = _cross_entropy_sites(d, log_sum, valid, arguments)
    entropy = log_sum - u / (1.0 + t)
    uniform = None if arguments.confusion_weight is None else log_sum - d.mean(dim=2)

    sites: Tensor | None = None
    if arguments.mask_entropy and valid is not None:
        sites = valid.to(accumulate)
        entropy = entropy.masked_fill(~valid, 0.0)
        if uniform is not None:
            uniform = uniform.masked_fill(~valid, 0.0)
    return BiasTerms(
        _reduce(cross_entropy, counted, arguments, 0),
        _reduce(entropy, sites, arguments, 1),
        None if uniform is None else _reduce(uniform, sites, arguments, 1),
    )


def _cross_entropy_sites(
    d: Tensor, log_sum: Tensor, valid: Tensor | None, arguments: LossArguments
) -> tuple[Tensor, Tensor | None]:
    """Return CE per site, and what each site counts in the mean.

    `valid`, the sites that are not ignored, is None for probabilities, and each counts 1 there.
    """
    classes = d.shape[2]
    target, label_smoothing = arguments.target, arguments.label_smoothing
    weight = None if arguments.weight is None else arguments.weight.to(d.dtype)
    if valid is None:
        y = target.to(d.dtype).reshape(d.shape)
        if label_smoothing:
            y = (1.0 - label_smoothing) * y + label_smoothing / classes
        return (_times_classes(y, weight) * (log_sum.unsqueeze(2) - d)).sum(dim=2), None

    index = target.reshape(valid.shape).masked_fill(~valid, 0).unsqueeze(2)
    counted = valid.to(d.dtype)
    cross_entropy = log_sum - d.gather(2, index).squeeze(2)
    if weight is not None:
        target_weight = weight[index.squeeze(2)]
        cross_entropy = cross_entropy * target_weight
        counted = counted * target_weight
    if label_smoothing:
        smooth = _times_classes(log_sum.unsqueeze(2) - d, weight).sum(dim=2)
        cross_entropy = (1.0 - label_smoothing) * cross_entropy + label_smoothing / classes * smooth
    return cross_entropy.masked_fill(~valid, 0.0), counted


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """View ``(N, K * C, *S)`` as ``(N, K, C, *S)``."""
    return x.reshape(x.shape[0], heads, x.shape[1] // heads, *x.shape[2:])


def _times_classes(values: Tensor, weight: Tensor | None) -> Tensor:
    """Multiply ``(N, K, C, *S)`` by the class weights ``(C,)``."""
    if weight is None:
        return values
    return values * weight.reshape(-1, *(1,) * (values.dim() - 3))


def _reduce(
    values: Tensor, counted: Tensor | None, arguments: LossArguments, column: int
) -> Tensor:
    """Reduce each head of ``(N, K, *S)`` on its own and sum over heads.

    `counted` is what each site counts in the mean, None for 1; `column` that of the denominators.
    """
    if arguments.reduction == NONE:
        return values.sum(dim=1)
    if arguments.reduction == SUM:
        return values.sum()
    dims = [i for i in range(values.dim()) if i != 1]
    total = values.sum(dim=dims)
    if arguments.denominators is not None:
        return (total / arguments.denominators[:, column].to(total)).sum()
    if counted is None:
        return (total / (values.numel() // values.shape[1])).sum()
    return (total / counted.sum(dim=dims)).sum()
