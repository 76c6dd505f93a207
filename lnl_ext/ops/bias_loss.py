"""What PyTorch has to know of the operators: fake kernels, autograd, devices with kernels.

The schemas are in csrc/bias_loss.cpp. The operators take coefficients as 0-dim tensors, because a
float in a schema makes ``torch.compile`` compile anew for every value.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lnl_ext.build import build_info  # which loads the operators
from lnl_ext.ops.checks import accumulation_dtype
from lnl_ext.ops.second_derivative import vector_products

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as the operators number them


class Options(NamedTuple):
    """The arguments of the operators that are not tensors, in their order."""

    ignore_index: int
    label_smoothing: float
    reduction: int
    mask_entropy: bool
    heads: int


def has_kernel(logits: Tensor) -> bool:
    """Tell whether the operators have a kernel for the logits' device.

    Other devices than CPU and CUDA take the plain path, which is said once.

    Raises
    ------
    RuntimeError
        The logits are on a CUDA device and this build has no CUDA kernels.
    """
    kind = logits.device.type
    if kind == "cpu":
        return True
    if kind == "cuda":
        if not _built_with_cuda():
            raise RuntimeError(
                "logits are on a CUDA device, and this build of lnl_ext has no CUDA kernels: "
                "reinstall it where nvcc is found, with LNL_EXT_CUDA=1 pip install ."
            )
        return True
    _announce_plain_path(kind)
    return False


@functools.cache
def _built_with_cuda() -> bool:
    return build_info()["cuda"]


@functools.cache
def _announce_plain_path(kind: str) -> None:
    warnings.warn(
        f"lnl_ext has no kernels for {kind!r} devices: the losses run as plain PyTorch there",
        stacklevel=3,
    )


# ---- fake kernels --------------------------------------------------------------------------


def _gradient_like(logits: Tensor, wanted: bool) -> Tensor:
    if not wanted:
        return logits.new_empty(0)
    if logits.is_contiguous() or not logits.movedim(1, -1).is_contiguous():
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    return torch.empty_like(logits)


def _bias_loss_fake(
    logits: Tensor,
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
    logits_gradient: bool,
    head_gradient: bool,
) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(logits.dtype)
    shape = (logits.shape[0], *logits.shape[2:]) if reduction == REDUCTIONS["none"] else ()
    values = [logits.new_empty(shape, dtype=dtype) for _ in range(3)]
    return (
        *values,
        logits.new_empty((heads, 2), dtype=dtype),
        _gradient_like(logits, logits_gradient),
        _gradient_like(logits, head_gradient),
    )


def _bias_loss_backward_fake(
    grad_loss: Tensor,
    logits: Tensor,
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
    logits_gradient: bool,
    head_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return _gradient_like(logits, logits_gradient), _gradient_like(logits, head_gradient)


def _scale_gradient_fake(gradient: Tensor, factor: Tensor) -> None:
    return None


torch.library.register_fake("lnl_ext::bias_loss", _bias_loss_fake)
torch.library.register_fake("lnl_ext::bias_loss_backward", _bias_loss_backward_fake)
torch.library.register_fake("lnl_ext::scale_gradient_", _scale_gradient_fake)


# ---- autograd ------------------------------------------------------------------------------
# The functions below serve two purposes: registered with the operators they make these
# differentiable for whoever calls them directly, and in the autograd.Functions they work under
# torch.func as well, which registered formulas do not.


def _save_bias_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, reversal, entropy_weight, confusion_weight, *options = inputs
    _, cross_entropy, entropy, denominators, gradient, head_gradient = output
    ctx.mark_non_differentiable(cross_entropy, entropy, denominators, gradient, head_gradient)
    ctx.set_materialize_grads(False)  # zeros of the logits' size for outputs that have no gradient
    ctx.save_for_backward(
        logits, target, weight, denominators, reversal, entropy_weight, confusion_weight, gradient
    )
    ctx.options = Options(*options[:5])
    ctx.early = options[5]
    # Whoever calls the operator itself has the gradient, too: it must stay as it was.
    ctx.owns_gradient = False


def _save_own_bias_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save_bias_loss(ctx, inputs, output)
    ctx.owns_gradient = True


def _bias_loss_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_loss = grads[0]
    if grad_loss is None:
        return (None,) * 13
    *tensors, gradient = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        held = gradient if ctx.early else None
        result = _Gradient.apply(grad_loss, *tensors, *ctx.options, True, False, held)[0]
    elif ctx.early:
        result = scaled_gradient(gradient, grad_loss) if ctx.owns_gradient else gradient * grad_loss
    else:
        result, _ = torch.ops.lnl_ext.bias_loss_backward(
            grad_loss, *tensors, *ctx.options, True, False
        )
    return (result, *[None] * 12)


def scaled_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return ``gradient * factor``, in place where nobody will ask for the gradient again."""
    traced = torch.compiler.is_compiling() or type(gradient) is not Tensor
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * factor
    torch.ops.lnl_ext.scale_gradient_(gradient, factor)
    return gradient


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8])
    ctx.options = Options(*inputs[8:13])
    ctx.wanted = inputs[13:15]


