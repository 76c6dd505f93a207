"""Who gets the wrong answers: accuracy in the groups of label and bias."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from lnl_ext.measuring.interval import Interval, proportion_interval

__all__ = ["GroupAccuracy", "demographic_parity_difference"]

Group = tuple[int, int]
"""Label and bias class."""


@dataclasses.dataclass(frozen=True)
class GroupAccuracy:
    """Accuracy of a classifier by (label, bias class), after `fairlearn.metrics.MetricFrame`.

    Attributes
    ----------
    overall
        Accuracy on all samples, those of unknown bias among them.
    accuracy, samples
        By ``(label, bias class)``, for the groups that have samples.
    aligned, conflicting
        Accuracy on the samples of known bias that agrees, or does not agree, with what the
        training set suggests; None where that was not given or there is no such sample.
    aligned_samples, conflicting_samples
        How many these are.
    """

    overall: float
    accuracy: dict[Group, float]
    samples: dict[Group, int]
    aligned: float | None = None
    conflicting: float | None = None
    aligned_samples: int = 0
    conflicting_samples: int = 0

    @classmethod
    def of(
        cls, predicted: Tensor, labels: Tensor, bias: Tensor, aligned: Tensor | None = None
    ) -> GroupAccuracy:
        """Count right predictions.

        Parameters
        ----------
        predicted, labels, bias
            Shape (N,) integer; a negative bias is unknown, and the sample in no group.
        aligned
            Shape (N,) bool: the samples whose bias is what a classifier that relies on it expects.

        Raises
        ------
        ValueError
            A shape is wrong, or no sample has a known bias.
        """
        for name, values in (("labels", labels), ("bias", bias)):
            if values.shape != predicted.shape:
                raise ValueError(
                    f"{name} has shape {tuple(values.shape)}, expected {tuple(predicted.shape)} as "
                    "the predictions"
                )
        right, known = predicted == labels, bias >= 0
        if not known.any():
            raise ValueError("bias puts no sample in a group (all are negative)")
        found, group = torch.unique(
            torch.stack([labels[known], bias[known]], 1), dim=0, return_inverse=True
        )
        samples = torch.bincount(group)
        accuracy = torch.bincount(group, weights=right[known].double()) / samples
        groups = [(label, value) for label, value in found.tolist()]

        def mean(rows: Tensor) -> float | None:
            return right[rows].double().mean().item() if rows.any() else None

        sides = [known & False] * 2 if aligned is None else [aligned & known, ~aligned & known]
        return cls(
            overall=right.double().mean().item(),
            accuracy=dict(zip(groups, accuracy.tolist(), strict=True)),
            samples=dict(zip(groups, samples.tolist(), strict=True)),
            aligned=mean(sides[0]),
            conflicting=mean(sides[1]),
            aligned_samples=int(sides[0].sum()),
            conflicting_samples=int(sides[1].sum()),
        )

    @property
    def worst_group(self) -> Group:
        """The group with the lowest accuracy."""
        return min(self.accuracy, key=lambda group: self.accuracy[group])

    @property
    def worst(self) -> float:
        """The lowest accuracy of all groups (worst-group accuracy)."""
        return self.accuracy[self.worst_group]

    @property
    def balanced(self) -> float:
        """The mean accuracy of the groups: that on data with as many samples of each."""
        return sum(self.accuracy.values()) / len(self.accuracy)

    def interval(self, group: Group) -> Interval:
        """Return the 95 % interval of a group's accuracy."""
        return proportion_interval(self.accuracy[group], self.samples[group])

    @property
    def difference(self) -> float:
        """The highest accuracy of a group less the lowest."""
        return max(self.accuracy.values()) - self.worst

    def of_bias(self, bias: int) -> tuple[float, int]:
        """Return accuracy (NaN without samples) and samples of a bias class, over all labels."""
        groups = [group for group in self.samples if group[1] == bias]
        total = sum(self.samples[group] for group in groups)
        right = sum(self.accuracy[group] * self.samples[group] for group in groups)
        return (right / total if total else math.nan), total


def demographic_parity_difference(predicted: Tensor, bias: Tensor) -> float:
    """Return the largest difference between bias classes in how often a class is predicted.

    ``max_c (max_b p(prediction = c | b) - min_b p(prediction = c | b))``: with two classes the
    demographic-parity gap, as `fairlearn.metrics.demographic_parity_difference`.

    Parameters
    ----------
    predicted, bias
        Shape (N,) integers from 0; a negative bias is unknown, and the sample left out.

    Raises
    ------
    ValueError
        The shapes differ, or no sample has a known bias.
    """
    if predicted.shape != bias.shape:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {tuple(predicted.shape)}")
    groups = {b for b in bias.tolist() if b >= 0}
    if not groups:
        raise ValueError("bias puts no sample in a group (all are negative)")
    classes = int(predicted.max()) + 1
    counts = torch.stack(
        [torch.bincount(predicted[bias == b], minlength=classes).double() for b in groups]
    )
    shares = counts / counts.sum(1, keepdim=True)
    return (shares.max(0).values - shares.min(0).values).max().item()
