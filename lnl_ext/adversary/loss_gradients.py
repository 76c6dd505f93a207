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
from lnl_ext.ops.arguments import NONE
from lnl_ext.ops.arguments import LossArguments as CoreArguments
from lnl_ext.ops.formula import BiasTerms, bias_terms, combine
from lnl_ext.ops.given_denominators import divide_sums, divide_terms, fold_heads

_NO_COEFFICIENTS = (None, None, None)
"""With which the operators compute CE and its true gradient."""


class Operands(NamedTuple):
    """What the logits are, or what they are made of."""

    first: Tensor
    """Logits ``(N, heads * C, *S)``; or the inputs of the layer, ``(N, D)``."""
    weight: Tensor | None = None
    """Of the layer, ``(heads * C, D)``; None where `first` are logits."""
    bias: Tensor | None = None


class LossArguments(NamedTuple):
    """What the loss is made of beside its operands, and which gradients are wanted."""

    target: Tensor
    """Class indices or probabilities, as `lnl_ext.BiasAdversary` takes them for these logits."""
    class_weight: Tensor | None
    reversal: Tensor
    entropy_weight: Tensor | None
    """None where the term is absent, as for `confusion_weight`."""
    confusion_weight: Tensor | None
    denominators: Tensor | None
    """``(heads, 2)``: what the sums of CE and H are divided by; None for the batch's own counts.
    With a layer for one head only."""
    ignore_index: int
    label_smoothing: float
    reduction: int
    mask_entropy: bool
    heads: int
    for_features: bool
    """Whether the features' gradient of the first operand is wanted."""
    for_head: bool
    """Whether dCE of the first operand is."""
    for_layer: bool
    """Whether dCE of the layer's weight or bias is."""


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


def loss_values(operands: Operands, arguments: LossArguments) -> Values:
    """Return the values and, from the same read of the logits, the gradients.

    Not the gradients where they have to wait for the upstream factor: a mean's in float16 would
    underflow before a loss scaler can save it, and without a reduction there is a factor for every
    site. Nor with given denominators, which this operator does not take.
    """
    if operands.weight is None and not ops.has_kernel(operands.first):
        return _plain_values(operands, arguments)
    options = _options(arguments)
    early = (
        operands.first.dtype != torch.float16
        and arguments.reduction != ops.REDUCTIONS["none"]
        and arguments.denominators is None
    )
    target = arguments.target
    if arguments.denominators is not None:
        if operands.weight is None:
            folded, target = fold_heads(operands.first, target, options.heads)
            operands = operands._replace(first=folded)
        options = options._replace(reduction=ops.REDUCTIONS["none"], heads=1)
    if operands.weight is None:
        loss, cross_entropy, entropy, own, *made = ops.bias_loss_values(
            operands.first,
            target,
            arguments.class_weight,
            *_coefficients(arguments),
            *options,
            early and arguments.for_features,
            early and arguments.for_head,
        )
        gradients = _of_logits(arguments, made) if early else None
    else:
        calls = _linear_calls(arguments)
        results = [
            ops_linear.linear_bias_loss_values(
                *operands,
                target,
                arguments.class_weight,
                *coefficients,
                *options,
                early and of_first,
                early and of_layer,
            )
            for coefficients, of_first, of_layer in (calls if early else calls[:1])
        ]
        loss, cross_entropy, entropy, own = results[0][:4]
        gradients = None
        if early:
            gradients = _of_layer(operands, arguments, [result[4:] for result in results])
    if arguments.denominators is not None:
        divided = divide_sums(loss, cross_entropy, entropy, arguments.denominators)
        return Values(*divided, arguments.denominators, None)
    return Values(loss, cross_entropy, entropy, own, gradients)


