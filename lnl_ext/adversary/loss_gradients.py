"""The values of a loss and both gradients of what it is computed from: logits or a linear layer.

All of it from the operators, or in plain PyTorch on devices that have none. Nothing here knows
autograd's graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lnl_ext.ops import bias_loss as ops
from lnl_ext.ops.arguments import NONE, LossArguments
from lnl_ext.ops.formula import BiasTerms, bias_terms, combine
from lnl_ext.ops.given_denominators import divide_sums, divide_terms, fold_heads
from lnl_ext.ops.linear_bias_loss import linear_bias_loss


class Operands(NamedTuple):
    """What the logits are, or what they are made of."""

    first: Tensor
    """Logits ``(N, heads * C, *S)``; or the inputs of the layer, ``(N, D)``."""
    weight: Tensor | None = None
    """Of the layer, ``(heads * C, D)``; None where `first` are logits."""
    bias: Tensor | None = None


class Wanted(NamedTuple):
    """Which gradients of the operands are wanted."""

    for_features: bool
    """The features', of the first operand."""
    for_head: bool
    """dCE of the first operand."""
    for_layer: bool
    """dCE of the layer's weight or bias."""


class Gradients(NamedTuple):
    """Of a loss; None where there is none."""

    for_features: Tensor | None
    """``-reversal * dCE - entropy_weight * dH`` and the confusion term's of the first operand."""
    first: Tensor | None
    """dCE of the operands, as for the two that follow."""
    weight: Tensor | None = None
    bias: Tensor | None = None


class Values(NamedTuple):
    """Of a loss, and what its gradients are to be made of."""

    loss: Tensor
    cross_entropy: Tensor
    entropy: Tensor
    denominators: Tensor | None
    """What the sums were divided by."""
    gradients: Gradients | None
    """Without the upstream factor; None where `late_gradients` is to make them."""


def loss_values(
    operands: Operands, arguments: LossArguments, denominators: Tensor | None, wanted: Wanted
) -> Values:
    """Return the values and, from the same read of the logits, the gradients.

    Not the gradients where they have to wait for the upstream factor: a mean's in float16 would
    underflow before a loss scaler can save it, and without a reduction there is a factor for every
    site. Nor with given denominators, which this operator does not take.

    Parameters
    ----------
    operands
        The logits, or a linear layer and its input.
    arguments
        Everything else about the loss; the target is that of these logits.
    denominators
        ``(heads, 2)``: what the sums of CE and H are divided by; None for the batch's own counts.
        With a layer for one head only.
    wanted
        The gradients to make.
    """
    if operands.weight is None and not ops.has_kernel(operands.first):
        return _plain_values(operands.first, arguments, denominators)
    early = (
        operands.first.dtype != torch.float16
        and arguments.reduction != NONE
        and denominators is None
    )
    if denominators is not None:
        target = arguments.target
        if operands.weight is None:
            folded, target = fold_heads(operands.first, target, arguments.heads)
            operands = operands._replace(first=folded)
        arguments = arguments._replace(target=target, reduction=NONE, heads=1)
    gradients = None
    if operands.weight is None:
        made = early and wanted.for_features, early and wanted.for_head
        result = ops.bias_loss.values(operands.first, *arguments, *made)
        if early:
            gradients = _of_logits(wanted, result[4:])
    else:
        calls = _linear_calls(arguments, wanted)
        results = [
            linear_bias_loss.values(*operands, *each, early and of_first, early and of_layer)
            for each, of_first, of_layer in (calls if early else calls[:1])
        ]
        result = results[0]
        if early:
            gradients = _of_layer(operands, wanted, [each[4:] for each in results])
    loss, cross_entropy, entropy, own = result[:4]
    if denominators is not None:
        divided = divide_sums(loss, cross_entropy, entropy, denominators)
        return Values(*divided, denominators, None)
    return Values(loss, cross_entropy, entropy, own, gradients)


