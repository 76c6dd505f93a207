"""The fused losses, for anyone's trainer."""

from __future__ import annotations

from torch import Tensor

from lnl_ext import reference
from lnl_ext.ops import bias_loss as ops
from lnl_ext.ops.checks import check_bias_loss, check_linear_bias_loss, loss_arguments
from lnl_ext.ops.linear_bias_loss import autocast, linear_bias_loss
from lnl_ext.ops.loss_arguments import Coefficient, LossArguments
from lnl_ext.ops.types import BiasLoss, bias_loss_function, linear_bias_loss_function


@bias_loss_function
def fused_bias_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    entropy_weight: Coefficient = 0.0,
    reversal: Coefficient | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    mask_entropy: bool = False,
    heads: int = 1,
    return_terms: bool = False,
) -> Tensor | BiasLoss:
    """Compute ``CE - entropy_weight * H`` of a bias head's logits, with a fused reversal layer.

    CE is the cross-entropy of the bias labels, H the entropy of the predicted probabilities; each
    is reduced on its own (Kim et al., CVPR 2019, eq. 9). One kernel makes the value and the
    gradient from one read of the logits.

    Parameters
    ----------
    logits
        Bias logits, shape ``(N, heads * C, *S)``; float32, float64, float16 or bfloat16; contiguous
        or channels_last (both without a copy).
    target
        Class indices, int64, shape ``(N, *S)``, with several heads ``(N, heads, *S)``; or class
        probabilities, shape of the logits.
    weight
        Class weights, shape ``(C,)``; shared by all heads. It gets no gradient.
    entropy_weight
        How much the entropy counts (the paper's lambda), >= 0. A number or a 0-dim tensor.
    reversal
        None: the gradient is the true one of the value. A number or 0-dim tensor r >= 0 (the
        paper's mu): a reversal layer is fused in, the gradient is
        ``-r * dCE - entropy_weight * dH`` and the value stays. Everything upstream of the logits
        gets that gradient, *the head's own parameters too*: use it where those are frozen or
        detached. To train the head and the features in one backward pass, use `BiasAdversary`.
    ignore_index
        Sites with this target add nothing to CE. With class indices only. Where they do not count
        for H either (`entropy_weight` 0, or `mask_entropy`), their logits may be NaN or infinite.
    label_smoothing
        Between 0 and 1, as in `torch.nn.functional.cross_entropy`.
    reduction
        ``"mean"``, ``"sum"`` or ``"none"``. H's mean is over all sites; CE's over the sites that
        are not ignored, or by the weights of their targets.
    mask_entropy
        Leave the ignored sites out of H as well.
    heads
        Number of independent heads side by side in dimension 1. Each is reduced on its own, the
        results are summed.
    return_terms
        Return a `BiasLoss`, with CE and H beside the loss, detached.

    Returns
    -------
    Tensor or BiasLoss
        A scalar, or ``(N, *S)`` with ``reduction="none"``; float32 (float64 for float64 logits).
        A mean over no sites is NaN, a sum 0; the gradients are zero.

    Raises
    ------
    TypeError
        An argument has the wrong type or dtype.
    ValueError
        An argument has the wrong shape or value, or requires a gradient that does not exist.
    IndexError
        A class index is neither in ``[0, C)`` nor `ignore_index` (CPU; on a CUDA device that site
        is NaN).
    RuntimeError
        Tensors are on different devices, or on a CUDA device without CUDA kernels in this build.

    Examples
    --------
    >>> logits = torch.randn(8, 5, requires_grad=True)
    >>> loss = fused_bias_loss(logits, torch.randint(5, (8,)), reversal=0.1, entropy_weight=0.01)
    >>> loss.backward()
    """
    arguments = loss_arguments(
        target,
        weight,
        reversal,
        entropy_weight,
        ignore_index,
        label_smoothing,
        reduction,
        mask_entropy,
        heads,
    )
    result = bias_loss(logits, arguments)
    return result if return_terms else result.loss


