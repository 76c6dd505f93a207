"""What PyTorch has to know of the operators of a linear head's bias loss.

Fake kernels and autograd, as lnl_ext/ops/bias_loss.py has them for the loss of given logits. The
schemas are
in csrc/linear_bias_loss.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lnl_ext.ops.bias_loss import REDUCTIONS, Options, logits_gradient, scaled_gradient
from lnl_ext.ops.checks import accumulation_dtype
from lnl_ext.ops.second_derivative import linear_vector_products

# ---- fake kernels --------------------------------------------------------------------------


def _gradients_like(
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    features_gradient: bool,
    head_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None, wanted: bool) -> Tensor:
        return features.new_empty(0 if tensor is None or not wanted else tensor.shape)

    return (
        like(features, features_gradient),
        like(head_weight, head_gradient),
        like(head_bias, head_gradient),
    )


def _linear_bias_loss_fake(
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reversal: Tensor | None,
    entropy_weight: Tensor | None,
    confusion_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    mask_entropy: bool,
    heads: int,
    features_gradient: bool,
    head_gradient: bool,
) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(features.dtype)
    shape = (features.shape[0],) if reduction == REDUCTIONS["none"] else ()
    values = [features.new_empty(shape, dtype=dtype) for _ in range(3)]
    return (
        *values,
        features.new_empty((heads, 2), dtype=dtype),
        *_gradients_like(features, head_weight, head_bias, features_gradient, head_gradient),
    )


def _linear_bias_loss_backward_fake(
    grad_loss: Tensor,
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    denominators: Tensor,
    reversal: Tensor | None,
    entropy_weight: Tensor | None,
    confusion_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    mask_entropy: bool,
    heads: int,
    features_gradient: bool,
    head_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_like(features, head_weight, head_bias, features_gradient, head_gradient)


torch.library.register_fake("lnl_ext::linear_bias_loss", _linear_bias_loss_fake)
torch.library.register_fake("lnl_ext::linear_bias_loss_backward", _linear_bias_loss_backward_fake)


# ---- autograd ------------------------------------------------------------------------------
# As in ops.py: the functions serve the registered operators and the autograd.Functions alike.

_TENSORS = 8  # arguments of the forward operator before the options


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    denominators, *gradients = output[3:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    features, head_weight, head_bias, target, weight, *coefficients = inputs[:_TENSORS]
    ctx.save_for_backward(
        features, head_weight, head_bias, target, weight, denominators, *coefficients, *gradients
    )
    ctx.options = Options(*inputs[_TENSORS : _TENSORS + 5])
    ctx.early = inputs[_TENSORS + 5 :]
    # Whoever calls the operator itself has the gradients, too: they must stay as they were.
    ctx.owns_gradients = False


def _save_own_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save_linear(ctx, inputs, output)
    ctx.owns_gradients = True


def _linear_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_loss = grads[0]
    if grad_loss is None:
        return (None,) * (_TENSORS + 7)
    needs = ctx.needs_input_grad[:3]
    wanted = (needs[0], needs[1] or needs[2])
    early = (*ctx.early, ctx.early[1])
    *tensors, for_features, for_weight, for_bias = ctx.saved_tensors
    held = [
        gradient if made and need else None
        for gradient, made, need in zip(
            (for_features, for_weight, for_bias), early, needs, strict=True
        )
    ]
    results: Sequence[Tensor | None]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        results = _LinearGradient.apply(grad_loss, *tensors, *ctx.options, *wanted, *held)
    else:
        late = [want and not made for want, made in zip(wanted, ctx.early, strict=True)]
        made_now: tuple[Tensor | None, ...] = (None,) * 3
        if any(late):
            made_now = torch.ops.lnl_ext.linear_bias_loss_backward(
                grad_loss, *tensors, *ctx.options, *late
            )
        if ctx.owns_gradients:
            held = [None if g is None else scaled_gradient(g, grad_loss) for g in held]
        else:
            held = [None if g is None else g * grad_loss.to(g.dtype) for g in held]
        results = [
            now if gradient is None else gradient
            for gradient, now in zip(held, made_now, strict=True)
        ]
    chosen = [result if need else None for result, need in zip(results, needs, strict=True)]
    return (*chosen, *[None] * (_TENSORS + 4))


def _save_linear_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: _TENSORS + 2])
    ctx.options = Options(*inputs[_TENSORS + 2 : _TENSORS + 7])
    ctx.wanted = inputs[_TENSORS + 7 : _TENSORS + 9]


def _linear_gradient_backward(ctx: Any, *vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    of_features, of_weight, of_bias = ctx.wanted[0], ctx.wanted[1], ctx.wanted[1]
    vectors = tuple(
        vector if wanted else None
        for vector, wanted in zip(vectors, (of_features, of_weight, of_bias), strict=True)
    )
    if all(vector is None for vector in vectors):
        return (None,) * (_TENSORS + 9)
    results = linear_vector_products(vectors, logits_gradient, ctx.saved_tensors, ctx.options)
    return (*results, *[None] * (_TENSORS + 5))


def linear_bias_loss_values(*arguments: Any) -> tuple[Tensor, ...]:
    """Call `lnl_ext::linear_bias_loss` where no derivative is to be recorded.

    Goes past the registered formula, as `lnl_ext.ops.bias_loss.bias_loss_values` does.
    """
    result: tuple[Tensor, ...]
    if torch.compiler.is_compiling():  # the dispatcher's guards are not for tracing
        result = torch.ops.lnl_ext.linear_bias_loss(*arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            result = torch.ops.lnl_ext.linear_bias_loss(*arguments)
    return result


class _LinearBiasLoss(torch.autograd.Function):
    """`lnl_ext::linear_bias_loss` with its derivatives."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        result = linear_bias_loss_values(*arguments)
        _save_own_linear(ctx, arguments, result)
        return result

    backward = staticmethod(_linear_backward)


