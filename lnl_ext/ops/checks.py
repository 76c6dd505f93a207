"""Argument checks that the fused losses, their reference and the adversary share.

They read shapes, dtypes, devices and Python numbers only: no tensor's data, so that they neither
synchronise with a device nor break a ``torch.compile`` graph.
"""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from lnl_ext.ops.loss_arguments import REDUCTIONS, Coefficient, LossArguments

if TYPE_CHECKING:
    from collections.abc import Sequence

_CPU = torch.device("cpu")
_INT64 = 2**63
LOGITS_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which logits of `dtype` are summed: the dtype of the loss."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_number(name: str, value: float, *, positive: bool = False) -> None:
    """Refuse a `value` that is not a finite number >= 0, or > 0 if it is to be `positive`."""
    if not _is_number(value):
        raise TypeError(f"{name} is {value!r}, expected a number")
    # A comparison that is also false for NaN; math.isfinite would make torch.compile specialise
    # on the value.
    if not 0.0 <= value < math.inf or (positive and value == 0.0):
        bound = "> 0" if positive else ">= 0"
        raise ValueError(f"{name} is {value}, expected a finite number {bound}")


def check_coefficient(name: str, value: Coefficient, device: torch.device) -> None:
    """Refuse a coefficient that no loss can use.

    Parameters
    ----------
    name
        The argument's name, for the message.
    value
        A number, which must be finite and >= 0, or a 0-dim floating-point tensor, whose value is
        not read.
    device
        The logits' device. A tensor must be there or on the CPU.
    """
    if isinstance(value, Tensor):
        _check_coefficient_tensor(name, value)
        _check_coefficient_device(name, value, device)
    else:
        check_number(name, value)


def _check_coefficient_tensor(name: str, value: Tensor) -> None:
    if value.dim() != 0:
        raise ValueError(f"{name} has shape {_shape(value)}, expected a 0-dim tensor or a number")
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}, expected a floating-point tensor")
    if value.requires_grad:
        raise ValueError(f"{name} requires grad, but the loss has no gradient for it: detach it")


def _check_coefficient_device(name: str, value: Tensor, device: torch.device) -> None:
    if not value.is_cpu and value.device != device:
        raise RuntimeError(f"{name} is on {value.device}, expected {device} (the logits') or cpu")


def check_logits(logits: Tensor, heads: int, name: str = "logits") -> None:
    """Refuse anything but floating-point logits of shape ``(N, heads * C, *S)``.

    Parameters
    ----------
    logits
        The logits, shape ``(N, heads * C, *S)``.
    heads
        Number of independent heads side by side in dimension 1.
    name
        What to call the logits in a message.
    """
    _check_dense(name, logits)
    if logits.dim() < 2:
        raise ValueError(f"{name} has shape {_shape(logits)}, expected (N, C) or (N, C, *S)")
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"heads is {heads!r}, expected an int")
    if heads < 1:
        raise ValueError(f"heads is {heads}, expected at least 1")
    channels = logits.shape[1]
    if channels == 0:
        raise ValueError(f"{name} has shape {_shape(logits)}, which has no classes (dimension 1)")
    if channels % heads != 0:
        raise ValueError(
            f"heads is {heads}, which does not divide the {channels} channels of {name} "
            f"of shape {_shape(logits)}"
        )