def late_gradients(upstream: Tensor, operands: Operands, arguments: LossArguments) -> Gradients:
    """Return the gradients, from another read of the logits.

    The denominators of `arguments` are those of `loss_values`.
    """
    if operands.weight is None and not ops.has_kernel(operands.first):
        return _plain_gradients(upstream, operands, arguments)
    options = _options(arguments)
    if operands.weight is None:
        made = torch.ops.lnl_ext.bias_loss_backward(
            upstream,
            operands.first,
            arguments.target,
            arguments.class_weight,
            arguments.denominators,
            *_coefficients(arguments),
            *options,
            arguments.for_features,
            arguments.for_head,
        )
        return _of_logits(arguments, made)
    results = [
        torch.ops.lnl_ext.linear_bias_loss_backward(
            upstream,
            *operands,
            arguments.target,
            arguments.class_weight,
            arguments.denominators,
            *coefficients,
            *options,
            of_first,
            of_layer,
        )
        for coefficients, of_first, of_layer in _linear_calls(arguments)
    ]
    return _of_layer(operands, arguments, results)


def _options(arguments: LossArguments) -> ops.Options:
    return ops.Options(
        arguments.ignore_index,
        arguments.label_smoothing,
        arguments.reduction,
        arguments.mask_entropy,
        arguments.heads,
    )


def _coefficients(arguments: LossArguments) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return arguments.reversal, arguments.entropy_weight, arguments.confusion_weight


def _of_logits(arguments: LossArguments, made: Sequence[Tensor]) -> Gradients:
    for_features, for_head = made
    return Gradients(
        for_features if arguments.for_features else None, for_head if arguments.for_head else None
    )


def _linear_calls(
    arguments: LossArguments,
) -> list[tuple[Sequence[Tensor | None], bool, bool]]:
    """Return, for each call of the operator, coefficients and which gradients it makes.

    The first call is the one whose values count. One call makes one gradient of the layer's input.
    Two make the logits twice, which for few classes takes no longer than logits in memory; for very
    many it takes longer, in a small part of the memory (``benchmarks/throughput.py adversary``).
    """
    coefficients = _coefficients(arguments)
    if not arguments.for_head:
        return [(coefficients, arguments.for_features, arguments.for_layer)]
    own = (_NO_COEFFICIENTS, True, arguments.for_layer)
    is_cross_entropy = arguments.entropy_weight is None and arguments.confusion_weight is None
    if is_cross_entropy and not arguments.for_features:
        return [own]
    return [(coefficients, arguments.for_features, False), own]


def _of_layer(
    operands: Operands, arguments: LossArguments, made: Sequence[Sequence[Tensor]]
) -> Gradients:
    """Sort what `_linear_calls` made: of the first operand, the weight and the bias."""
    _, weight, bias = made[-1]
    return Gradients(
        made[0][0] if arguments.for_features else None,
        made[-1][0] if arguments.for_head else None,
        weight if arguments.for_layer else None,
        bias if arguments.for_layer and operands.bias is not None else None,
    )


def _core(arguments: LossArguments) -> CoreArguments:
    return CoreArguments(
        arguments.target,
        arguments.class_weight,
        *_coefficients(arguments),
        arguments.ignore_index,
        arguments.label_smoothing,
        arguments.reduction,
        arguments.mask_entropy,
        arguments.heads,
    )


def _plain_terms(logits: Tensor, arguments: LossArguments, core: CoreArguments) -> BiasTerms:
    if arguments.denominators is None:
        return bias_terms(logits, core)
    logits, target = fold_heads(logits, arguments.target, arguments.heads)
    terms = bias_terms(logits, core._replace(target=target, reduction=NONE, heads=1))
    return divide_terms(terms, arguments.denominators)


def _plain_values(operands: Operands, arguments: LossArguments) -> Values:
    core = _core(arguments)._replace(reversal=None)
    terms = _plain_terms(operands.first.detach(), arguments, core)
    # A copy, because an autograd.Function must not return one tensor twice.
    loss = combine(terms, core).clone()
    return Values(loss, terms.cross_entropy, terms.entropy, arguments.denominators, None)


def _plain_gradients(upstream: Tensor, operands: Operands, arguments: LossArguments) -> Gradients:
    for_features = for_head = None
    core = _core(arguments)
    with torch.enable_grad():
        logits = operands.first.detach().requires_grad_()
        if arguments.for_head:
            terms = _plain_terms(logits, arguments, core.cross_entropy_only())
            (for_head,) = torch.autograd.grad(terms.cross_entropy, logits, upstream)
        if arguments.for_features:
            loss = combine(_plain_terms(logits, arguments, core), core)
            (for_features,) = torch.autograd.grad(loss, logits, upstream)
    return Gradients(for_features, for_head)
