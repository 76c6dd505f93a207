"""The bias loss of a linear head: its fake kernels and its derivatives.

The schemas are in csrc/schemas.cpp.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lnl_ext.ops.autograd import DifferentiableLoss
from lnl_ext.ops.bias_loss import empty_values, logits_gradient
from lnl_ext.ops.loss_arguments import LossArguments
from lnl_ext.ops.second_derivative import linear_vector_products


def _gradients_like(
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    features_gradient: bool,
    head_gradient: bool,
) -> tuple[Tensor, ...]:
    wanted = (
        (features, features_gradient),
        (head_weight, head_gradient),
        (head_bias, head_gradient),
    )
    return tuple(
        features.new_empty(0 if tensor is None or not want else tensor.shape)
        for tensor, want in wanted
    )


def _fake(
    features: Tensor, head_weight: Tensor, head_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    *arguments, features_gradient, head_gradient = rest
    return (
        *empty_values(features, LossArguments(*arguments)),
        *_gradients_like(features, head_weight, head_bias, features_gradient, head_gradient),
    )


def _backward_fake(
    grad_loss: Tensor, features: Tensor, head_weight: Tensor, head_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return _gradients_like(features, head_weight, head_bias, *rest[-2:])


torch.library.register_fake("lnl_ext::linear_bias_loss", _fake)
torch.library.register_fake("lnl_ext::linear_bias_loss_backward", _backward_fake)

linear_bias_loss = DifferentiableLoss(
    "linear_bias_loss",
    3,
    functools.partial(linear_vector_products, logits_gradient=logits_gradient),
)
"""Takes features ``(N, D)``, head weight ``(heads * C, D)``, head bias ``(heads * C,)`` or None, of
one dtype, and `LossArguments`."""


def autocast(
    features: Tensor, head_weight: Tensor, head_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the arguments in autocast's dtype, where autocast is on and torch casts a linear's."""
    kind = features.device.type if isinstance(features, Tensor) else "cpu"
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return features, head_weight, head_bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Any) -> Any:
        eligible = (
            isinstance(tensor, Tensor)
            and tensor.is_floating_point()
            and tensor.dtype != torch.float64
            and tensor.device.type == kind
        )
        return tensor.to(dtype) if eligible else tensor

    return cast(features), cast(head_weight), cast(head_bias)
