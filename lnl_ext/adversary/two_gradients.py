"""One forward of the head, two gradients: the head's and the features'.

Autograd carries the head's gradient through the head, to whatever the logits depend on. Before
that, the features' gradient takes the same way alone, to the features only, and waits in a cell
for the node at the boundary of features and head, which returns it in place of the head's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lnl_ext.adversary.loss_gradients import (
    Gradients,
    Operands,
    Wanted,
    late_gradients,
    loss_values,
)
from lnl_ext.ops.loss_arguments import TENSORS, LossArguments
from lnl_ext.ops.types import BiasLoss

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Boundary(NamedTuple):
    """Where the features enter the head."""

    edge: GradientEdge
    """Of the head's input, or of its first layer's output."""
    cell: dict[str, Tensor]
    """Holds the gradient that the features get, or their layer's output, from the loss's backward
    until that of the boundary."""


def enter_head(features: Tensor, reversal: Tensor) -> tuple[Tensor, Boundary]:
    """Return the features for the head, and where their gradient is to be left.

    The features get what is left there; ``-reversal`` times the head's gradient, if nothing is.
    """
    cell: dict[str, Tensor] = {}
    inner: Tensor = _Boundary.apply(features, cell, -reversal)
    return inner, Boundary(get_gradient_edge(inner), cell)


def enter_layer(
    layer: nn.Linear | Convolution, features: Tensor, reversal: Tensor
) -> tuple[Tensor, Boundary]:
    """Return the output of the head's first layer, and where its gradient is to be left.

    As `enter_head`, without the gradient of the layer's input that the head has no use for: a
    quarter of the time of a head whose first layer is the largest.
    """
    cell: dict[str, Tensor] = {}
    output = layer(features.detach())
    output = _LayerBoundary.apply(output, features, layer.weight.detach(), cell, -reversal, layer)
    return output, Boundary(get_gradient_edge(output), cell)


def adversary_loss(
    operands: Operands,
    arguments: LossArguments,
    wanted: Wanted,
    boundary: Boundary | None = None,
) -> BiasLoss:
    """Return the loss, whose backward gives the operands dCE, and the features another gradient.

    That is ``-reversal * dCE - entropy_weight * dH`` and the confusion term's (Kim et al., CVPR
    2019, eq. 9).

    Parameters
    ----------
    operands
        The logits, or a linear layer and its input.
    arguments
        Everything else about the loss.
    wanted
        Which gradients are. Where it is the features' only, the first operand gets that.
    boundary
        Where the features entered the head, if both gradients are wanted.
    """
    if boundary is None:
        return BiasLoss(*_Loss.apply(None, wanted, *operands, *arguments))
    ends = (get_gradient_edge(operands.first), boundary)
    return BiasLoss(*_LossOfTwo.apply(ends, wanted, *operands, *arguments))


class _Boundary(torch.autograd.Function):
    """The identity; its gradient is what the cell holds, or else the scaled one of the head."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, cell: dict[str, Tensor], scale: Tensor) -> Tensor:
        ctx.cell, ctx.scale = cell, scale
        return features.view_as(features)

    @staticmethod
    # Else torch.compile traces it where a compiled step calls backward.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _taken(ctx, grads[0]), None, None


