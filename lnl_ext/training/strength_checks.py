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

The recipe of ``lnl`` has 1.1. On faces three times as much cost twelve points of accuracy.
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
        self._entropies: dict[str, float] = {}

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
        """Count the targets of a step, in the first epoch that this process trains."""
        self._samples += sum(len(labels) for _, labels, _ in batches)
        for name, adversary in self._adversaries.items():
            plain = adversary.weight is None and adversary.label_smoothing == 0
            if name in self._entropies or not plain:
                continue
            for _, _, bias in batches:
                target, heads = bias[name], adversary.heads
                if target.is_floating_point():
                    continue
                index = target.reshape(len(target), heads, -1).transpose(0, 1).reshape(heads, -1)
                known = (index != adversary.ignore_index).float()
                if name in self._sample_weights:
                    weight = bias[self._sample_weights[name]].float()
                    known = (known.view(heads, len(target), -1) * weight[:, None]).flatten(1)
                if name not in self._counts:
                    self._counts[name] = torch.zeros(heads, _CLASSES, device=target.device)
                classes = index.clamp(0, _CLASSES - 1)
                self._counts[name].scatter_add_(1, classes, known)

    def warn_after(self, record: Mapping[str, Any]) -> None:
        """Warn of heads whose cross-entropy over the epoch of a record is above H(b), once each."""
        for name, counts in self._counts.items():
            if not counts[:, -1].any():
                share = counts / counts.sum(1, keepdim=True)
                entropy = -float(torch.xlogy(share, share).sum())
                # Of a weighted mean over the samples, that of a head that knows nothing.
                weight = float(counts.sum()) / self._samples if name in self._sample_weights else 1
                self._entropies[name] = weight * entropy
        self._counts = {}
        for name, entropy in self._entropies.items():
            found = record[f"{name}_cross_entropy"]
            learned = record["epoch"] > 0  # in the first one the head is new
            if learned and record["strength"] > 0 and found > _ABOVE * entropy:
                self._entropies[name] = float("inf")
                warnings.warn(
                    f"the head of {name!r} had a cross-entropy of {found:.3g} in epoch "
                    f"{record['epoch']}, above H(b) = {entropy:.3g} of a head that knows nothing: "
                    "it does not follow the features. Lower reversal or entropy_weight, or give it "
                    "head_steps",
                    stacklevel=3,
                )
