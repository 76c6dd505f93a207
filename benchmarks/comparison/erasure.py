"""Linear erasure of a concept from features, in closed form, and a classifier refitted on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class LinearErasure(nn.Module):
    """LEACE: the smallest change after which no linear probe predicts the concept.

    ``x - W^+ P W (x - mean)`` with W the whitening of x and P the projection onto the columns of W
    times the covariance of x and concept (Belrose et al., NeurIPS 2023, theorem 4.3). In float64.

    Parameters
    ----------
    features
        ``(N, D)`` floating point, from which the moments are taken.
    concept
        ``(N,)`` int64 classes.
    weight
        ``(N,)``: how much each sample counts in the moments; all alike by default.
    """

    def __init__(self, features: Tensor, concept: Tensor, weight: Tensor | None = None) -> None:
        super().__init__()
        x, z = features.double(), F.one_hot(concept).double()
        share = x.new_ones(len(x)) if weight is None else weight.double()
        share = (share / share.sum())[:, None]
        mean = (share * x).sum(0)
        x, z = x - mean, z - (share * z).sum(0)
        values, vectors = torch.linalg.eigh(x.T @ (share * x))
        kept = values > values.max() * 1e-10  # directions in which the features do not move
        scale = torch.where(kept, values, 1.0).sqrt()
        whiten = vectors * torch.where(kept, 1 / scale, 0.0) @ vectors.T
        unwhiten = vectors * torch.where(kept, scale, 0.0) @ vectors.T
        seen, found, _ = torch.linalg.svd(whiten @ (x.T @ (share * z)), full_matrices=False)
        seen = seen[:, found > 1e-10]  # correlations of at most 1: below is rounding
        self.register_buffer("mean", mean)
        self.register_buffer("erased", unwhiten @ seen @ seen.T @ whiten)

    mean: Tensor
    erased: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """Return features ``(N, D)`` of the same dtype without the concept."""
        x = features.double()
        return (x - (x - self.mean) @ self.erased.T).to(features.dtype)


def refitted(features: Tensor, labels: Tensor, weight: Tensor) -> nn.Linear:
    """Return a logistic regression as a layer: features ``(N, D)`` to logits ``(N, classes)``."""
    from sklearn.linear_model import LogisticRegression

    scale = features.std(0).clamp_min(1e-6)
    fitted = LogisticRegression(max_iter=2000).fit(features / scale, labels, weight)
    layer = nn.Linear(features.shape[1], len(fitted.coef_))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(fitted.coef_) / scale)
        layer.bias.copy_(torch.tensor(fitted.intercept_))
    return two_logits(layer) if layer.out_features == 1 else layer


def two_logits(layer: nn.Linear) -> nn.Linear:
    """Turn a layer that gives the logit of the second of two classes into one that gives both."""
    both = nn.Linear(layer.in_features, 2)
    with torch.no_grad():
        both.weight.copy_(torch.cat([-layer.weight, layer.weight]) / 2)
        both.bias.copy_(torch.cat([-layer.bias, layer.bias]) / 2)
    return both
