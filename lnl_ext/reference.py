"""The losses in plain PyTorch: what the fused kernels are held against.

The functions have the names and signatures of the fused ones. They are also what runs on devices
without a kernel, and what a second derivative is taken of, so they branch on no tensor's data and
wait for no device.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lnl_ext.gradient_reversal import grad_reverse
from lnl_ext.ops.checks import Coefficient, check_bias_loss, check_linear_bias_loss
from lnl_ext.ops.formula import BiasTerms, bias_terms, combine, is_zero
from lnl_ext.ops.types import BiasLoss

__all__ = ["fused_bias_loss", "fused_linear_bias_loss", "grad_reverse"]


@overload
def fused_bias_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    *,
    entropy_weight: Coefficient = ...,
    reversal: Coefficient | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    mask_entropy: bool = ...,
    heads: int = ...,
    return_terms: Literal[False] = ...,
) -> Tensor: ...


@overload
def fused_bias_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    *,
    entropy_weight: Coefficient = ...,
    reversal: Coefficient | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    mask_entropy: bool = ...,
    heads: int = ...,
    return_terms: Literal[True],
) -> BiasLoss: ...


def fused_bias_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    entropy_weight: Coefficient = 0.0,
    reversal: Coefficient | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    mask_entropy: bool = False,
    heads: int = 1,
    return_terms: bool = False,
) -> Tensor | BiasLoss:
    """Compute what `lnl_ext.fused_bias_loss` computes, from PyTorch's own operators.

    Parameters, result and errors are those of `lnl_ext.fused_bias_loss`. One error differs: a class
    index out of range is found by PyTorch, in its words.
    """
    check_bias_loss(
        logits,
        target,
        weight,
        entropy_weight=entropy_weight,
        reversal=reversal,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        heads=heads,
    )
    terms = bias_terms(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        mask_entropy=mask_entropy,
        heads=heads,
        unregularised=is_zero(entropy_weight),
    )
    loss = combine(terms, reversal=reversal, entropy_weight=entropy_weight)
    if return_terms:
        return BiasLoss(loss, terms.cross_entropy.detach(), terms.entropy.detach())
    return loss


@overload
def fused_linear_bias_loss(
    features: Tensor,
    head_weight: Tensor,
    target: Tensor,
    head_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    *,
    entropy_weight: Coefficient = ...,
    reversal: Coefficient | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    mask_entropy: bool = ...,
    heads: int = ...,
    return_terms: Literal[False] = ...,
) -> Tensor: ...


@overload
def fused_linear_bias_loss(
    features: Tensor,
    head_weight: Tensor,
    target: Tensor,
    head_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    *,
    entropy_weight: Coefficient = ...,
    reversal: Coefficient | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    mask_entropy: bool = ...,
    heads: int = ...,
    return_terms: Literal[True],
) -> BiasLoss: ...


def fused_linear_bias_loss(
    features: Tensor,
    head_weight: Tensor,
    target: Tensor,
    head_bias: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    entropy_weight: Coefficient = 0.0,
    reversal: Coefficient | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    mask_entropy: bool = False,
    heads: int = 1,
    return_terms: bool = False,
) -> Tensor | BiasLoss:
    """Compute what `lnl_ext.fused_linear_bias_loss` computes, from PyTorch's own operators.

    Parameters, result and errors are those of `lnl_ext.fused_linear_bias_loss`. The logits exist
    whole, and with `reversal` twice: once for the head's gradient and once for the features'.
    """
    check_linear_bias_loss(
        features,
        head_weight,
        target,
        head_bias,
        weight,
        entropy_weight=entropy_weight,
        reversal=reversal,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        heads=heads,
    )
    loss, terms = linear_loss(
        features,
        head_weight,
        target,
        head_bias,
        weight,
        reversal=reversal,
        entropy_weight=entropy_weight,
        confusion_weight=None,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        mask_entropy=mask_entropy,
        heads=heads,
    )
    if return_terms:
        return BiasLoss(loss, terms.cross_entropy.detach(), terms.entropy.detach())
    return loss


def linear_loss(
    features: Tensor,
    head_weight: Tensor,
    target: Tensor,
    head_bias: Tensor | None,
    weight: Tensor | None,
    *,
    reversal: Coefficient | None,
    entropy_weight: Coefficient | None,
    confusion_weight: Coefficient | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    mask_entropy: bool,
    heads: int,
) -> tuple[Tensor, BiasTerms]:
    """Return the loss of a linear head and its terms.

    Without `reversal` every input gets the loss's gradient. With it head_weight and head_bias get
    dCE, and the features ``-reversal * dCE - entropy_weight * dH`` and the confusion term's.
    """

    def terms_of(x: Tensor, w: Tensor, b: Tensor | None, unregularised: bool | Tensor) -> BiasTerms:
        return bias_terms(
            F.linear(x, w, b),
            target,
            weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            mask_entropy=mask_entropy,
            heads=heads,
            confusion=confusion_weight is not None,
            unregularised=unregularised,
        )

    unregularised = is_zero(entropy_weight) & is_zero(confusion_weight)
    coefficients = {"entropy_weight": entropy_weight, "confusion_weight": confusion_weight}
    if reversal is None:
        terms = terms_of(features, head_weight, head_bias, unregularised)
        return combine(terms, reversal=None, **coefficients), terms
    bias = None if head_bias is None else head_bias.detach()
    terms = terms_of(features, head_weight.detach(), bias, unregularised)
    for_features = combine(terms, reversal=reversal, **coefficients)
    for_head = terms_of(features.detach(), head_weight, head_bias, True).cross_entropy
    loss: Tensor = _WithGradientOf.apply(for_features, for_head)
    return loss, terms


class _WithGradientOf(torch.autograd.Function):
    """The first value, whose gradient both arguments get.

    As a sum with ``other - other.detach()`` an infinite value would become NaN.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, other: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]
