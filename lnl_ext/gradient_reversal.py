"""The gradient reversal layer, as a function and as a module."""

from __future__ import annotations

from torch import Tensor

from lnl_ext.coefficients import ScheduledCoefficients
from lnl_ext.ops.checks import check_coefficient, check_has_shape
from lnl_ext.ops.loss_arguments import Coefficient
from lnl_ext.ops.scale_gradient import scale_gradient
from lnl_ext.schedules import Schedule


def grad_reverse(x: Tensor, scale: Coefficient = 1.0) -> Tensor:
    """Return `x`, and multiply its gradient by ``-scale``.

    The gradient reversal layer of Ganin and Lempitsky (2015, arXiv 1409.7495). Put before a bias
    head it makes everything upstream worse at what the head gets better at. It reverses *all* of
    the loss behind it: with an entropy term in that loss, the features would be made certain
    instead of uncertain. Use `lnl_ext.BiasAdversary` there.

    Parameters
    ----------
    x
        Any floating-point tensor.
    scale
        A finite number >= 0, or a 0-dim floating-point tensor, whose value is not checked.

    Returns
    -------
    Tensor
        A copy of `x`, which a layer that works in place may follow. Second derivatives,
        ``torch.compile`` and ``torch.func`` are supported, forward mode (jvp, hessian) is not.

    Raises
    ------
    TypeError, ValueError
        `x` is not a floating-point tensor or nested and not jagged, or `scale` is negative, not
        finite, not 0-dim or requires grad.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"x has dtype {x.dtype}, which has no gradient to reverse")
    check_has_shape("x", x)
    check_coefficient("scale", scale, x.device)
    # A copy: autograd refuses to write into a view that a Function made, and what is written must
    # not reach those who use x itself.
    return scale_gradient(x, -scale).clone()


class GradientReversal(ScheduledCoefficients):
    """The gradient reversal layer as a module: `grad_reverse` with a scale that may be scheduled.

    Parameters
    ----------
    scale
        A finite number >= 0, a 0-dim tensor, a schedule or its name (`lnl_ext.schedules`). It is
        kept in the persistent buffer ``scale``; a schedule is evaluated by ``set_progress``.

    Examples
    --------
    >>> head = nn.Sequential(GradientReversal("ramp"), nn.Linear(512, 12))
    >>> head[0].set_progress(0.5)
    """

    scale: Tensor

    def __init__(self, scale: Coefficient | Schedule | str = 1.0) -> None:
        super().__init__()
        self.register_coefficient("scale", scale, full=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, and multiply its gradient by ``-scale``."""
        # The module's buffer may be written before the backward; grad_reverse keeps -scale, a copy.
        return grad_reverse(x, self.scale)
