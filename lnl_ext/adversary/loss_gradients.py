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
from lnl_ext.ops import linear_bias_loss as ops_linear
from lnl_ext.ops.formula import bias_terms, combine
from lnl_ext.ops.loss_arguments import NONE, LossArguments


class Operands(NamedTuple):
    """What the logits are, or what they are made of."""

    first: Tensor
    """Logits ``(N, heads * C, *S)``; or the inputs of the layer, ``(N, D)``."""
    weight: Tensor | None = None
    """Of the layer, ``(heads * C, D)``; None where `first` are logits."""
    bias: Tensor | None = None


class Wanted(NamedTuple):
    """Which gradients of a loss are."""

    for_features: bool
    """The features' gradient of the first operand."""
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


def loss_values(operands: Operands, arguments: LossArguments, wanted: Wanted) -> Values:
    """Return the values and, from the same read of the logits, the gradients.

    Not the gradients where they have to wait for the upstream factor: a mean's in float16 would
    underflow before a loss scaler can save it, and without a reduction there is a factor for every
    site.
    """
    if operands.weight is None and not ops.has_kernel(operands.first):
        return _plain_values(operands, arguments)
    early = operands.first.dtype != torch.float16 and arguments.reduction != NONE
    if operands.weight is None:
        made = early and wanted.for_features, early and wanted.for_head
        result = ops.bias_loss.values(operands.first, *arguments, *made)
        gradients = _of_logits(wanted, result[4:])
    else:
        calls = _linear_calls(arguments, wanted)
        results = [
            ops_linear.linear_bias_loss.values(
                *operands, *of_call, early and of_first, early and of_layer
            )
            for of_call, of_first, of_layer in (calls if early else calls[:1])
        ]
        result = results[0]
        gradients = _of_layer(operands, wanted, [each[4:] for each in results])
    loss, cross_entropy, entropy, denominators = result[:4]
    return Values(loss, cross_entropy, entropy, denominators, gradients if early else None)


def late_gradients(
    upstream: Tensor, operands: Operands, arguments: LossArguments, wanted: Wanted
) -> Gradients:
    """Return the gradients, from another read of the logits.

    The denominators are those of `loss_values`.
    """
    if operands.weight is None:
        if not ops.has_kernel(operands.first):
            return _plain_gradients(upstream, operands, arguments, wanted)
        made = torch.ops.lnl_ext.bias_loss_backward(
            upstream, operands.first, *arguments, wanted.for_features, wanted.for_head
        )
        return _of_logits(wanted, made)
    results = [
        torch.ops.lnl_ext.linear_bias_loss_backward(
            upstream, *operands, *of_call, of_first, of_layer
        )
        for of_call, of_first, of_layer in _linear_calls(arguments, wanted)
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


def _plain_values(operands: Operands, arguments: LossArguments) -> Values:
    arguments = arguments._replace(reversal=None)
    terms = bias_terms(operands.first.detach(), arguments)
    # A copy, because an autograd.Function must not return one tensor twice.
    loss = combine(terms, arguments).clone()
    return Values(loss, terms.cross_entropy, terms.entropy, arguments.denominators, None)


def _plain_gradients(
    upstream: Tensor, operands: Operands, arguments: LossArguments, wanted: Wanted
) -> Gradients:
    for_features = for_head = None
    with torch.enable_grad():
        logits = operands.first.detach().requires_grad_()
        if wanted.for_head:
            terms = bias_terms(logits, arguments.cross_entropy_only())
            (for_head,) = torch.autograd.grad(terms.cross_entropy, logits, upstream)
        if wanted.for_features:
            loss = combine(bias_terms(logits, arguments), arguments)
            (for_features,) = torch.autograd.grad(loss, logits, upstream)
    return Gradients(for_features, for_head)
