"""The types that the losses share: their result, and how they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypedDict, overload

from torch import Tensor

from lnl_ext.ops.loss_arguments import Coefficient

if TYPE_CHECKING:
    from typing_extensions import Unpack

IGNORE_INDEX = -100
"""The target that the losses leave out by default, as `torch.nn.functional.cross_entropy` does."""


class BiasLoss(NamedTuple):
    """A bias loss with the two terms it is made of.

    Every field is a scalar, or has shape ``(N, *S)`` with ``reduction="none"``. The dtype is
    float32, or float64 for float64 logits.
    """

    loss: Tensor
    """The value to call ``backward`` on."""
    cross_entropy: Tensor
    """The cross-entropy of the bias head, detached: for logging."""
    entropy: Tensor
    """The entropy of the bias head's predictions, detached: for logging."""


class LossOptions(TypedDict, total=False):
    """The keywords of both losses, but for `return_terms`."""

    entropy_weight: Coefficient
    reversal: Coefficient | None
    ignore_index: int
    label_smoothing: float
    reduction: str
    mask_entropy: bool
    heads: int


class BiasLossFunction(Protocol):
    """What a type checker is to know of `fused_bias_loss`: `return_terms` decides the result."""

    @overload
    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = ...,
        *,
        return_terms: Literal[False] = ...,
        **options: Unpack[LossOptions],
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = ...,
        *,
        return_terms: Literal[True],
        **options: Unpack[LossOptions],
    ) -> BiasLoss: ...


class LinearBiasLossFunction(Protocol):
    """The same of `fused_linear_bias_loss`."""

    @overload
    def __call__(
        self,
        features: Tensor,
        head_weight: Tensor,
        target: Tensor,
        head_bias: Tensor | None = ...,
        weight: Tensor | None = ...,
        *,
        return_terms: Literal[False] = ...,
        **options: Unpack[LossOptions],
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        features: Tensor,
        head_weight: Tensor,
        target: Tensor,
        head_bias: Tensor | None = ...,
        weight: Tensor | None = ...,
        *,
        return_terms: Literal[True],
        **options: Unpack[LossOptions],
    ) -> BiasLoss: ...


def bias_loss_function(function: Callable[..., Any]) -> BiasLossFunction:
    """Return the function itself."""
    return function


def linear_bias_loss_function(function: Callable[..., Any]) -> LinearBiasLossFunction:
    """Return the function itself."""
    return function
