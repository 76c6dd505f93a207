"""Checked arguments of an audit, as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lnl_ext.measuring.audit_probes import IGNORED, Task
from lnl_ext.measuring.audit_split import Split
from lnl_ext.measuring.evaluation import evaluating

PROBES = ("linear", "mlp")


def probe_names(probes: str | Sequence[str], head: nn.Module | None) -> list[str]:
    """Return the names of the probes to train, each once, "head" last."""
    names = list(dict.fromkeys([probes] if isinstance(probes, str) else probes))
    if any(name not in PROBES for name in names) or not (names or head is not None):
        raise ValueError(f"probes is {probes!r}, expected some of {PROBES}")
    return names if head is None else [*names, "head"]


def as_tensor(name: str, values: Any) -> Tensor:
    """Return a tensor, or a NumPy array as one."""
    if isinstance(values, Tensor):
        return values.detach()
    if isinstance(values, np.ndarray):
        # A copy where the array's memory is read-only or not in order.
        return torch.from_numpy(np.require(values, requirements=["C", "W"]))
    raise TypeError(f"{name} is a {type(values).__name__}, expected a Tensor or a NumPy array")


def features_of(model: Any, inputs: Any, batch_size: int) -> Tensor:
    """Return the features (N, D, *S), float32 or float64, where the model is."""
    if isinstance(model, nn.Module):
        if inputs is None:
            raise ValueError("inputs is missing, expected the inputs of the module `model`")
        features = _features_of_module(model, inputs, batch_size)
    else:
        features = as_tensor("model", model)
        if inputs is not None:
            raise ValueError("inputs is given, and so are features: expected one of them")
    if features.dim() < 2 or not features.is_floating_point():
        raise ValueError(
            f"features have shape {tuple(features.shape)} and dtype {features.dtype}, expected "
            "floating point (N, D) or (N, D, *S)"
        )
    if features.dtype != torch.float64:
        features = features.float()
    if not features.isfinite().all():
        raise ValueError("features are not all finite")
    return features


def _features_of_module(model: nn.Module, inputs: Any, batch_size: int) -> Tensor:
    batches: Iterable[Any] = inputs
    if isinstance(inputs, Tensor | np.ndarray):
        batches = torch.split(as_tensor("inputs", inputs), batch_size)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parts = []
    with evaluating(model):
        for batch in batches:
            first = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
            part = model(as_tensor("a batch of inputs", first).to(device))
            if not isinstance(part, Tensor):
                raise TypeError(f"model gives a {type(part).__name__}, expected a Tensor")
            parts.append(part)
    if not parts:
        raise ValueError("inputs has no batch, expected at least one")
    return torch.cat(parts)


def class_numbers(name: str, given: Any, samples: int) -> Tensor:
    """Return class numbers on the CPU as int64, with a row for each sample."""
    values = as_tensor(name, given)
    if values.is_floating_point() or values.is_complex():
        raise TypeError(f"{name} has dtype {values.dtype}, expected integer classes")
    if values.dim() == 0 or len(values) != samples:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, expected {samples} rows as the features"
        )
    return values.cpu().long()


def class_labels(labels: Any, samples: int) -> Tensor:
    """Return the labels (N,)."""
    numbers = class_numbers("labels", labels, samples)
    if numbers.dim() != 1:
        raise ValueError(f"labels has shape {tuple(numbers.shape)}, expected (N,)")
    return numbers


def aligned_samples(aligned: Any, samples: int) -> Tensor | None:
    """Return which samples are aligned, (N,) bool, or None where nobody said."""
    if aligned is None:
        return None
    rows = as_tensor("aligned", aligned)
    if rows.dtype != torch.bool or rows.shape != (samples,):
        raise ValueError(
            f"aligned has dtype {rows.dtype} and shape {tuple(rows.shape)}, expected "
            f"torch.bool and {(samples,)}"
        )
    return rows.cpu()


def predicted_classes(
    features: Tensor, classifier: nn.Module | None, predictions: Any, batch_size: int
) -> Tensor | None:
    """Return the predicted classes (N,), or None where nothing says them."""
    if classifier is not None and predictions is not None:
        raise ValueError("classifier and predictions are both given, expected one of them")
    name = "predictions"
    if classifier is not None:
        name = "the output of classifier"
        dtype = next((p.dtype for p in classifier.parameters()), features.dtype)
        with evaluating(classifier):
            predictions = torch.cat(
                [classifier(part.to(dtype)) for part in torch.split(features, batch_size)]
            )
    if predictions is None:
        return None
    values = as_tensor(name, predictions)
    samples = len(features)
    if values.shape == (samples,) and not (values.is_floating_point() or values.is_complex()):
        return values.cpu().long()
    logits = values.is_floating_point() and values.dim() == 2
    if not logits or len(values) != samples or values.shape[1] < 2:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} and dtype {values.dtype}, expected integer "
            f"classes ({samples},) or floating-point logits ({samples}, K) of K >= 2 classes"
        )
    if not values.isfinite().all():
        raise ValueError(f"{name} has logits that are not finite")
    return values.argmax(1).cpu()


def task_of(name: str, features: Tensor, values: Any, heads: int, split: Split) -> Task:
    """Return what the probes have to predict: the classes that occur, numbered anew."""
    name = f"bias[{name!r}]"
    target = class_numbers(name, values, len(features))
    given = tuple(target.shape)
    if heads == 1 and not (target.dim() > 1 and target.shape[1:] != features.shape[2:]):
        target = target.unsqueeze(1)
    positions = tuple(target.shape[2:])
    if target.dim() < 2 or target.shape[1] != heads or positions not in ((), features.shape[2:]):
        raise ValueError(
            f"{name} has shape {given}, expected (N,), (N, heads), (N, *S) or "
            f"(N, heads, *S) with heads={heads} for features of shape {tuple(features.shape)}"
        )
    target = target.flatten(2) if positions else target.unsqueeze(2)
    known = target >= 0
    for part, rows in split._asdict().items():
        if not known[rows].any(2).any(0).all():
            raise ValueError(f"{name} has a head without any known value in the {part} samples")
    class_names, numbers = torch.unique(target[known], return_inverse=True)
    target = torch.full_like(target, IGNORED).masked_scatter_(known, numbers)
    return Task(features, target, class_names, positional=bool(positions))