def _gradient_backward(ctx: Any, *vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_loss, logits, *tensors = ctx.saved_tensors
    along_loss: Any = None
    along_logits: Any = None
    target, weight, denominators, *coefficients = tensors
    for vector, wanted, terms in zip(
        vectors, ctx.wanted, (coefficients, (None, None, None)), strict=True
    ):
        if wanted and vector is not None:
            products = vector_products(
                vector, grad_loss, logits, target, weight, denominators, *terms, *ctx.options
            )
            along_loss = products[0] if along_loss is None else along_loss + products[0]
            along_logits = products[1] if along_logits is None else along_logits + products[1]
    return (along_loss, along_logits, *[None] * 13)


def bias_loss_values(*arguments: Any) -> tuple[Tensor, ...]:
    """Call `lnl_ext::bias_loss` where no derivative is to be recorded.

    Its registered formula is Python code that the dispatcher enters even when gradients are off,
    as they are inside an autograd.Function: going past it takes a sixth off a small loss's step.
    """
    result: tuple[Tensor, ...]
    if torch.compiler.is_compiling():  # the dispatcher's guards are not for tracing
        result = torch.ops.lnl_ext.bias_loss(*arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            result = torch.ops.lnl_ext.bias_loss(*arguments)
    return result


class _BiasLoss(torch.autograd.Function):
    """`lnl_ext::bias_loss` with its derivatives."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        result = bias_loss_values(*arguments)
        _save_own_bias_loss(ctx, arguments, result)
        return result

    backward = staticmethod(_bias_loss_backward)


class _BiasLossUnderTransforms(torch.autograd.Function):
    """The same in the form that torch.func needs, whose every call costs 50 microseconds more."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = torch.ops.lnl_ext.bias_loss(*arguments)
        return result

    setup_context = staticmethod(_save_own_bias_loss)
    backward = staticmethod(_bias_loss_backward)


class _Gradient(torch.autograd.Function):
    """The gradient of the loss as a differentiable function of logits and upstream factor.

    Takes the arguments of `lnl_ext::bias_loss_backward`, and the gradient without upstream factor
    where the forward pass has made it already.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        *arguments_of_operator, held = arguments
        if held is not None:
            return held * arguments[0], held.new_empty(0)
        result: tuple[Tensor, Tensor] = torch.ops.lnl_ext.bias_loss_backward(*arguments_of_operator)
        return result

    setup_context = staticmethod(_save_gradient)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_gradient_backward(ctx, *vectors), None)


def logits_gradient(*arguments: Any) -> Tensor:
    """Return the logits' gradient, differentiable, of the operator's tensors and `Options`."""
    gradient: Tensor = _Gradient.apply(*arguments, True, False, None)[0]
    return gradient


torch.library.register_autograd(
    "lnl_ext::bias_loss", _bias_loss_backward, setup_context=_save_bias_loss
)
torch.library.register_autograd(
    "lnl_ext::bias_loss_backward", _gradient_backward, setup_context=_save_gradient
)


def bias_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reversal: Tensor | None,
    entropy_weight: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, which is differentiable, and its two terms, which are not.

    Parameters
    ----------
    logits
        Shape ``(N, heads * C, *S)``.
    target
        Class indices ``(N, *S)`` or ``(N, heads, *S)``, or probabilities of the logits' shape.
    weight
        Class weights ``(C,)`` or None.
    reversal, entropy_weight
        0-dim tensors or None, see `lnl_ext.fused_bias_loss`.
    options
        Everything else.

    Notes
    -----
    The gradient is made together with the value, from one read of the logits, and waits for the
    backward pass. Two cases wait for the upstream factor instead and read the logits again: a
    float16 gradient, since a mean's would underflow before a loss scaler could save it, and
    ``reduction="none"``, where there is a factor per site.
    """
    needed = logits.requires_grad and torch.is_grad_enabled()
    # The operator knows no tangents and would drop them; the autograd.Function refuses them.
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    if entropy_weight is not None and entropy_weight is reversal:
        entropy_weight = entropy_weight.clone()  # Dynamo refuses one tensor for two arguments
    transformed = torch._C._are_functorch_transforms_active()
    if not (needed or forward_mode or transformed):
        loss, cross_entropy, entropy, *_ = bias_loss_values(
            logits.detach(), target, weight, reversal, entropy_weight, None, *options, False, False
        )
        return loss, cross_entropy, entropy
    function = _BiasLossUnderTransforms if transformed else _BiasLoss
    early = logits.dtype != torch.float16 and options.reduction != REDUCTIONS["none"]
    loss, cross_entropy, entropy, *_ = function.apply(
        logits, target, weight, reversal, entropy_weight, None, *options, early, False
    )
    return loss, cross_entropy, entropy
