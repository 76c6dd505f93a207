"""The authors' training procedure in plain PyTorch, with nothing of this package in it.

Written anew after https://github.com/feidfoe/learning-not-to-learn: per batch two forward passes of
the whole network and two backward passes, a head per colour channel, their own reversal layer,
log-softmax entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

REVERSAL = 0.1
ENTROPY_WEIGHT = 0.01


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -REVERSAL * grads[0]


class AuthorsProcedure:
    """One batch of the authors' training.

    Parameters
    ----------
    features, classifier
        f: images to features; g: features to class logits.
    heads
        A bias head per channel, features (N, D, *S) to (N, C, *S).
    optimizer, head_optimizers
        For f and g, and for each head.
    amp
        What the forward passes are autocast to, if at all.
    """

    def __init__(
        self,
        features: nn.Module,
        classifier: nn.Module,
        heads: Sequence[nn.Module],
        optimizer: torch.optim.Optimizer,
        head_optimizers: Sequence[torch.optim.Optimizer],
        amp: torch.dtype | None = None,
    ) -> None:
        self.features = features
        self.classifier = classifier
        self.heads = heads
        self.optimizer = optimizer
        self.optimizers = [optimizer, *head_optimizers]
        self.amp = amp

    def __call__(self, images: Tensor, labels: Tensor, bias: Tensor) -> None:
        """Train on images, class labels (N,) and bias labels (N, heads, *S)."""
        self._zero_gradients()
        with self._autocast(images):
            loss = self._fool(images, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

        self._zero_gradients()
        with self._autocast(images):
            loss = self._predict(images, bias)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()

    def _fool(self, images: Tensor, labels: Tensor) -> Tensor:
        hidden = self.features(images)
        loss = functional.cross_entropy(self.classifier(hidden), labels)
        for head in self.heads:
            log_p = functional.log_softmax(head(hidden), dim=1)
            negative_entropy = (log_p.exp() * log_p).sum(dim=1).mean()
            loss = loss + ENTROPY_WEIGHT / len(self.heads) * negative_entropy
        return loss

    def _predict(self, images: Tensor, bias: Tensor) -> Tensor:
        hidden = self.features(images)
        self.classifier(hidden)  # they run the whole network and leave its prediction unused
        reversed_features: Tensor = _Reverse.apply(hidden)
        losses = [
            functional.cross_entropy(head(reversed_features), bias[:, channel])
            for channel, head in enumerate(self.heads)
        ]
        return torch.stack(losses).sum()

    def _autocast(self, images: Tensor) -> torch.autocast:
        return torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp is not None)

    def _zero_gradients(self) -> None:
        # Zeros, not None, as zero_grad was then: g's momentum moves it in the second step.
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=False)
