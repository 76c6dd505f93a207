"""What a bias says about the label, removed from the label loss or from the head's."""

from __future__ import annotations

import torch
from torch import Tensor

from lnl_ext.ops.types import BiasLoss

__all__ = [
    "check_sample_weight",
    "independence_weights",
    "label_given_bias",
    "logit_adjustment",
    "weigh_samples",
]

_PRIOR_SAMPLES = 10.0
"""Samples that are added to every value of a bias, with the labels' own shares.

Without them a rare value would determine the label of each of its few samples.
"""


def logit_adjustment(
    labels: Tensor,
    bias: Tensor,
    *,
    classes: int | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
) -> Tensor:
    """Return what the bias says about the label, to be added to the logits in the training loss.

    ``log p(label | bias) - log p(label)``. The minimum of ``F.cross_entropy(logits + adjustment,
    labels)`` is where ``softmax(logits + adjustment)`` is ``p(label | image, bias)``: what the bias
    alone says about the label is in the adjustment, and the network gains nothing from the bias.
    In prediction the logits are used without it: they are those for data with the
    same shares of labels in which the bias is independent of them. The bias-balanced loss of
    Hong and Yang (NeurIPS 2021), the logit adjustment of Menon et al. (ICLR 2021) by bias, but
    for the shares of the labels, which are left as they are.

    The loss no longer gains from the bias, as far as the training set has exceptions to learn
    from. The bias stays in the features; a `BiasAdversary` removes it from there. Where the
    bias determines every label there are no exceptions, and nothing is left to learn. With label
    smoothing the loss has its minimum elsewhere, at features that predict the opposite of the bias.

    Parameters
    ----------
    labels
        ``(N,)`` int64, classes from 0: those of the training set.
    bias
        ``(N,)`` or ``(N, K)`` integers from 0: the classes of one bias, or of K that are
        independent given the label. For others the adjustment would be too large: give one column
        with a class for every combination.
    classes
        C, the number of classes; by default the largest label plus 1.
    ignore_index
        In `bias`: not known, and taken to say nothing.
    weights
        ``(N,)``: how often each sample is drawn, relative to the others, where a sampler has
        weights. Then p(label | bias) is that of what is drawn, and p(label) that of what comes, so
        that predictions are for labels as they come, too.

    Returns
    -------
    Tensor
        ``(N, C)`` float32. 0 for a class that no sample has.

    Raises
    ------
    TypeError, ValueError
        Not integers, a negative class, the wrong shape, or fewer `classes` than the labels have.

    Examples
    --------
    >>> adjustment = lnl_ext.logit_adjustment(labels, bias)  # once, for the whole training set
    >>> loss = F.cross_entropy(classifier(hidden) + adjustment[rows], labels[rows])
    """
    log_label, log_given_bias = label_given_bias(
        labels, bias, classes=classes, ignore_index=ignore_index, weights=weights
    )
    if weights is not None:  # the labels' shares stay those that come
        count = torch.bincount(labels.long(), minlength=len(log_label))
        log_label = (count / len(labels)).log()
    adjustment = log_given_bias - log_label
    return adjustment.masked_fill_(log_label.isneginf(), 0.0)


def independence_weights(
    labels: Tensor,
    bias: Tensor,
    *,
    maximum: float = 10.0,
    ignore_index: int = -100,
    weights: Tensor | None = None,
) -> Tensor:
    """Weights under which the bias and the labels of a training set are independent.

    ``p(label) / p(label | bias)``, so that a pair of label and bias weighs as much in all as it
    would if both were drawn independently. ``p(label | bias)`` follows by Bayes' rule from
    counts, the bias columns taken as independent given the label. To the counts of every bias value
    ten samples with the labels' shares are added: pairs of a few samples weigh less.

    For the `sample_weight` of a `BiasAdversary`. Where the bias determines the label,
    features of the label predict the bias, and unlearning the bias without weights unlearns the
    label, too. Where a label never occurs with a bias there is nothing to
    weigh: weights help as far as the training set has exceptions.

    Parameters
    ----------
    labels
        ``(N,)`` int64, classes from 0.
    bias
        ``(N,)`` or ``(N, K)`` integers from 0: the classes of one or of K biases.
    maximum
        Larger weights are cut to it: a few rare samples would be most of the gradient, else.
    ignore_index
        As for `logit_adjustment`.
    weights
        Likewise; all shares are those of what is drawn. A sample of which no bias is known has
        weight 1.

    Returns
    -------
    Tensor
        ``(N,)`` float32, > 0. Their mean is about 1; less with the cut, with few samples, and with
        several columns.

    Raises
    ------
    TypeError, ValueError
        Not integers, a negative class, the wrong shape, or `maximum` not above 0.
    """
    if not maximum > 0:
        raise ValueError(f"maximum is {maximum}, expected a number above 0")
    log_label, log_given_bias = label_given_bias(
        labels, bias, ignore_index=ignore_index, weights=weights
    )
    labels = labels.long()
    own = log_given_bias.gather(1, labels[:, None]).squeeze(1)
    return (log_label[labels] - own).exp().clamp(max=maximum)