def check_target(
    target: Tensor, logits: Tensor, heads: int, ignore_index: int, name: str = "logits"
) -> None:
    """Refuse a target that does not belong to `logits`.

    Parameters
    ----------
    target
        Class indices, int64, shape ``(N, *S)`` (``(N, heads, *S)`` for several heads); or
        probabilities, floating point, of the logits' shape.
    logits
        Logits that `check_logits` has accepted.
    heads
        Number of heads.
    ignore_index
        The class that is left out; must be negative with probabilities.
    name
        What to call the logits in a message.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a Tensor, got {type(target).__name__}")
    _check_not_nested("target", target)
    if target.device != logits.device:
        raise RuntimeError(f"target is on {target.device}, expected {logits.device} as {name}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index is {ignore_index!r}, expected an int")
    if not -_INT64 <= ignore_index < _INT64:
        raise ValueError(f"ignore_index is {ignore_index}, expected an int of 64 bits")
    if target.is_floating_point():
        _check_probabilities(target, logits, heads, ignore_index, name)
        return
    if target.dtype != torch.int64:
        raise TypeError(
            f"target has dtype {target.dtype}, "
            "expected torch.int64 class indices or floating-point probabilities"
        )
    sites = _sites(logits, heads)
    if tuple(target.shape) != sites:
        raise ValueError(
            f"target has shape {_shape(target)}, expected {_text(sites)} for {name} "
            f"of shape {_shape(logits)}" + (f" and heads={heads}" if heads > 1 else "")
        )


def _check_probabilities(
    target: Tensor, logits: Tensor, heads: int, ignore_index: int, name: str
) -> None:
    if target.shape != logits.shape:
        sites = _sites(logits, heads)
        # A float tensor of the class indices' shape is meant as indices, so say what is wrong
        # with those.
        if tuple(target.shape) == sites:
            raise TypeError(
                f"target of class indices has dtype {target.dtype}, expected torch.int64"
            )
        raise ValueError(
            f"target has shape {_shape(target)}, expected probabilities of shape "
            f"{_shape(logits)} as {name}, or int64 class indices of shape {_text(sites)}"
        )
    if target.dtype not in LOGITS_DTYPES:
        raise TypeError(
            f"target of probabilities has dtype {target.dtype}, "
            "expected float32, float64, float16 or bfloat16"
        )
    if ignore_index >= 0:
        raise ValueError(
            f"ignore_index is {ignore_index}, but a target of probabilities cannot be ignored: "
            "leave it negative"
        )
    if target.requires_grad:
        raise ValueError("target requires grad, but the loss has no gradient for it: detach it")


def _sites(logits: Tensor, heads: int) -> tuple[int, ...]:
    """Return the shape of class indices."""
    samples, _, *positions = logits.shape
    return (samples, *positions) if heads == 1 else (samples, heads, *positions)


def check_weight(weight: Tensor | None, logits: Tensor, heads: int) -> None:
    """Refuse class weights that do not belong to `logits`.

    Parameters
    ----------
    weight
        Class weights, shape ``(C,)``, shared by all heads, in the logits' dtype or the one that
        they are summed in.
    logits
        Logits that `check_logits` has accepted.
    heads
        Number of heads.
    """
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a Tensor or None, got {type(weight).__name__}")
    _check_not_nested("weight", weight)
    classes = logits.shape[1] // heads
    if weight.dim() != 1 or weight.shape[0] != classes:
        raise ValueError(
            f"weight has shape {_shape(weight)}, expected ({classes},): one weight per class"
        )
    accumulate = accumulation_dtype(logits.dtype)
    if weight.dtype not in (logits.dtype, accumulate):
        raise TypeError(
            f"weight has dtype {weight.dtype}, expected {accumulate} for logits of {logits.dtype}"
        )
    if weight.device != logits.device:
        raise RuntimeError(f"weight is on {weight.device}, expected {logits.device} as the logits")
    if weight.requires_grad:
        raise ValueError("weight requires grad, but the loss has no gradient for it: detach it")


def check_denominators(denominators: Tensor, heads: int, reduction: str) -> None:
    """Raise unless `denominators` has shape ``(heads, 2)`` and there is a reduction."""
    if not isinstance(denominators, Tensor):
        raise TypeError(f"denominators: expected a Tensor, got {type(denominators).__name__}")
    if denominators.shape != (heads, 2):
        raise ValueError(
            f"denominators has shape {tuple(denominators.shape)}, expected ({heads}, 2)"
        )
    if reduction == "none":
        raise ValueError('denominators: there is nothing to divide with reduction="none"')


def check_options(label_smoothing: float, reduction: str) -> None:
    """Refuse a `label_smoothing` outside [0, 1] and an unknown `reduction`."""
    _check_label_smoothing(label_smoothing)
    reduction_number(reduction)


def reduction_number(reduction: str) -> int:
    """Return the reduction's place in `REDUCTIONS`, or refuse an unknown one."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, expected 'none', 'mean' or 'sum'")
    return REDUCTIONS.index(reduction)


def loss_arguments(
    target: Tensor,
    weight: Tensor | None,
    reversal: Coefficient | None,
    entropy_weight: Coefficient,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    mask_entropy: bool,
    heads: int,
) -> LossArguments:
    """Return the arguments of a public function as one object, an `entropy_weight` of 0 as None.

    Raises
    ------
    TypeError, ValueError
        A coefficient is neither a finite number >= 0 nor a 0-dim floating-point tensor without
        gradient, or the reduction is unknown. The rest is left to `check_bias_loss`, which knows
        the logits.
    """
    # A term that is not wanted is left out: 0 times the NaN of no sites would be NaN.
    absent = _is_number(entropy_weight) and entropy_weight == 0
    return LossArguments(
        target,
        weight,
        None,
        None if reversal is None else _as_tensor("reversal", reversal),
        None if absent else _as_tensor("entropy_weight", entropy_weight),
        None,
        ignore_index,
        label_smoothing,
        reduction_number(reduction),
        mask_entropy,
        heads,
    )


