"""A module run over data in evaluation mode: its outputs, or a classifier's predictions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Predictions", "as_tensor", "evaluating", "outputs", "predict"]


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


def as_tensor(name: str, values: Any) -> Tensor:
    """Return a tensor, or a NumPy array as one."""
    if isinstance(values, Tensor):
        if values.is_nested:
            raise TypeError(f"{name} is a nested tensor, expected a dense Tensor")
        return values.detach()
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "biufc":
            raise TypeError(f"{name} has dtype {values.dtype}, expected numbers")
        # A copy where the array's memory is read-only or not in order.
        return torch.from_numpy(np.require(values, requirements=["C", "W"]))
    raise TypeError(f"{name} is a {type(values).__name__}, expected a Tensor or a NumPy array")


def outputs(module: nn.Module, batches: Iterable[Any]) -> Tensor:
    """Return what ``module`` makes of batches, one row per sample, on the device of the module.

    Parameters
    ----------
    module
        A tensor to a tensor.
    batches
        Tensors or NumPy arrays, or tuples of which these are the first element.

    Raises
    ------
    TypeError, ValueError
        A batch, or an output, is not a tensor; there is no batch.
    """
    device = _device(module)
    parts = []
    with evaluating(module):
        for batch in batches:
            first = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
            part = module(as_tensor("a batch of inputs", first).to(device, non_blocking=True))
            if not isinstance(part, Tensor):
                raise TypeError(f"model gives a {type(part).__name__}, expected a Tensor")
            parts.append(part)
    if not parts:
        raise ValueError("inputs has no batch, expected at least one")
    return torch.cat(parts)


class Predictions(NamedTuple):
    """A classifier's predictions on a data set, on the CPU."""

    logits: Tensor
    """(N, C) float32."""
    labels: Tensor
    """(N,) int64."""

    @property
    def classes(self) -> Tensor:
        """The predicted classes, (N,) int64."""
        return self.logits.argmax(1)

    @property
    def accuracy(self) -> float:
        """Fraction of correct predictions; NaN for no sample."""
        return (self.classes == self.labels).float().mean().item()


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
    device = _device(model)
    logits, labels = [], []
    with evaluating(model):
        for images, label, *_ in batches:
            logits.append(model(images.to(device, non_blocking=True)).float().cpu())
            labels.append(label.cpu())
    if not logits:
        raise ValueError("batches is empty: there is nothing to evaluate on")
    return Predictions(torch.cat(logits), torch.cat(labels))


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