class _LinearBiasLossUnderTransforms(torch.autograd.Function):
    """The same in the form that torch.func needs."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = torch.ops.lnl_ext.linear_bias_loss(*arguments)
        return result

    setup_context = staticmethod(_save_own_linear)
    backward = staticmethod(_linear_backward)


class _LinearGradient(torch.autograd.Function):
    """The gradients as differentiable functions of features, head and upstream factor.

    Takes the arguments of `lnl_ext::linear_bias_loss_backward`, and of the three gradients those
    that the forward pass has made already, without upstream factor, else None.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *of_operator, of_features, of_head, for_features, for_weight, for_bias = arguments
        made = [for_features, for_weight, for_bias]
        late = (
            of_features and for_features is None,
            of_head and for_weight is None and for_bias is None,
        )
        results: tuple[Tensor, ...] = torch.ops.lnl_ext.linear_bias_loss_backward(
            *of_operator, *late
        )
        return tuple(
            result if gradient is None else gradient * of_operator[0].to(gradient.dtype)
            for gradient, result in zip(made, results, strict=True)
        )

    setup_context = staticmethod(_save_linear_gradient)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_linear_gradient_backward(ctx, *vectors), *[None] * 3)


torch.library.register_autograd(
    "lnl_ext::linear_bias_loss", _linear_backward, setup_context=_save_linear
)
torch.library.register_autograd(
    "lnl_ext::linear_bias_loss_backward",
    _linear_gradient_backward,
    setup_context=_save_linear_gradient,
)


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


def linear_bias_loss(
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reversal: Tensor | None,
    entropy_weight: Tensor | None,
    confusion_weight: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, which is differentiable, and its two terms, which are not.

    Parameters
    ----------
    features, head_weight, head_bias
        Shapes ``(N, D)``, ``(heads * C, D)`` and ``(heads * C,)`` or None; of one dtype.
    target, weight
        Class indices ``(N,)`` or ``(N, heads)``, or probabilities ``(N, heads * C)``; class weights
        ``(C,)`` or None.
    reversal, entropy_weight, confusion_weight
        0-dim tensors or None, see `lnl_ext.fused_linear_bias_loss` and `lnl_ext.BiasAdversary`.
    options
        Everything else.

    Notes
    -----
    As for `lnl_ext.ops.bias_loss.bias_loss` the gradients are made together with the value, but
    for float16
    and for ``reduction="none"``, which make the logits a second time.
    """
    inputs = (features, head_weight, head_bias)
    requires_grad = [t is not None and t.requires_grad for t in inputs]
    needed = any(requires_grad) and torch.is_grad_enabled()
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    if entropy_weight is not None and entropy_weight is reversal:
        entropy_weight = entropy_weight.clone()  # Dynamo refuses one tensor for two arguments
    transformed = torch._C._are_functorch_transforms_active()
    arguments = (target, weight, reversal, entropy_weight, confusion_weight, *options)
    if not (needed or forward_mode or transformed):
        detached = [None if t is None else t.detach() for t in inputs]
        loss, cross_entropy, entropy, *_ = linear_bias_loss_values(
            *detached, *arguments, False, False
        )
        return loss, cross_entropy, entropy
    function = _LinearBiasLossUnderTransforms if transformed else _LinearBiasLoss
    early = (
        features.dtype != torch.float16
        and options.reduction != REDUCTIONS["none"]
        and not transformed
    )
    loss, cross_entropy, entropy, *_ = function.apply(
        *inputs, *arguments, early and requires_grad[0], early and any(requires_grad[1:])
    )
    return loss, cross_entropy, entropy
