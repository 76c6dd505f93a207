"""A candidate for the package's recipe: lnl with an adjusted label loss and a weighted bias head.

Resampling repeats the few images of rare groups until they are learned by heart; the adjusted loss
has each as often as the others, but few of them in a batch. The middle: groups are drawn as often
as the fourth root of the balanced weights says. What the bias still says about the label in what is
drawn is added to the logits of the label loss, and taken from the head by weights.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lnl_ext.training.balance import balanced_weights
from lnl_ext.training.recipe import LNL

# The strength and the root were chosen on the validation parts of faces and pets.
RECIPE = dataclasses.replace(LNL, reversal=0.3, entropy_weight=0.03, balance=False)
_ROOT = 0.25
_PRIOR_SAMPLES = 10.0  # with the labels' shares, for every bias; as `lnl_ext.logit_adjustment` has
_LARGEST = 10.0  # weight; as in `lnl_ext.independence_weights`


def partly_balanced(labels: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how often to draw the samples, and what makes up for the rest.

    Parameters
    ----------
    labels, bias
        ``(N,)`` int64 classes from 0, of the training part.

    Returns
    -------
    weight : Tensor
        ``(N,)`` float64, of the draws.
    adjustment : Tensor
        ``(N, classes)`` float32: ``log p(label | bias) - log p(label)`` of what is drawn.
    head_weight : Tensor
        ``(N,)`` float32: ``p(label) / p(label | bias)`` of what is drawn.
    """
    weight = balanced_weights(labels, bias) ** _ROOT
    shape = (int(labels.max()) + 1, int(bias.max()) + 1)
    drawn = torch.zeros(shape, dtype=torch.float64).index_put_((labels, bias), weight, True)
    drawn *= len(labels) / drawn.sum()
    share = drawn.sum(1, keepdim=True) / drawn.sum()
    drawn += _PRIOR_SAMPLES * share
    ratio = drawn / drawn.sum(0) / share  # p(label | bias) / p(label)
    head_weight = (1 / ratio)[labels, bias].clamp(max=_LARGEST)
    return weight, ratio.log().T[bias].float(), head_weight.float()
