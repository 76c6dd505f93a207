"""How good a classifier is: accuracy, accuracy per group, worst group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put ``module`` in evaluation mode without gradients, and every submodule back as it was."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for submodule, training in modes:
            submodule.training = training


class Predictions(NamedTuple):
    """A classifier's predictions on a data set, on the CPU."""

    logits: Tensor
    """(N, C) float32."""
    labels: Tensor
    """(N,) int64."""

    @property
    def accuracy(self) -> float:
        """Fraction of correct predictions; NaN for no sample."""
        return (self.logits.argmax(1) == self.labels).float().mean().item()


def predict(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor, object]]) -> Predictions:
    """Run ``model`` over ``batches`` in evaluation mode.

    Parameters
    ----------
    model
        Images (N, ...) to logits (N, C).
    batches
        ``(images, labels, ...)``; what follows is ignored.

    Raises
    ------
    ValueError
        If there is no batch.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    logits, labels = [], []
    with evaluating(model):
        for images, label, *_ in batches:
            logits.append(model(images.to(device, non_blocking=True)).float().cpu())
            labels.append(label.cpu())
    if not logits:
        raise ValueError("batches is empty: there is nothing to evaluate on")
    return Predictions(torch.cat(logits), torch.cat(labels))


class GroupAccuracy(NamedTuple):
    """Accuracy per group."""

    accuracy: dict[int, float]
    """By group, for the groups that have samples."""
    samples: dict[int, int]
    """Number of samples of each of these groups."""

    @property
    def worst(self) -> float:
        """The lowest of the accuracies (worst-group accuracy)."""
        return min(self.accuracy.values())


def group_accuracy(predictions: Predictions, groups: Tensor) -> GroupAccuracy:
    """Return the accuracy on the samples of each group.

    Parameters
    ----------
    predictions
        Of N samples.
    groups
        Shape (N,), integer: the group of each sample; negative: in no group.

    Raises
    ------
    ValueError
        If the shape is wrong, or no sample is in a group.
    """
    if groups.shape != predictions.labels.shape:
        raise ValueError(
            f"groups has shape {tuple(groups.shape)}, expected {tuple(predictions.labels.shape)}"
        )
    correct = predictions.logits.argmax(1) == predictions.labels
    accuracy, samples = {}, {}
    for group in torch.unique(groups[groups >= 0]).tolist():
        inside = correct[groups == group]
        accuracy[group] = inside.float().mean().item()
        samples[group] = len(inside)
    if not accuracy:
        raise ValueError("groups puts no sample in a group (all are negative)")
    return GroupAccuracy(accuracy, samples)
