"""The identity whose gradient is multiplied by a constant, which makes a reversal layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lnl_ext.ops.loss_arguments import Coefficient

__all__ = ["scale_gradient"]


class _ScaleGradient(torch.autograd.Function):
    """The identity, with its derivatives multiplied by a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: Coefficient) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Coefficient], output: Tensor) -> None:
        factor = inputs[1]
        if isinstance(factor, Tensor):
            ctx.save_for_backward(factor)
        else:
            ctx.factor = factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = grads
        saved = ctx.saved_tensors  # once: a checkpoint hands each out once
        factor = saved[0] if saved else ctx.factor
        if isinstance(factor, Tensor):
            # A float64 factor must not promote the gradient of a float32 scalar.
            factor = factor.to(gradient.dtype)
        return gradient * factor, None


def scale_gradient(x: Tensor, factor: Coefficient) -> Tensor:
    """Return `x`, with its derivatives multiplied by `factor` in the backward pass.

    The factor, a number or 0-dim tensor, is a constant: it gets no gradient, and unlike
    `lnl_ext.grad_reverse` this checks nothing.
    """
    result: Tensor = _ScaleGradient.apply(x, factor)
    return result
