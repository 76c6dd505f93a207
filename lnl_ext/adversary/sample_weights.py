"""Factors of the samples in a bias head's loss, and those that make bias and label independent."""

from __future__ import annotations

from torch import Tensor

from lnl_ext.adversary.logit_adjustment import label_given_bias
from lnl_ext.ops.types import BiasLoss

__all__ = ["check_sample_weight", "independence_weights", "weigh_samples"]


def independence_weights(labels: Tensor, bias: Tensor, *, maximum: float = 10.0) -> Tensor:
    """Weights under which the bias of a training set tells nothing about its labels.

    ``p(label) / p(label | bias)``, so that a pair of label and bias weighs as much in all as it
    would if both were drawn independently. ``p(label | bias)`` follows by Bayes' rule from
    counts, the bias columns taken as independent given the label.

    For the `sample_weight` of a `BiasAdversary`. Where the bias gives the label away, features
    that tell the label tell the bias, and a head that sees all samples alike presses on the label,
    too. Under these weights it does not. Where a label never occurs with a bias there is nothing to
    weigh: weights help as far as the training set has exceptions.

    Parameters
    ----------
    labels
        ``(N,)`` int64, classes from 0.
    bias
        ``(N,)`` or ``(N, K)`` integers from 0: the classes of one or of K biases.
    maximum
        Larger weights are cut to it: a few rare samples would be most of the gradient, else.

    Returns
    -------
    Tensor
        ``(N,)`` float32, > 0. Without the cut their mean is 1, with it it is less.

    Raises
    ------
    TypeError, ValueError
        Not integers, a negative class, the wrong shape, or `maximum` not above 0.
    """
    if not maximum > 0:
        raise ValueError(f"maximum is {maximum}, expected a number above 0")
    log_label, log_given_bias = label_given_bias(labels, bias)
    labels = labels.long()
    own = log_given_bias.gather(1, labels[:, None]).squeeze(1)
    return (log_label[labels] - own).exp().clamp(max=maximum)


def check_sample_weight(
    weight: Tensor, samples: int, reduction: str, denominators: Tensor | None
) -> None:
    """Raise unless `weight` is one floating-point number a sample, and there is a sum or nothing.

    A mean over weighted samples could be over their number or over their weights.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        given = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"sample_weight: expected a floating-point Tensor, got {given}")
    if weight.shape != (samples,):
        raise ValueError(f"sample_weight has shape {tuple(weight.shape)}, expected ({samples},)")
    if reduction == "mean" or denominators is not None:
        raise ValueError(
            'sample_weight needs reduction "sum" or "none" and no denominators: divide the weights '
            "by what the mean is to be over"
        )


def weigh_samples(sites: BiasLoss, weight: Tensor, reduction: str) -> BiasLoss:
    """Multiply the values of every site, ``(N, *S)``, by its sample's weight; sum if asked to."""
    factor = weight.detach().to(sites.loss).reshape(-1, *(1,) * (sites.loss.dim() - 1))
    weighed = BiasLoss(*(term * factor for term in sites))
    return weighed if reduction == "none" else BiasLoss(*(term.sum() for term in weighed))
