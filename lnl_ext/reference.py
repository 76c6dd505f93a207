"""The losses in plain PyTorch: what the fused kernels are held against.

The functions have the names and signatures of the fused ones. They are also what runs on devices
without a kernel, and what a second derivative is taken of, so they branch on no tensor's data and
wait for no device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lnl_ext.gradient_reversal import grad_reverse
from lnl_ext.ops.checks import check_bias_loss, check_linear_bias_loss, loss_arguments
from lnl_ext.ops.formula import bias_terms, combine
from lnl_ext.ops.loss_arguments import Coefficient, LossArguments
from lnl_ext.ops.types import BiasLoss, bias_loss_function, linear_bias_loss_function

__all__ = ["fused_bias_loss", "fused_linear_bias_loss", "grad_reverse"]


@bias_loss_function
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
    arguments = loss_arguments(
        target,
        weight,
        reversal,
        entropy_weight,
        ignore_index,
        label_smoothing,
        reduction,
        mask_entropy,
        heads,
    )
    check_bias_loss(logits, arguments)
    result = bias_loss(logits, arguments)
    return result if return_terms else result.loss


@linear_bias_loss_function
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
    arguments = loss_arguments(
        target,
        weight,
        reversal,
        entropy_weight,
        ignore_index,
        label_smoothing,
        reduction,
        mask_entropy,
        heads,
    )
    check_linear_bias_loss(features, head_weight, head_bias, arguments)
    result = linear_bias_loss(features, head_weight, head_bias, arguments)
    return result if return_terms else result.loss


def bias_loss(logits: Tensor, arguments: LossArguments) -> BiasLoss:
    """Return the loss of checked arguments."""
    terms = bias_terms(logits, arguments)
    loss = combine(terms, arguments)
    return BiasLoss(loss, terms.cross_entropy.detach(), terms.entropy.detach())


def linear_bias_loss(
    features: Tensor, head_weight: Tensor, head_bias: Tensor | None, arguments: LossArguments
) -> BiasLoss:
    """Return the loss of a linear head, of checked arguments.

    Without `reversal` every input gets the loss's gradient. With it head_weight and head_bias get
    dCE, and the features ``-reversal * dCE - entropy_weight * dH`` and the confusion term's.
    """
    if arguments.reversal is None:
        terms = bias_terms(F.linear(features, head_weight, head_bias), arguments)
        loss = combine(terms, arguments)
    else:
        bias = None if head_bias is None else head_bias.detach()
        terms = bias_terms(F.linear(features, head_weight.detach(), bias), arguments)
        logits = F.linear(features.detach(), head_weight, head_bias)
        for_head = bias_terms(logits, arguments.cross_entropy_only()).cross_entropy
        loss = _WithGradientOf.apply(combine(terms, arguments), for_head)
    return BiasLoss(loss, terms.cross_entropy.detach(), terms.entropy.detach())


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