def bias_loss(logits: Tensor, arguments: LossArguments) -> BiasLoss:
    """Return the loss of arguments that nobody has checked yet, also of given denominators."""
    check_bias_loss(logits, arguments)
    compute = ops.bias_loss if ops.has_kernel(logits) else reference.bias_loss
    return BiasLoss(*compute(logits, arguments))


@linear_bias_loss_function
def fused_linear_bias_loss(
    features: Tensor,
    head_weight: Tensor,
    target: Tensor,
    head_bias: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    entropy_weight: Coefficient = 0.0,
    reversal: Coefficient | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    mask_entropy: bool = False,
    heads: int = 1,
    return_terms: bool = False,
) -> Tensor | BiasLoss:
    """Compute the bias loss of a linear head, with its matrix products and a fused reversal layer.

    The value is that of ``fused_bias_loss(linear(features, head_weight, head_bias), target, ...)``.
    The logits never exist whole: they are made, used for the value and the gradients, and
    overwritten some rows at a time.

    Parameters
    ----------
    features
        Shape ``(N, D)``; float32, float64, float16 or bfloat16.
    head_weight
        The linear layer's weight, shape ``(heads * C, D)``, in the features' dtype.
    target
        Class indices, int64, shape ``(N,)``, with several heads ``(N, heads)``; or class
        probabilities, shape ``(N, heads * C)``.
    head_bias
        The linear layer's bias, shape ``(heads * C,)``, or None.
    weight
        Class weights, shape ``(C,)``; shared by all heads. It gets no gradient.
    entropy_weight
        How much the entropy counts (the paper's lambda), >= 0. A number or a 0-dim tensor.
    reversal
        None: every input gets the true gradient of the value. A number or 0-dim tensor r >= 0 (the
        paper's mu): head_weight and head_bias get dCE only, the features
        ``-r * dCE - entropy_weight * dH`` (Kim et al., CVPR 2019, eq. 9), and the value stays. So
        one backward pass trains the head and unlearns the bias.
    ignore_index
        As in `fused_bias_loss`, like all that follow.
    label_smoothing
        Between 0 and 1.
    reduction
        ``"mean"``, ``"sum"`` or ``"none"``.
    mask_entropy
        Leave the ignored rows out of H as well.
    heads
        Number of independent heads side by side.
    return_terms
        Return a `BiasLoss`.

    Returns
    -------
    Tensor or BiasLoss
        A scalar, or ``(N,)`` with ``reduction="none"``; float32 (float64 for float64 features).

    Raises
    ------
    TypeError, ValueError, IndexError, RuntimeError
        As `fused_bias_loss`, and for features and head that do not fit together.

    Notes
    -----
    The products of float16 and bfloat16 tensors are summed, and their logits are kept, in float32.
    Under autocast features and head are cast as `torch.nn.functional.linear` casts them. Second
    derivatives are those of the value, with `reversal` those of ``CE(head) - r * CE(features) -
    entropy_weight * H(features)``, where each of the two sees the other as a constant; in a double
    backward the logits exist whole.

    Examples
    --------
    >>> features = torch.randn(8, 32, requires_grad=True)
    >>> head = torch.nn.Linear(32, 5)
    >>> bias = torch.randint(5, (8,))
    >>> loss = fused_linear_bias_loss(
    ...     features, head.weight, bias, head.bias, reversal=0.1, entropy_weight=0.01
    ... )
    >>> loss.backward()
    """
    features, head_weight, head_bias = autocast(features, head_weight, head_bias)
    arguments = loss_arguments(
        target,
        weight,
        reversal,
        entropy_weight,
        ignore_index,
        label_smoothing,
        reduction,
        mask_entropy,
        heads,
    )
    check_linear_bias_loss(features, head_weight, head_bias, arguments)
    compute = linear_bias_loss if ops.has_kernel(features) else reference.linear_bias_loss
    result = compute(features, head_weight, head_bias, arguments)
    return BiasLoss(*result) if return_terms else result[0]