def _as_tensor(name: str, value: Coefficient) -> Tensor:
    if isinstance(value, Tensor):
        _check_coefficient_tensor(name, value)
        return value
    check_number(name, value)
    if torch.compiler.is_compiling():
        # A sum keeps the number an input of the graph; torch.full would compile for every value.
        return torch.zeros((), dtype=torch.float64, device=_CPU) + value
    return torch.full((), value, dtype=torch.float64, device=_CPU)


def check_bias_loss(logits: Tensor, arguments: LossArguments) -> None:
    """Check what `lnl_ext.fused_bias_loss` is given.

    The one thing left to the kernels is whether the class indices are in range, which needs the
    data.

    Raises
    ------
    TypeError
        An argument has the wrong type or dtype.
    ValueError
        An argument has the wrong shape or value, or requires a gradient that does not exist.
    RuntimeError
        Tensors are on different devices.
    """
    check_logits(logits, arguments.heads)
    check_target(arguments.target, logits, arguments.heads, arguments.ignore_index)
    check_weight(arguments.weight, logits, arguments.heads)
    _check_label_smoothing(arguments.label_smoothing)
    if arguments.entropy_weight is not None:
        _check_coefficient_device("entropy_weight", arguments.entropy_weight, logits.device)
    if arguments.reversal is not None:
        _check_coefficient_device("reversal", arguments.reversal, logits.device)


def check_linear_bias_loss(
    features: Tensor, head_weight: Tensor, head_bias: Tensor | None, arguments: LossArguments
) -> None:
    """Check what `lnl_ext.fused_linear_bias_loss` is given.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `check_bias_loss`, and for features and head that do not fit together.
    """
    _check_dense("features", features)
    if features.dim() != 2:
        raise ValueError(f"features has shape {_shape(features)}, expected (N, D)")
    _check_head("head_weight", head_weight, features)
    if head_weight.dim() != 2 or head_weight.shape[1] != features.shape[1]:
        raise ValueError(
            f"head_weight has shape {_shape(head_weight)}, expected "
            f"(heads * C, {features.shape[1]}) for features of shape {_shape(features)}"
        )
    if head_bias is not None:
        _check_head("head_bias", head_bias, features)
        if head_bias.dim() != 1 or head_bias.shape[0] != head_weight.shape[0]:
            raise ValueError(
                f"head_bias has shape {_shape(head_bias)}, expected ({head_weight.shape[0]},) "
                f"for head_weight of shape {_shape(head_weight)}"
            )
    check_bias_loss(logits_stand_in(features, head_weight), arguments)


def logits_stand_in(features: Tensor, head_weight: Tensor) -> Tensor:
    """Return a tensor of the logits' shape, dtype and device that holds a single element."""
    return features.new_empty(()).expand(features.shape[0], head_weight.shape[0])


def _is_number(value: object) -> TypeGuard[float]:
    # Asking an abstract class takes ten times as long, and there is a float in nearly every call.
    return type(value) is float or (isinstance(value, numbers.Real) and not isinstance(value, bool))


def _check_label_smoothing(label_smoothing: float) -> None:
    if not _is_number(label_smoothing):
        raise TypeError(f"label_smoothing is {label_smoothing!r}, expected a number")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected a number in [0, 1]")


def _check_dense(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    _check_not_nested(name, value)
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}, expected a dense tensor")
    if value.dtype not in LOGITS_DTYPES:
        raise TypeError(
            f"{name} has dtype {value.dtype}, expected float32, float64, float16 or bfloat16"
        )


def check_has_shape(name: str, value: Tensor) -> None:
    """Refuse a nested tensor of the older kind, which has no shape; one that is jagged has."""
    if value.is_nested and value.layout == torch.strided:
        raise TypeError(
            f"{name} is a nested tensor of layout torch.strided, expected torch.jagged or a dense "
            "tensor"
        )


def _check_not_nested(name: str, value: Tensor) -> None:
    if value.is_nested:
        raise TypeError(f"{name} is a nested tensor, expected a dense tensor")


def _check_head(name: str, value: Tensor, features: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    _check_not_nested(name, value)
    if value.dtype != features.dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, expected {features.dtype} as features")
    if value.device != features.device:
        raise RuntimeError(f"{name} is on {value.device}, expected {features.device} as features")


def _shape(tensor: Tensor) -> str:
    return _text(tensor.shape)


def _text(shape: Sequence[int]) -> str:
    return str(tuple(shape))
