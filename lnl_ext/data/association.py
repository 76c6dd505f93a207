"""How labels and a bias go together in a set of samples."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["Association"]


@dataclasses.dataclass(frozen=True)
class Association:
    """The contingency table of labels and a bias.

    Attributes
    ----------
    counts
        Samples of known bias, shape ``(labels, bias classes)`` int64.
    missing
        Samples of unknown bias.
    """

    counts: Tensor
    missing: int = 0

    @classmethod
    def of(cls, labels: Tensor, bias: Tensor, classes: tuple[int, int]) -> Association:
        """Count samples.

        Parameters
        ----------
        labels, bias
            Shape (N,), int64 class numbers; a negative bias is unknown.
        classes
            Number of labels and of bias classes.
        """
        known = bias >= 0
        places = labels[known] * classes[1] + bias[known]
        counts = torch.bincount(places, minlength=classes[0] * classes[1]).view(classes)
        return cls(counts, int((~known).sum()))

    @property
    def samples(self) -> int:
        """How many have a known bias."""
        return int(self.counts.sum())

    @property
    def expected(self) -> Tensor:
        """The counts if label and bias were independent, float64."""
        counts = self.counts.double()
        return counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True) / max(1, self.samples)

    @property
    def groups(self) -> Tensor:
        """The aligned groups: those with more samples than `expected`; bool like the counts.

        A classifier that relies on the bias is right in these.
        """
        total = self.counts.sum(1, keepdim=True) * self.counts.sum(0, keepdim=True)
        return self.counts * self.samples > total  # whole numbers: a tie is no association

    @property
    def aligned(self) -> int:
        """Samples in aligned groups."""
        return int(self.counts[self.groups].sum())

    @property
    def exceptions(self) -> int:
        """Samples of known bias in the other groups, which tell label and bias apart."""
        return self.samples - self.aligned

    def is_aligned(self, labels: Tensor, bias: Tensor) -> Tensor:
        """Say which samples, of this set or another, are in aligned groups: shape (N,) bool."""
        return self.groups[labels, bias.clamp_min(0)] & (bias >= 0)

    def text(self, label: str, bias: str) -> str:
        """Say how far they go together, as in "93 % aligned, 90 exceptions"."""
        if not self.samples:
            return f"{bias} is not known of any"
        if not self.groups.any():
            return f"{label} and {bias} are independent"
        share = 100 * self.aligned / self.samples
        chance = 100 * float(self.expected[self.groups].sum()) / self.samples
        # Not 100 with an exception.
        shown = round(share) if not self.exceptions else min(99, round(share))
        return (
            f"{shown} % aligned, {self.exceptions} exceptions ({chance:.0f} % if {label} and "
            f"{bias} were independent)"
        )
