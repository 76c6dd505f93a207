"""Warnings of an adversary that is too strong: before a run, and in its epochs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.training.batches import Batch

STRENGTH_LIMIT = 1.5
"""Largest sum of ``reversal + entropy_weight`` over all heads at which there is no warning.

The recipe of ``lnl`` has 0.66. On faces five times as much cost twelve points of accuracy.
"""

_ABOVE = 1.1
"""Part of H(b) above which the mean cross-entropy of an epoch counts as above it.

The head of a run that unlearns ends at H(b), and its steps take it a few hundredths to both sides.
"""

_CLASSES = 1024  # counted without asking a GPU how many there are


class StrengthChecks:
    """The two checks of a run.

    Parameters
    ----------
    adversaries
        Those that are a mean over targets are checked; sums have a scale of their own.
    strength
        The factor of their coefficients at the end of the run.
    sample_weights
        Of those of which samples have weights: their name among the bias targets.
    """

    def __init__(
        self,
        adversaries: Mapping[str, BiasAdversary],
        strength: float,
        sample_weights: Mapping[str, str],
    ) -> None:
        self._sample_weights = dict(sample_weights)
        self._samples = 0
        self._adversaries = {n: a for n, a in adversaries.items() if a.reduction == "mean"}
        self._strength = strength
        self._counts: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor | float] = {}
        self._epochs = 0
        self._warned: set[str] = set()

    def warn_before(self) -> None:
        """Warn of coefficients whose sum over the heads is above `STRENGTH_LIMIT`."""
        total = self._strength * sum(
            adversary.heads * (adversary.final("reversal") + adversary.final("entropy_weight"))
            for adversary in self._adversaries.values()
        )
        if total > STRENGTH_LIMIT:
            warnings.warn(
                f"reversal + entropy_weight is {total:.3g}, summed over all bias heads, above "
                f"{STRENGTH_LIMIT}: the features may lose the label together with the bias. "
                f"docs/choosing.md says how to choose them",
                stacklevel=3,
            )

    def count(self, batches: Sequence[Batch]) -> None:
        """Count the targets of a step, in the first epoch that this process trains.

        Of weighted samples in every epoch: a few of large weight are drawn now more, now less.
        """
        self._samples += sum(len(labels) for _, labels, _ in batches)
        for name, adversary in self._adversaries.items():
            weighted = name in self._sample_weights
            plain = adversary.weight is None and adversary.label_smoothing == 0
            if (self._epochs and not weighted) or not plain:
                continue
            for _, _, bias in batches:
                target, heads = bias[name], adversary.heads
                if target.is_floating_point():
                    continue
                index = target.reshape(len(target), heads, -1).transpose(0, 1).reshape(heads, -1)
                counted = (index != adversary.ignore_index).float()
                if weighted:
                    weight = bias[self._sample_weights[name]].float()
                    counted = (counted.view(heads, len(target), -1) * weight[:, None]).flatten(1)
                    mean = counted.mean() * len(target)
                    self._weights[name] = self._weights.get(name, 0) + mean
                if name not in self._counts:
                    self._counts[name] = torch.zeros(heads, _CLASSES, device=target.device)
                self._counts[name].scatter_add_(1, index.clamp(0, _CLASSES - 1), counted)

    def warn_after(self, record: Mapping[str, Any]) -> None:
        """Warn of heads whose cross-entropy over the epoch of a record is above H(b), once each."""
        entropies = {}
        for name, counts in self._counts.items():
            if not counts[:, -1].any():
                share = counts / counts.sum(1, keepdim=True)
                entropies[name] = -float(torch.xlogy(share, share).sum())
        for name in entropies.keys() & self._weights.keys():  # their mean is over the samples
            entropies[name] *= float(self._weights[name]) / self._samples
        self._weights, self._samples = {}, 0
        self._epochs += 1
        for name, entropy in entropies.items():
            found = record[f"{name}_cross_entropy"]
            learned = record["epoch"] > 0  # in the first one the head is new
            above = found > _ABOVE * entropy and name not in self._warned
            if learned and record["strength"] > 0 and above:
                self._warned.add(name)
                warnings.warn(
                    f"the head of {name!r} had a cross-entropy of {found:.3g} in epoch "
                    f"{record['epoch']}, above H(b) = {entropy:.3g} of a head that knows nothing: "
                    "it does not follow the features. Lower reversal or entropy_weight, or give it "
                    "head_steps",
                    stacklevel=3,
                )