def late_gradients(
    upstream: Tensor,
    operands: Operands,
    arguments: LossArguments,
    denominators: Tensor,
    wanted: Wanted,
) -> Gradients:
    """Return the gradients, from another read of the logits.

    The denominators are those of `loss_values`.
    """
    if operands.weight is None and not ops.has_kernel(operands.first):
        return _plain_gradients(upstream, operands.first, arguments, denominators, wanted)
    if operands.weight is None:
        made = torch.ops.lnl_ext.bias_loss_backward(
            upstream,
            operands.first,
            *arguments.with_denominators(denominators),
            wanted.for_features,
            wanted.for_head,
        )
        return _of_logits(wanted, made)
    results = [
        torch.ops.lnl_ext.linear_bias_loss_backward(
            upstream, *operands, *each.with_denominators(denominators), of_first, of_layer
        )
        for each, of_first, of_layer in _linear_calls(arguments, wanted)
    ]
    return _of_layer(operands, wanted, results)


def _of_logits(wanted: Wanted, made: Sequence[Tensor]) -> Gradients:
    for_features, for_head = made
    return Gradients(
        for_features if wanted.for_features else None, for_head if wanted.for_head else None
    )


def _linear_calls(
    arguments: LossArguments, wanted: Wanted
) -> list[tuple[LossArguments, bool, bool]]:
    """Return, for each call of the operator, its arguments and which gradients it makes.

    The first call is the one whose values count. One call makes one gradient of the layer's input.
    Two make the logits twice, which for few classes takes no longer than logits in memory; for very
    many it takes longer, in a small part of the memory (``benchmarks/throughput.py adversary``).
    """
    if not wanted.for_head:
        return [(arguments, wanted.for_features, wanted.for_layer)]
    own = (arguments.cross_entropy_only(), True, wanted.for_layer)
    is_cross_entropy = arguments.entropy_weight is None and arguments.confusion_weight is None
    if is_cross_entropy and not wanted.for_features:
        return [own]
    return [(arguments, wanted.for_features, False), own]


def _of_layer(operands: Operands, wanted: Wanted, made: Sequence[Sequence[Tensor]]) -> Gradients:
    """Sort what `_linear_calls` made: of the first operand, the weight and the bias."""
    _, weight, bias = made[-1]
    return Gradients(
        made[0][0] if wanted.for_features else None,
        made[-1][0] if wanted.for_head else None,
        weight if wanted.for_layer else None,
        bias if wanted.for_layer and operands.bias is not None else None,
    )


def _plain_terms(
    logits: Tensor, arguments: LossArguments, denominators: Tensor | None
) -> BiasTerms:
    if denominators is None:
        return bias_terms(logits, arguments)
    logits, target = fold_heads(logits, arguments.target, arguments.heads)
    terms = bias_terms(logits, arguments._replace(target=target, reduction=NONE, heads=1))
    return divide_terms(terms, denominators)


def _plain_values(logits: Tensor, arguments: LossArguments, denominators: Tensor | None) -> Values:
    terms = _plain_terms(logits.detach(), arguments, denominators)
    # A copy, because an autograd.Function must not return one tensor twice.
    loss = combine(terms, arguments._replace(reversal=None)).clone()
    return Values(loss, terms.cross_entropy, terms.entropy, denominators, None)


def _plain_gradients(
    upstream: Tensor,
    logits: Tensor,
    arguments: LossArguments,
    denominators: Tensor | None,
    wanted: Wanted,
) -> Gradients:
    for_features = for_head = None
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        if wanted.for_head:
            terms = _plain_terms(logits, arguments.cross_entropy_only(), denominators)
            (for_head,) = torch.autograd.grad(terms.cross_entropy, logits, upstream)
        if wanted.for_features:
            loss = combine(_plain_terms(logits, arguments, denominators), arguments)
            (for_features,) = torch.autograd.grad(loss, logits, upstream)
    return Gradients(for_features, for_head)