class _LayerBoundary(torch.autograd.Function):
    """The identity of a layer's output; sends what the cell holds through the layer."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        features: Tensor,
        weight: Tensor,
        cell: dict[str, Tensor],
        scale: Tensor,
        layer: nn.Linear | Convolution,
    ) -> Tensor:
        ctx.cell, ctx.scale, ctx.dtype = cell, scale, features.dtype
        ctx.convolution = None
        if isinstance(layer, nn.Linear):
            ctx.save_for_backward(weight)
        else:
            ctx.save_for_backward(weight, features)
            ctx.convolution = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return output.detach()  # no view for autograd, and so the next layer may write to it

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        taken = _taken(ctx, grads[0])
        weight, *features = (t.detach().to(taken.dtype) for t in ctx.saved_tensors)
        if ctx.convolution is None:
            gradient = taken @ weight
        else:
            stride, padding, dilation, groups = ctx.convolution
            gradient, _, _ = torch.ops.aten.convolution_backward(
                taken,
                *features,
                weight,
                None,
                stride,
                padding,
                dilation,
                False,
                [0] * len(stride),
                groups,
                (True, False, False),
            )
        return grads[0], gradient.to(ctx.dtype), None, None, None, None


def _taken(ctx: Any, gradient: Tensor) -> Tensor:
    found: Tensor | None = ctx.cell.pop("gradient", None)
    return gradient * ctx.scale.to(gradient.dtype) if found is None else found


_OPERANDS = len(Operands._fields)


def _forward(ctx: Any, ends: Any, wanted: Wanted, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    operands, arguments = Operands(*given[:_OPERANDS]), LossArguments(*given[_OPERANDS:])
    values = loss_values(operands, arguments, wanted)
    ctx.mark_non_differentiable(values.cross_entropy, values.entropy)
    ctx.ends = ends
    # Not saved: where the gradients are made already, a write to the layer does no harm.
    ctx.layer = operands[1:]
    ctx.early = values.gradients is not None
    if values.gradients is not None:
        ctx.save_for_backward(operands.first, *values.gradients)
        # A saved-tensor hook may hold on to what is saved, which must then stay as it is.
        ctx.owns = (
            not torch.compiler.is_compiling()
            and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        )
    else:
        # Copies, so that set_progress between forward and backward changes nothing.
        target, weight, _, *coefficients = arguments[:TENSORS]
        coefficients = [None if c is None else c.clone() for c in coefficients]
        ctx.save_for_backward(*operands, target, weight, values.denominators, *coefficients)
        ctx.wanted, ctx.options = wanted, arguments[TENSORS:]
    return values[:3]


def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor, Gradients]:
    """Return the first operand and the gradients, times the upstream factor."""
    first, *saved = ctx.saved_tensors
    if not ctx.early:
        operands = Operands(first, *saved[: _OPERANDS - 1])
        arguments = LossArguments(*saved[_OPERANDS - 1 :], *ctx.options)
        return first, late_gradients(upstream, operands, arguments, ctx.wanted)
    if torch.compiler.is_compiling():
        return first, Gradients(*(None if g is None else g * upstream for g in saved))
    keep = not ctx.owns or torch._C._autograd._get_current_graph_task_keep_graph()
    gradients = Gradients(*(None if g is None else g.clone() if keep else g for g in saved))
    for gradient in gradients:
        if gradient is not None:
            torch.ops.lnl_ext.scale_gradient_(gradient, upstream)
    return first, gradients


def _results(ctx: Any, first: Tensor, gradients: Gradients, twice: bool) -> tuple[Any, ...]:
    """Return what goes to the inputs of the function."""
    for_features, own, *layer = gradients
    results = [for_features if own is None else own, *layer]
    if twice:
        results = [_without_derivative(g, first, *ctx.layer) for g in results]
    return None, None, *results, *(None,) * len(LossArguments._fields)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    with torch.no_grad():
        first, gradients = _gradients(ctx, grads[0])
    return _results(ctx, first, gradients, twice)


# Else torch.compile traces it where a compiled step calls backward.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _backward_of_two(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    twice = torch.is_grad_enabled()
    with torch.no_grad():
        first, gradients = _gradients(ctx, grads[0])
    edge, boundary = ctx.ends
    # Not where the features' gradient is not asked for, or the head does not use the features.
    if torch._C._will_engine_execute_node(boundary.edge.node):
        (found,) = torch.autograd.grad(
            edge, boundary.edge, gradients.for_features, retain_graph=True
        )
        if twice:
            found = _without_derivative(found, first, *ctx.layer)
        boundary.cell["gradient"] = found
    return _results(ctx, first, gradients, twice)


class _Loss(torch.autograd.Function):
    """The loss of its operands, which get one gradient."""

    forward = staticmethod(_forward)
    backward = staticmethod(_backward)


class _LossOfTwo(torch.autograd.Function):
    """The same, and the features get another one."""

    forward = staticmethod(_forward)
    backward = staticmethod(_backward_of_two)


def _without_derivative(gradient: Tensor | None, *inputs: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    result: Tensor = _NoSecondDerivative.apply(gradient, *inputs)
    return result


class _NoSecondDerivative(torch.autograd.Function):
    """Marks a gradient that has no derivative, so that asking for one is a clear error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "BiasAdversary has no second derivative: for a gradient penalty or another double "
            "backward use lnl_ext.fused_bias_loss on the head's logits"
        )
