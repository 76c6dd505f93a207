"""The label loss of a run."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lnl_ext.training.objective import TaskLoss

__all__ = ["label_loss"]


def label_loss(class_weights: str, labels: Tensor, classes: int, device: torch.device) -> TaskLoss:
    """Return cross-entropy, with ``class_weights="balanced"`` as if labels were equally frequent.

    The weights are ``N / (classes * N_c)`` (scikit-learn's "balanced"), 1 in the mean over the
    training images. The mean is over the images, not over their weights: so the losses of the
    parts of a batch add up to that of the whole.

    Parameters
    ----------
    class_weights
        ``"none"`` or ``"balanced"``.
    labels
        Of the training images, (N,) int64; every class occurs.
    classes
        Their number.
    device
        Of the logits.
    """
    if class_weights == "none":
        return F.cross_entropy
    counts = torch.bincount(labels, minlength=classes)
    weight = (len(labels) / (classes * counts)).to(device)

    def weighed(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        losses = F.cross_entropy(logits, target, weight.to(logits.dtype), reduction="none")
        return losses if reduction == "none" else losses.mean()

    return weighed
