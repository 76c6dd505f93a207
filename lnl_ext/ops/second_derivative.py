"""Products of a vector with the second derivatives of the bias loss, in plain PyTorch.

Double backward is rare, and the formulas are short: with v the vector, p the probabilities and
``v' = v - sum p v`` per site, and g the gradient of ``sum p log p``::

    of CE            W p v'                         W the sum of the weighted target
    of sum p log p   p v' (log p + H) + p (v' - sum g v)
    of CE(uniform)   p v'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lnl_ext.ops.checks import accumulation_dtype
from lnl_ext.ops.loss_arguments import MEAN, NONE, LossArguments


def vector_products(
    vector: Tensor,
    grad_loss: Tensor,
    logits: Tensor,
    arguments: LossArguments,
) -> tuple[Tensor, Tensor]:
    """Return the derivatives of ``(vector * gradient).sum()`` by `grad_loss` and by `logits`.

    Parameters
    ----------
    vector
        What comes back for the gradient, shape ``(N, heads * C, *S)``.
    grad_loss
        The upstream factor of the loss: a scalar, or ``(N, *S)`` without a reduction.
    logits, arguments
        As given to the loss, with its denominators.

    Returns
    -------
    tuple of Tensor
        Of the shape and dtype of `grad_loss` and of `logits`. Differentiable.
    """
    heads = arguments.heads
    dtype = accumulation_dtype(logits.dtype)
    split = (logits.shape[0], heads, logits.shape[1] // heads, *logits.shape[2:])
    per_head = (1, heads, *[1] * (logits.dim() - 1))  # against (N, K, C, *S)
    z = logits.to(dtype).reshape(split)
    v = vector.to(dtype).reshape(split)
    y, counted = _dense_target(arguments, split, dtype)
    if counted is not None:
        # Where no term has a derivative, NaN logits must not make one of 0 * NaN.
        silent = ~counted if arguments.mask_entropy else ~counted & arguments.unregularised
        z = z.masked_fill(silent, 0.0)
    log_p = torch.log_softmax(z, dim=2)
    p = log_p.exp()
    log_p = log_p.masked_fill(log_p == -torch.inf, 0.0)  # p is 0 there, and so is every product
    entropy = -(p * log_p).sum(dim=2, keepdim=True)

    total = y.sum(dim=2, keepdim=True)
    scale = torch.ones(per_head, dtype=dtype, device=logits.device)
    entropy_scale = scale
    if arguments.reduction == MEAN:
        denominators = arguments.denominators
        assert denominators is not None  # those that the loss was divided by
        scale = 1.0 / denominators[:, 0].reshape(per_head)
        entropy_scale = 1.0 / denominators[:, 1].reshape(per_head)
    sign = 1.0 if arguments.reversal is None else -_value(arguments.reversal, z)
    of_cross_entropy = (scale * sign).expand_as(total)
    of_entropy = entropy_scale * _value(arguments.entropy_weight, z)
    of_confusion = entropy_scale * _value(arguments.confusion_weight, z)
    if counted is not None:
        of_cross_entropy = of_cross_entropy.masked_fill(~counted, 0.0)
        if arguments.mask_entropy:
            of_entropy = of_entropy.expand_as(total).masked_fill(~counted, 0.0)
            of_confusion = of_confusion.expand_as(total).masked_fill(~counted, 0.0)

    slope = p * (log_p + entropy)  # the gradient of sum p log p
    gradient = (
        of_cross_entropy * (p * total - y)
        + of_entropy * slope
        + of_confusion * (p - 1.0 / split[2])
    )
    centred = v - (p * v).sum(dim=2, keepdim=True)
    curvature = (of_cross_entropy * total + of_confusion) * p * centred + of_entropy * (
        slope * centred + p * (centred - (slope * v).sum(dim=2, keepdim=True))
    )

    along = (v * gradient).sum(dim=(1, 2))  # (N, *S)
    upstream = grad_loss.to(dtype)
    if arguments.reduction == NONE:
        upstream = upstream.reshape(split[0], 1, 1, *split[3:])
    else:
        along = along.sum()
    along_logits = (upstream * curvature).reshape(logits.shape).to(logits.dtype)
    return along.to(grad_loss.dtype), along_logits


def _value(coefficient: Any, like: Tensor) -> Any:
    return 0.0 if coefficient is None else coefficient.to(like)


def _dense_target(
    arguments: LossArguments, split: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return y, ``(N, K, C, *S)``, and which sites count, ``(N, K, 1, *S)`` (None for all)."""
    target, weight, label_smoothing = arguments.target, arguments.weight, arguments.label_smoothing
    classes = split[2]
    counted: Tensor | None = None
    if target.is_floating_point():
        share = target.to(dtype).reshape(split)
    else:
        index = target.reshape(split[0], split[1], 1, *split[3:])
        counted = index != arguments.ignore_index
        share = torch.zeros(split, dtype=dtype, device=target.device)
        share = share.scatter(2, index.masked_fill(~counted, 0), 1.0)
    y = share * (1.0 - label_smoothing) + label_smoothing / classes
    if weight is not None:
        y = y * weight.to(dtype).reshape(1, 1, -1, *[1] * (len(split) - 3))
    return y, counted


