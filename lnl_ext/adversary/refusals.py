"""What the adversary refuses beside what no loss can use: losses that train nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["check_classes", "check_probabilities", "misfit"]

_TOLERANCE = 1e-3
_Shape = tuple[int, ...]


def check_classes(logits: Tensor, heads: int, name: str, instead: str) -> None:
    """Refuse logits of one class, whose cross-entropy and gradient are 0 for any target.

    Parameters
    ----------
    logits
        Shape ``(N, heads * C, *S)``.
    heads
        Number of heads.
    name
        What to call the logits in the message.
    instead
        What to do.

    Raises
    ------
    ValueError
    """
    if logits.dim() > 1 and logits.shape[1] == heads:
        raise ValueError(
            f"{name} has shape {tuple(logits.shape)}, a single class"
            + (f" for each of {heads} heads" if heads > 1 else "")
            + f": its cross-entropy is 0 for any target. {instead}"
        )


def check_probabilities(target: Tensor, heads: int) -> None:
    """Refuse a target whose values are no probabilities. On the CPU only, where reading is cheap.

    Parameters
    ----------
    target
        Shape ``(N, heads * C, *S)``.
    heads
        Number of heads.

    Raises
    ------
    ValueError
        A value is below 0, or those of a site do not sum to 1 within 1e-3 (in bfloat16 within its
        rounding, 2^-7).
    """
    # Fake tensors, which have no data, are a type of their own.
    if torch.compiler.is_compiling() or type(target) is not Tensor or not target.is_cpu:
        return
    if target.numel() == 0:
        return
    low = target.amin().item()
    if not low >= 0:  # NaN neither
        raise ValueError(f"target of probabilities has the value {low:g}, expected none below 0")
    dtype = torch.float64 if target.dtype == torch.float64 else torch.float32
    sums = target.reshape(len(target), heads, -1, *target.shape[2:]).sum(2, dtype=dtype)
    bounds = [bound.item() for bound in sums.aminmax()]
    allowed = max(_TOLERANCE, torch.finfo(target.dtype).eps)
    for total in bounds:
        if not abs(total - 1) <= allowed:
            raise ValueError(
                f"target of probabilities sums to {total:g} at a site, expected 1 within "
                f"{allowed:.2g}"
            )


def misfit(modules: Iterable[nn.Module], features: Tensor) -> str:
    """Say which layer of a head does not take the features, as far as shapes tell.

    Parameters
    ----------
    modules
        The head's, in the order in which they run.
    features
        What the head is given.

    Returns
    -------
    str
        Nothing, where the first layer with a weight takes them or is not one of torch's linear,
        convolution or normalisation layers, and where a module of several layers comes before it.
    """
    reaching = torch.empty(features.shape, device="meta")
    for module in modules:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) or isinstance(module, _NormBase):
            if _takes(module, tuple(reaching.shape)):
                return ""
            changed = reaching.shape != features.shape
            has = f" with a weight of shape {tuple(weight.shape)}" if weight is not None else ""
            return (
                f"features have shape {tuple(features.shape)}"
                + (f", which reach the layer as {tuple(reaching.shape)}" if changed else "")
                + f", but the head's first layer is {module}{has}"
            )
        if not type(module).__module__.startswith("torch.nn.modules.") or module._modules:
            return ""
        try:
            reaching = module.forward(reaching)  # without hooks, whose errors are their own
        except (RuntimeError, ValueError, IndexError):  # too few dimensions to pool or flatten
            return f"features have shape {tuple(features.shape)}, which {module} does not take"
    return ""


def _takes(module: nn.Module, shape: _Shape) -> bool:
    """Whether a layer takes an input of this shape; True for kinds that are not known."""
    if isinstance(module, nn.Linear):
        return len(shape) > 0 and shape[-1] == module.in_features
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return len(shape) == 2 + len(module.kernel_size) and shape[1] == module.in_channels
    if isinstance(module, _NormBase):
        return len(shape) > 1 and shape[1] == module.num_features
    return True
