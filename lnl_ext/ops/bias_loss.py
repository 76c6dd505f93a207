"""The bias loss of given logits: its fake kernels, its derivatives, the devices with kernels.

The schemas are in csrc/schemas.cpp.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from lnl_ext.build import build_info  # which loads the operators
from lnl_ext.ops.autograd import DifferentiableLoss, Gradients, Inputs
from lnl_ext.ops.checks import accumulation_dtype
from lnl_ext.ops.loss_arguments import NONE, LossArguments
from lnl_ext.ops.second_derivative import vector_products


def has_kernel(logits: Tensor) -> bool:
    """Tell whether the operators have a kernel for the logits' device.

    Other devices than CPU and CUDA take the plain path, which is said once.

    Raises
    ------
    RuntimeError
        The logits are on a CUDA device and this build has no CUDA kernels.
    """
    if logits.is_cpu:
        return True
    kind = logits.device.type
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


def empty_values(like: Tensor, arguments: LossArguments) -> tuple[Tensor, ...]:
    """Return what a fake kernel returns before the gradients: values and denominators."""
    dtype = accumulation_dtype(like.dtype)
    shape = (like.shape[0], *like.shape[2:]) if arguments.reduction == NONE else ()
    values = [like.new_empty(shape, dtype=dtype) for _ in range(3)]
    return (*values, like.new_empty((arguments.heads, 2), dtype=dtype))


def _gradient_like(logits: Tensor, wanted: bool) -> Tensor:
    if not wanted:
        return logits.new_empty(0)
    if logits.is_contiguous() or not logits.movedim(1, -1).is_contiguous():
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    return torch.empty_like(logits)


def _fake(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, logits_gradient, head_gradient = rest
    return (
        *empty_values(logits, LossArguments(*arguments)),
        _gradient_like(logits, logits_gradient),
        _gradient_like(logits, head_gradient),
    )


def _backward_fake(grad_loss: Tensor, logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _gradient_like(logits, rest[-2]), _gradient_like(logits, rest[-1])


def _scale_gradient_fake(gradient: Tensor, factor: Tensor) -> None:
    return None


def _products(
    vectors: Gradients,
    grad_loss: Tensor,
    inputs: Inputs,
    arguments: LossArguments,
) -> Gradients:
    """Add the products of the logits' gradient and, of the operator only, of the head's."""
    (logits,) = inputs
    losses = (arguments, arguments.cross_entropy_only())
    products = [
        vector_products(vector, grad_loss, logits, loss)
        for vector, loss in zip(vectors, losses, strict=False)
        if vector is not None
    ]
    return [functools.reduce(torch.add, terms) for terms in zip(*products, strict=True)]


torch.library.register_fake("lnl_ext::bias_loss", _fake)
torch.library.register_fake("lnl_ext::bias_loss_backward", _backward_fake)
torch.library.register_fake("lnl_ext::scale_gradient_", _scale_gradient_fake)

bias_loss = DifferentiableLoss("bias_loss", 1, _products)
"""Takes the logits, ``(N, heads * C, *S)``, and `LossArguments`."""


def logits_gradient(grad_loss: Tensor, logits: Tensor, arguments: LossArguments) -> Tensor:
    """Return the differentiable gradient of the loss by the logits."""
    (gradient,) = bias_loss.gradients(grad_loss, (logits,), arguments, (True,), (None,))
    assert gradient is not None
    return gradient