def linear_vector_products(
    vectors: Sequence[Tensor | None],
    grad_loss: Tensor,
    inputs: Sequence[Any],
    arguments: LossArguments,
    logits_gradient: Callable[[Tensor, Tensor, LossArguments], Tensor],
) -> tuple[Tensor | None, ...]:
    """Return the derivatives of a linear head's gradients, multiplied by vectors and added.

    With G the logits' gradient, X the features and W the head's weight, the gradients are ``G W``,
    ``G^T X`` and the column sums of G. So for vectors V, A and a the sum of the products is
    ``(V W^T) . G + (X A^T + a) . G``, and `vector_products` does the rest. With `reversal` the two
    G differ, and the features' sees W, the head's sees X as a constant. The logits exist whole.

    Parameters
    ----------
    vectors
        What comes back for the gradients of features, head weight and head bias, or None.
    grad_loss, inputs, arguments
        As in `vector_products`, for these three inputs.
    logits_gradient
        The differentiable gradient of the loss by the logits, of the arguments of
        `vector_products` after the vector.

    Returns
    -------
    tuple of Tensor
        For grad_loss, features, head_weight and head_bias. Differentiable.
    """
    of_features, of_weight, of_bias = vectors
    features, head_weight, head_bias = inputs
    dtype = accumulation_dtype(features.dtype)
    x, w = features.to(dtype), head_weight.to(dtype)
    logits = x @ w.t() if head_bias is None else torch.addmm(head_bias.to(dtype), x, w.t())

    along = None if of_features is None else of_features.to(dtype) @ w.t()
    along_head: Tensor | None = None
    if of_weight is not None:
        along_head = x @ of_weight.to(dtype).t()
    if of_bias is not None:
        row = of_bias.to(dtype).expand_as(logits)
        along_head = row if along_head is None else along_head + row

    def products(vector: Tensor | None, arguments: LossArguments) -> tuple[Tensor, Tensor]:
        if vector is None:
            return torch.zeros_like(grad_loss), torch.zeros_like(logits)
        return vector_products(vector, grad_loss, logits, arguments)

    if arguments.reversal is None:
        if along is None or along_head is None:
            both = along_head if along is None else along
        else:
            both = along + along_head
        along_loss, curvature = products(both, arguments)
        for_x, for_w, for_b = curvature @ w, curvature.t() @ x, curvature.sum(0)
        gradient = logits_gradient(grad_loss, logits, arguments)
        if of_weight is not None:
            for_x = for_x + gradient @ of_weight.to(dtype)
        if of_features is not None:
            for_w = for_w + gradient.t() @ of_features.to(dtype)
    else:
        first, curvature = products(along, arguments)
        second, head_curvature = products(along_head, arguments.cross_entropy_only())
        along_loss = first + second
        for_x, for_w, for_b = curvature @ w, head_curvature.t() @ x, head_curvature.sum(0)
    return (
        along_loss,
        for_x.to(features.dtype),
        for_w.to(head_weight.dtype),
        None if head_bias is None else for_b.to(head_bias.dtype),
    )
