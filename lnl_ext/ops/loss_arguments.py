"""The arguments of a bias loss: one object from the public functions to the kernels."""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

from torch import Tensor

Coefficient: TypeAlias = float | Tensor
"""A Python number, or a 0-dim floating-point tensor on the CPU or on the logits' device."""

REDUCTIONS = ("none", "mean", "sum")
"""The names of the reductions; the operators take the place in this tuple."""
NONE, MEAN, SUM = range(3)


class LossArguments(NamedTuple):
    """The arguments of a bias loss, in the order in which the operators take them.

    The inputs that get a gradient stand apart: logits, or features, head weight and head bias.
    Coefficients are tensors, because a float in an operator's schema would make ``torch.compile``
    compile for every value.
    """

    target: Tensor
    """Class indices ``(N, *S)`` or ``(N, heads, *S)``, or probabilities of the logits' shape."""
    weight: Tensor | None = None
    """Class weights ``(C,)``."""
    denominators: Tensor | None = None
    """``(heads, 2)``: what a mean divides the sums of CE and of everything else by; None for the
    batch's own counts."""
    reversal: Tensor | None = None
    """0-dim, or None for the true gradient."""
    entropy_weight: Tensor | None = None
    """0-dim, or None for a loss without the term; likewise the next."""
    confusion_weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: int = MEAN
    """A place in `REDUCTIONS`."""
    mask_entropy: bool = False
    heads: int = 1

    @property
    def unregularised(self) -> bool | Tensor:
        """Whether CE is all that the loss is made of: a bool, or a 0-dim tensor of one."""
        return _is_zero(self.entropy_weight) & _is_zero(self.confusion_weight)

    def cross_entropy_only(self) -> LossArguments:
        """Return the arguments of the loss that is CE alone, not reversed: that of a head."""
        return self._replace(reversal=None, entropy_weight=None, confusion_weight=None)


TENSORS: Final = 6
"""How many of the arguments, the first ones, are tensors or None."""


def _is_zero(coefficient: Tensor | None) -> bool | Tensor:
    """Tell whether a term has no weight: a bool, or a 0-dim tensor of one."""
    return True if coefficient is None else coefficient == 0
