"""What the bias tells about the label, for a label loss that need not be told by the features."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["log_label_given_bias", "logit_adjustment"]


def logit_adjustment(
    labels: Tensor, bias: Tensor, *, classes: int | None = None, ignore_index: int = -100
) -> Tensor:
    """Logits of every label given the bias, to be added to a network's in its training loss.

    ``F.cross_entropy(logits + adjustment, labels)`` has its minimum where ``softmax(logits +
    adjustment)`` is ``p(label | image, bias)``: what the bias alone tells of the label is in the
    adjustment, and the network has nothing to gain from telling it as well. In prediction the
    logits are used as they are. The bias-balanced loss of Hong and Yang (NeurIPS 2021), which is
    the logit adjustment of Menon et al. (ICLR 2021) by bias.

    It takes away the reason to use the bias, as far as the training set has exceptions to learn
    from, and leaves the bias in the features; a `BiasAdversary` removes it from there. Where the
    bias gives every label away there are no exceptions, and nothing is left to learn.

    Parameters
    ----------
    labels
        ``(N,)`` int64, classes from 0: those of the training set.
    bias
        ``(N,)`` or ``(N, K)`` integers from 0: the classes of one or of K biases.
    classes
        C, the number of classes; by default the largest label plus 1.
    ignore_index
        In `bias`: not known, which tells nothing.

    Returns
    -------
    Tensor
        ``(N, C)`` float32: ``log p(label = c | bias of the sample)``. 0 for a class that no sample
        has: the loss then pushes its logits down as it would without the adjustment.

    Raises
    ------
    TypeError, ValueError
        Not integers, a negative class, the wrong shape, or fewer `classes` than the labels have.

    Examples
    --------
    >>> adjustment = lnl_ext.logit_adjustment(labels, bias)  # once, for the whole training set
    >>> loss = F.cross_entropy(classifier(tap) + adjustment[rows], labels[rows])
    """
    given_bias = log_label_given_bias(labels, bias, classes=classes, ignore_index=ignore_index)
    return given_bias.masked_fill(given_bias.isneginf(), 0.0).float()


def log_label_given_bias(
    labels: Tensor, bias: Tensor, *, classes: int | None = None, ignore_index: int | None = None
) -> Tensor:
    """Return ``log p(label | bias)``, ``(N, C)`` float64, by Bayes' rule from counts.

    The bias columns are taken as independent given the label. Arguments and errors are those of
    `logit_adjustment`.
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
        return torch.empty(0, classes or 0, dtype=torch.float64, device=labels.device)
    labels, columns = labels.long(), columns.long()
    known = torch.ones_like(columns, dtype=torch.bool)
    if ignore_index is not None:
        known = columns != ignore_index
    if int(labels.min()) < 0 or bool((columns[known] < 0).any()):
        raise ValueError("labels and bias must be classes from 0: leave out samples without one")
    if classes is not None and int(labels.max()) >= classes:
        raise ValueError(f"labels has class {int(labels.max())}, expected less than {classes}")
    count = torch.bincount(labels, minlength=classes or 0).double()
    joint = count.log().expand(len(labels), -1)
    for column, is_known in zip(columns.unbind(1), known.unbind(1), strict=True):
        rows = is_known.nonzero().squeeze(1)
        if not len(rows):
            continue
        column = column[rows]
        values = int(column.max()) + 1
        pairs = torch.bincount(column * len(count) + labels[rows], minlength=values * len(count))
        # Half a sample more for every pair: no probability is 0.
        smoothed = pairs.double().view(values, -1) + 0.5
        joint = joint.index_add(0, rows, (smoothed / smoothed.sum(0)).log()[column])
    return joint.log_softmax(1)
