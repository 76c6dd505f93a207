"""The audit of features or of a model."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lnl_ext.data.split import stratified_split
from lnl_ext.errors import UserError
from lnl_ext.measuring.audit_report import AuditReport, BiasAudit, ProbeAudit
from lnl_ext.measuring.evaluation import as_tensor, evaluating, outputs
from lnl_ext.measuring.groups import GroupAccuracy
from lnl_ext.measuring.information import Sampling, bias_entropy, measure
from lnl_ext.measuring.probe import (
    PROBES,
    Task,
    class_frequencies,
    fit_probe,
)
from lnl_ext.ops.types import IGNORE_INDEX

__all__ = ["TooFewSamplesError", "audit"]

_Array = np.ndarray[Any, Any]


class TooFewSamplesError(UserError):
    """There are too few samples, or too few of known bias, to learn from and be measured on."""


class _Split(NamedTuple):
    """Three disjoint sets of rows, each int64 in ascending order."""

    train: Tensor
    validation: Tensor
    test: Tensor


def audit(
    model: nn.Module | Tensor | _Array,
    labels: Tensor | _Array,
    bias: Tensor | _Array | Mapping[str, Tensor | _Array],
    *,
    inputs: Tensor | _Array | Iterable[Any] | None = None,
    classifier: nn.Module | None = None,
    predictions: Tensor | _Array | None = None,
    aligned: Tensor | _Array | None = None,
    probes: str | Sequence[str] = PROBES,
    head: nn.Module | None = None,
    heads: int = 1,
    validation: float = 0.2,
    test: float | Tensor | _Array = 0.3,
    permutations: int = 1000,
    resamples: int = 1000,
    confidence: float = 0.95,
    batch_size: int = 256,
    seed: int = 0,
) -> AuditReport:
    """Measure how much of a known bias features still hold, and the accuracy in every group.

    Fresh probes are trained to convergence on the frozen features; a validation split ends their
    training, a test split measures them. The adversary's own loss does not measure this: where
    its head cannot predict the bias, another head may (Kim et al., CVPR 2019, claim that in the
    end the bias cannot be predicted because the features, not the predictor, have changed).

    Use samples in which the bias does not follow the label: else the label alone predicts the
    bias. The p-value *within labels* holds the label fixed.

    Tensors may as well be NumPy arrays. SciPy and scikit-learn must be installed
    (``pip install 'lnl_ext[train]'``).

    Parameters
    ----------
    model
        Features ``(N, D)`` or ``(N, D, *S)``, floating point, or the module that makes them from
        `inputs`. Their unit and offset do not matter; probes see them on a robust scale.
    labels
        Class labels, shape (N,), integers.
    bias
        The known bias, integers, or several by name: shape (N,), or (N, heads), or with a value for
        every position of the features (N, *S) or (N, heads, *S). Negative values are unknown and
        left out; of the others, those that occur are the classes.
    inputs
        For a module: a tensor of N inputs, or batches, of which the first element is the input.
    classifier
        Module from features to class logits (N, K): for the accuracy per group.
    predictions
        Instead of it: predicted classes (N,), integers, or class logits (N, K), K >= 2.
    aligned
        Shape (N,), bool: which samples agree with the association of label and bias in the
        training set, for the bias-aligned and bias-conflicting accuracy.
    probes
        Which to train of "linear", "mlp" (one hidden layer of 256) and "conv" (two convolutions
        and a mean over positions; for features (N, D, H, W) with one bias value a sample, left out
        elsewhere); one or several.
    head
        An architecture to train as a probe as well, from features to logits
        ``(N, heads * C, *S)``, C at least the number of classes: that of the adversary. It is
        copied and its parameters drawn anew, which each of its modules with parameters of its own
        must be able to (``reset_parameters``).
    heads
        Number of bias values per sample or position.
    validation
        Share of the samples that end the probes' training.
    test
        Share of the samples that probes are measured on; the rest is what they learn from. Or
        which these are, shape (N,) bool; then `validation` is a share of the others.
    permutations
        Of the permutation tests.
    resamples
        Of the bootstrap intervals over the test samples.
    confidence
        Coverage of these intervals.
    batch_size
        Of the probes' training, and of a module's forward passes.
    seed
        Decides the splits, the probes and the resampling. The global generator is not touched.

    Returns
    -------
    AuditReport

    Raises
    ------
    ImportError
        SciPy or scikit-learn is not installed.
    TypeError, ValueError
        An argument has the wrong type, shape or range; features or logits are not finite; a
        parameter of `head` cannot be drawn anew.
    TooFewSamplesError
        A ValueError: fewer than two samples, or none of known bias, in a part of the split; or
        one of known bias to measure on.

    Notes
    -----
    ``information`` is ``H(b) - CE`` on the test samples, or 0 if that is negative: the
    cross-entropy of any predictor is at least the conditional entropy ``H(b | f)``, so that in
    expectation it is a lower bound of ``I(b; f)``. A small value shows that *these* probes find
    little, not that nothing is there.

    Examples
    --------
    >>> features, labels = torch.randn(600, 16), torch.randint(2, (600,))
    >>> report = audit(features, labels, torch.randint(3, (600,)), permutations=99)
    >>> print(report.to_markdown())  # doctest: +SKIP
    """
    for library in ("scipy", "sklearn"):
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise ImportError(
                f"lnl_ext.audit needs {library}: pip install 'lnl_ext[train]'"
            ) from error
    kinds = _probe_names(probes, head)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}, expected a number in (0, 1)")
    for name, count in (
        ("permutations", permutations),
        ("resamples", resamples),
        ("batch_size", batch_size),
        ("heads", heads),
    ):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} is {count!r}, expected an int of at least 1")
    sampling = Sampling(permutations, resamples, confidence, seed)
    features = _features(model, inputs, batch_size)
    labels = _labels(labels, len(features))
    aligned = _chosen_samples("aligned", aligned, len(features))
    predicted = _predicted_classes(features, classifier, predictions, batch_size)
    named = dict(bias) if isinstance(bias, Mapping) else {"bias": bias}
    if not named:
        raise ValueError("bias is empty, expected a tensor or at least one by name")
    split = _split(labels, validation, test, seed)
    found = {}
    for name, values in named.items():
        task = _task(name, features, values, heads, split)
        used = [kind for kind in kinds if kind in (*task.probes(), "head")]
        if not used:
            raise ValueError(f"probes is {probes!r}, none of which can take these features")
        groups = None
        if predicted is not None and task.target[0].numel() == 1:
            groups = GroupAccuracy.of(predicted, labels, task.given_target[:, 0, 0], aligned)
        majority, label_only, entropy = _without_features(task, labels, split)
        found[name] = BiasAudit(
            classes=task.classes,
            class_names=tuple(task.class_names.tolist()),
            heads=heads,
            chance=1 / task.classes,
            majority=majority,
            label_only=label_only,
            entropy=entropy,
            probes={
                kind: _probed(kind, task, labels, split, head, batch_size, sampling)
                for kind in used
            },
            groups=groups,
        )
    return AuditReport(
        samples={"all": len(features), **{k: len(v) for k, v in split._asdict().items()}},
        accuracy=None if predicted is None else (predicted == labels).double().mean().item(),
        biases=found,
        settings=sampling._asdict()
        | {"batch_size": batch_size, "validation": validation}
        | {"test": test if isinstance(test, float) else len(split.test) / len(features)},
    )


def _probed(
    kind: str,
    task: Task,
    labels: Tensor,
    split: _Split,
    head: nn.Module | None,
    batch_size: int,
    sampling: Sampling,
) -> ProbeAudit:
    """Train a probe and measure it on the test samples."""
    fitted = fit_probe(
        kind,
        task,
        split.train,
        split.validation,
        head=head,
        batch_size=batch_size,
        seed=sampling.seed,
    )
    log_probability = fitted.log_probabilities(task, split.test, batch_size)
    if log_probability.isnan().any():
        raise ValueError("head gives logits that are NaN, expected finite ones")
    figures = measure(
        log_probability, task.target[split.test], labels[split.test], task.classes, sampling
    )
    return ProbeAudit(**vars(figures), epochs=fitted.epochs, converged=fitted.converged)


def _without_features(task: Task, labels: Tensor, split: _Split) -> tuple[float, float, float]:
    """Return what guessing reaches, the most frequent class or that of the label, and H(b)."""
    numbers = torch.unique(labels, return_inverse=True)[1]
    common = class_frequencies(task.target[split.train], task.classes).argmax(1)
    # A label that is not among the training samples gets the most frequent class of all.
    of_label = common.repeat(int(numbers.max()) + 1, 1)
    for number in torch.unique(numbers[split.train]).tolist():
        target = task.target[split.train][numbers[split.train] == number]
        frequencies = class_frequencies(target, task.classes)
        told = (target != IGNORE_INDEX).any(2).any(0)
        of_label[number] = torch.where(told, frequencies.argmax(1), common)
    figures = []
    for column, target in enumerate(task.target[split.test].unbind(1)):
        known = target != IGNORE_INDEX
        guess = of_label[numbers[split.test], column].unsqueeze(1).expand_as(target)
        counts = torch.bincount(target[known], minlength=task.classes).double()
        figures.append(
            (
                (target[known] == common[column]).double().mean().item(),
                (target[known] == guess[known]).double().mean().item(),
                bias_entropy(counts).item(),
            )
        )
    majority, label_only, entropy = torch.tensor(figures, dtype=torch.float64).mean(0).tolist()
    return majority, label_only, entropy


# ------------------------------------------------------------------ arguments


def _probe_names(probes: str | Sequence[str], head: nn.Module | None) -> list[str]:
    """Return the names of the probes to train, each once, "head" last."""
    names = list(dict.fromkeys([probes] if isinstance(probes, str) else probes))
    if any(name not in PROBES for name in names) or not (names or head is not None):
        raise ValueError(f"probes is {probes!r}, expected some of {PROBES}")
    return names if head is None else [*names, "head"]


def _features(model: Any, inputs: Any, batch_size: int) -> Tensor:
    """Return the features (N, D, *S), float32 or float64, where the model is."""
    if isinstance(model, nn.Module):
        if inputs is None:
            raise ValueError("inputs is missing, expected the inputs of the module `model`")
        if isinstance(inputs, Tensor | np.ndarray):
            inputs = torch.split(as_tensor("inputs", inputs), batch_size)
        features = outputs(model, inputs)
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


def _class_numbers(name: str, given: Any, samples: int) -> Tensor:
    """Return class numbers on the CPU as int64, with a row for each sample."""
    values = as_tensor(name, given)
    if values.is_floating_point() or values.is_complex():
        raise TypeError(f"{name} has dtype {values.dtype}, expected integer classes")
    if values.dim() == 0 or len(values) != samples:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, expected {samples} rows as the features"
        )
    return values.cpu().long()


def _labels(labels: Any, samples: int) -> Tensor:
    """Return the labels (N,)."""
    numbers = _class_numbers("labels", labels, samples)
    if numbers.dim() != 1:
        raise ValueError(f"labels has shape {tuple(numbers.shape)}, expected (N,)")
    return numbers


def _chosen_samples(name: str, given: Any, samples: int) -> Tensor | None:
    """Return which samples are meant, (N,) bool, or None where nobody said."""
    if given is None:
        return None
    rows = as_tensor(name, given)
    if rows.dtype != torch.bool or rows.shape != (samples,):
        raise ValueError(
            f"{name} has dtype {rows.dtype} and shape {tuple(rows.shape)}, expected "
            f"torch.bool and {(samples,)}"
        )
    return rows.cpu()


def _predicted_classes(
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


def _split(labels: Tensor, validation: float, test: Any, seed: int) -> _Split:
    """Divide the samples so that every label is divided alike."""
    everything = torch.arange(len(labels))
    share = validation
    if isinstance(test, Tensor | np.ndarray):
        measured = _chosen_samples("test", test, len(labels))
        assert measured is not None
        rest, test_rows = everything[~measured], everything[measured]
        if not 0 < validation < 1:
            raise ValueError(f"validation is {validation}, expected a share in (0, 1)")
    elif not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise ValueError(
            f"validation={validation} and test={test}, expected shares in (0, 1) that leave some "
            "samples to learn from"
        )
    else:
        share = validation / (1 - test)
        rest, test_rows = _divided(everything, labels, test, seed)
    split = _Split(*_divided(rest, labels, share, seed + 1), test_rows)
    if min(map(len, split)) < 2:
        parts = ", ".join(f"{part} {len(rows)}" for part, rows in split._asdict().items())
        raise TooFewSamplesError(
            f"{len(labels)} samples are too few ({parts}), expected two or more in each part"
        )
    return split


def _divided(rows: Tensor, labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    try:
        first, second = stratified_split(labels[rows].tolist(), [], share, seed)
    except UserError:  # nothing for one of the two
        return rows, rows[:0]
    return rows[first], rows[second]


def _task(name: str, features: Tensor, values: Any, heads: int, split: _Split) -> Task:
    """Return what the probes have to predict: the classes that occur, numbered anew."""
    name = f"bias[{name!r}]"
    target = _class_numbers(name, values, len(features))
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
            raise TooFewSamplesError(
                f"{name} has a head without any known value in the {part} samples"
            )
    if known[split.test].any(2).any(1).sum() < 2:
        raise TooFewSamplesError(f"{name} is known of one test sample, expected two or more")
    class_names, numbers = torch.unique(target[known], return_inverse=True)
    target = torch.full_like(target, IGNORE_INDEX).masked_scatter_(known, numbers)
    return Task(features, target, class_names, positional=bool(positions))