def label_given_bias(
    labels: Tensor,
    bias: Tensor,
    *,
    classes: int | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``log p(label)``, ``(C,)``, and ``log p(label | bias)``, ``(N, C)``, both float32.

    From counts; of several bias columns by Bayes' rule, as if they were independent given the
    label. Arguments and errors are those of `logit_adjustment`.
    """
    columns = bias[:, None] if bias.dim() == 1 else bias
    for name, given in (("labels", labels), ("bias", columns)):
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {given.dtype}, expected integers")
    if labels.dim() != 1 or columns.dim() != 2 or len(columns) != len(labels):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and bias {tuple(bias.shape)}, expected (N,) "
            "and (N,) or (N, K)"
        )
    if not len(labels):
        none = torch.empty(0, classes or 0, device=labels.device)
        return torch.full((none.shape[1],), -torch.inf, device=labels.device), none
    labels, columns = labels.long(), columns.long()
    known = columns != ignore_index
    if int(labels.min()) < 0 or bool((columns[known] < 0).any()):
        raise ValueError("labels and bias must be classes from 0: leave out samples without one")
    if classes is not None and int(labels.max()) >= classes:
        raise ValueError(f"labels has class {int(labels.max())}, expected less than {classes}")
    drawn = torch.ones(len(labels), dtype=torch.float64, device=labels.device)
    if weights is not None:
        if weights.shape != labels.shape or bool((weights < 0).any()):
            raise ValueError(f"weights: expected ({len(labels)},) numbers of at least 0")
        drawn = weights.double() / weights.double().mean()
    count = torch.bincount(labels, drawn, minlength=classes or 0)
    share = count / len(labels)
    log_share = share.log().float()
    given_bias = log_share.repeat(len(labels), 1)
    for column, is_known in zip(columns.unbind(1), known.unbind(1), strict=True):
        rows = is_known.nonzero().squeeze(1)
        values, column = torch.unique(column[rows], return_inverse=True)
        pairs = torch.bincount(
            column * len(count) + labels[rows], drawn[rows], minlength=len(values) * len(count)
        )
        pairs = pairs.view(len(values), len(count)) + _PRIOR_SAMPLES * share
        told = (pairs / pairs.sum(1, keepdim=True) / share).log().nan_to_num(nan=0.0)
        given_bias.index_add_(0, rows, told.float()[column])
    return log_share, given_bias.log_softmax(1)


def check_sample_weight(weight: Tensor, samples: int, denominators: Tensor | None) -> None:
    """Raise unless `weight` is one floating-point number a sample, and nothing else divides."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        given = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"sample_weight: expected a floating-point Tensor, got {given}")
    if weight.shape != (samples,):
        raise ValueError(f"sample_weight has shape {tuple(weight.shape)}, expected ({samples},)")
    if denominators is not None:
        raise ValueError(
            "sample_weight and denominators exclude each other: divide the weights by what the "
            "mean is to be over"
        )


def weigh_samples(sites: BiasLoss, weight: Tensor, reduction: str) -> BiasLoss:
    """Multiply the values of every site, ``(N, *S)``, by its sample's weight, and reduce them."""
    factor = weight.detach().to(sites.loss).reshape(-1, *(1,) * (sites.loss.dim() - 1))
    weighed = BiasLoss(*(term * factor for term in sites))
    if reduction == "none":
        return weighed
    return BiasLoss(*(term.sum() if reduction == "sum" else term.mean() for term in weighed))
