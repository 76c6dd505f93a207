"""The audit of features or of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lnl_ext.auditing.groups import group_audit
from lnl_ext.auditing.probes import (
    IGNORED,
    Fitted,
    Task,
    chosen,
    class_frequencies,
    fit_probe,
    log_probabilities,
)
from lnl_ext.auditing.report import AuditReport, BiasAudit, Interval, ProbeAudit
from lnl_ext.auditing.split import Split, stratified_split
from lnl_ext.auditing.statistics import bootstrap_interval, entropy_of_counts, permutation_test
from lnl_ext.evaluation import evaluating

_PROBES = ("linear", "mlp")


def audit(
    model: nn.Module | Tensor,
    labels: Tensor,
    bias: Tensor | Mapping[str, Tensor],
    *,
    inputs: Tensor | Iterable[Any] | None = None,
    classifier: nn.Module | None = None,
    predictions: Tensor | None = None,
    aligned: Tensor | None = None,
    probes: Sequence[str] = _PROBES,
    head: nn.Module | None = None,
    heads: int = 1,
    validation: float = 0.2,
    test: float = 0.3,
    permutations: int = 1000,
    resamples: int = 1000,
    confidence: float = 0.95,
    batch_size: int = 256,
    seed: int = 0,
) -> AuditReport:
    """Measure how much of a known bias can still be told from features, and who pays for it.

    Fresh probes are trained to convergence on the frozen features; a validation split ends their
    training, a test split measures them. The adversary's own loss does not measure this: it may
    be fooled by features that another head reads easily (Kim et al., CVPR 2019, claim that in the
    end the bias cannot be predicted because the features, not the predictor, have changed).

    Use samples in which the bias does not follow the label: else the label alone predicts the
    bias. The p-value *within labels* holds the label fixed.

    Parameters
    ----------
    model
        Features ``(N, D)`` or ``(N, D, *S)``, or the module that makes them from `inputs`.
    labels
        Class labels, shape (N,), int64.
    bias
        The known bias, int64, or several by name: shape (N,), or (N, heads), or with a value for
        every position of the features (N, *S) or (N, heads, *S). Negative values are unknown and
        left out.
    inputs
        For a module: a tensor of N inputs, or batches, of which the first element is the input.
    classifier
        Module from features to class logits (N, K): for the accuracy per group.
    predictions
        Instead of it: predicted classes (N,), or class logits (N, K).
    aligned
        Shape (N,), bool: which samples agree with the association of label and bias in the
        training set, for the bias-aligned and bias-conflicting accuracy.
    probes
        Which of "linear" and "mlp" (one hidden layer of 256) to train.
    head
        An architecture to train as a probe as well, from features to logits
        ``(N, heads * C, *S)``: that of the adversary. It is copied and its parameters drawn anew.
    heads
        Number of bias values per sample or position.
    validation, test
        Shares of the samples; the rest is what probes learn from.
    permutations
        Of the permutation tests.
    resamples, confidence
        Of the bootstrap intervals over the test samples, and their coverage.
    batch_size
        Of the probes' training, and of a module's forward passes.
    seed
        Decides the splits, the probes and the resampling. The global generator is not touched.

    Returns
    -------
    AuditReport

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, shape or range; a split, or the known bias in one, is
        empty; features are not finite.

    Notes
    -----
    ``information`` is ``H(b) - CE`` on the test samples: the cross-entropy of any predictor is at
    least the conditional entropy ``H(b | f)``, so that in expectation it is a lower bound of
    ``I(b; f)``. A small value shows that *these* probes find little, not that nothing is there.

    Examples
    --------
    >>> features, labels = torch.randn(600, 16), torch.randint(2, (600,))
    >>> report = audit(features, labels, torch.randint(3, (600,)), permutations=99)
    >>> print(report.to_markdown())  # doctest: +SKIP
    """
    unknown = [kind for kind in probes if kind not in _PROBES]
    if unknown or not (probes or head is not None):
        raise ValueError(f"probes is {tuple(probes)!r}, expected some of {_PROBES}")
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
    settings = _Settings(permutations, resamples, confidence, batch_size, seed)
    features = _features(model, inputs, batch_size)
    labels = _classes("labels", labels, len(features))
    if labels.dim() != 1:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected (N,)")
    if aligned is not None and (aligned.dtype != torch.bool or aligned.shape != labels.shape):
        raise ValueError(
            f"aligned has dtype {aligned.dtype} and shape {tuple(aligned.shape)}, expected bool "
            f"and {tuple(labels.shape)}"
        )
    predicted = _predicted(features, classifier, predictions, batch_size)
    named = dict(bias) if isinstance(bias, Mapping) else {"bias": bias}
    if not named:
        raise ValueError("bias is empty, expected a tensor or at least one by name")
    split = stratified_split(labels, validation, test, seed)
    kinds = dict.fromkeys(probes) | ({} if head is None else {"head": head})
    found = {}
    for name, values in named.items():
        task = _task(name, features, values, heads, split)
        per_sample = task.target[:, 0, 0] if task.target[0].numel() == 1 else None
        groups = None
        if predicted is not None and per_sample is not None:
            groups = group_audit(predicted, labels, per_sample, aligned)
        majority, entropy = _without_features(task, split)
        found[name] = BiasAudit(
            classes=task.classes,
            heads=heads,
            chance=1 / task.classes,
            majority=majority,
            entropy=entropy,
            probes={
                kind: _measure(
                    fit_probe(kind, task, split, head=module, batch_size=batch_size, seed=seed),
                    task,
                    split.test,
                    labels,
                    settings,
                )
                for kind, module in kinds.items()
            },
            groups=groups,
        )
    return AuditReport(
        samples={"all": len(features), **{k: len(v) for k, v in split._asdict().items()}},
        accuracy=None if predicted is None else (predicted == labels).double().mean().item(),
        biases=found,
        settings=settings._asdict() | {"validation": validation, "test": test},
    )


def _features(
    model: nn.Module | Tensor, inputs: Tensor | Iterable[Any] | None, batch_size: int
) -> Tensor:
    """Return the features (N, D, *S), float32 or float64, where the model is."""
    if isinstance(model, nn.Module):
        if inputs is None:
            raise ValueError("inputs is missing, expected the inputs of the module `model`")
        batches = torch.split(inputs, batch_size) if isinstance(inputs, Tensor) else inputs
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with evaluating(model):
            parts = [
                model((batch if isinstance(batch, Tensor) else batch[0]).to(device))
                for batch in batches
            ]
        if not parts:
            raise ValueError("inputs has no batch, expected at least one")
        features = torch.cat(parts)
    elif isinstance(model, Tensor):
        if inputs is not None:
            raise ValueError("inputs is given, and so are features: expected one of them")
        features = model.detach()
    else:
        raise TypeError(f"model is a {type(model).__name__}, expected a Module or features")
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


def _classes(name: str, values: Tensor, samples: int) -> Tensor:
    """Check a tensor of class indices and return it on the CPU as int64."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} is a {type(values).__name__}, expected a Tensor")
    if values.is_floating_point() or values.is_complex():
        raise TypeError(f"{name} has dtype {values.dtype}, expected integer classes")
    if values.dim() == 0 or len(values) != samples:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, expected {samples} rows as the features"
        )
    return values.detach().cpu().long()


def _predicted(
    features: Tensor, classifier: nn.Module | None, predictions: Tensor | None, batch_size: int
) -> Tensor | None:
    """Return the predicted classes (N,), or None where nothing says them."""
    if classifier is not None and predictions is not None:
        raise ValueError("classifier and predictions are both given, expected one of them")
    if classifier is not None:
        dtype = next((p.dtype for p in classifier.parameters()), features.dtype)
        with evaluating(classifier):
            predictions = torch.cat(
                [classifier(part.to(dtype)) for part in torch.split(features, batch_size)]
            )
    if predictions is None:
        return None
    if predictions.is_floating_point():
        if predictions.dim() != 2:
            raise ValueError(
                f"predictions has shape {tuple(predictions.shape)}, expected classes (N,) or "
                "logits (N, K)"
            )
        predictions = predictions.argmax(1)
    return _classes("predictions", predictions, len(features))


def _task(name: str, features: Tensor, values: Tensor, heads: int, split: Split) -> Task:
    name = f"bias[{name!r}]"
    target = _classes(name, values, len(features))
    target = torch.where(target < 0, IGNORED, target)
    if heads == 1 and not (target.dim() > 1 and target.shape[1:] != features.shape[2:]):
        target = target.unsqueeze(1)
    positions = tuple(target.shape[2:])
    if target.dim() < 2 or target.shape[1] != heads or positions not in ((), features.shape[2:]):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, expected (N,), (N, heads), (N, *S) or "
            f"(N, heads, *S) with heads={heads} for features of shape {tuple(features.shape)}"
        )
    target = target.flatten(2) if positions else target.unsqueeze(2)
    for part, rows in split._asdict().items():
        if (target[rows] == IGNORED).all(2).all(0).any():
            raise ValueError(f"{name} has a head without any known value in the {part} samples")
    return Task(features, target, int(target.max()) + 1, positional=bool(positions))


def _without_features(task: Task, split: Split) -> tuple[float, float]:
    """Return the accuracy of the most frequent class, and H(b); means over the heads."""
    common = class_frequencies(task.target[split.train], task.classes).argmax(1)
    accuracy, entropy = [], []
    for head, target in enumerate(task.target[split.test].unbind(1)):
        known = target[target != IGNORED]
        accuracy.append((known == common[head]).double().mean())
        entropy.append(entropy_of_counts(torch.bincount(known).double()))
    return torch.stack(accuracy).mean().item(), torch.stack(entropy).mean().item()


class _Settings(NamedTuple):
    permutations: int
    resamples: int
    confidence: float
    batch_size: int
    seed: int


def _measure(
    fitted: Fitted, task: Task, rows: Tensor, labels: Tensor, settings: _Settings
) -> ProbeAudit:
    """Measure a probe on the test samples ``rows``; every figure is a mean over the heads."""
    target = task.target[rows]
    log_probability = log_probabilities(fitted.module, task, rows, settings.batch_size)
    known = target != IGNORED
    # What bootstrap draws are whole samples: sums over positions, (N, heads).
    counts = known.sum(2).double()
    right = ((log_probability.argmax(1) == target) & known).sum(2).double()
    nats = -chosen(log_probability, target).double().sum(2)
    of_class = torch.stack([(target == c).sum(2) for c in range(task.classes)], 2).double()

    def accuracy(times: Tensor) -> Tensor:
        return (times @ right / (times @ counts)).mean(1)

    def cross_entropy(times: Tensor) -> Tensor:
        return (times @ nats / (times @ counts)).mean(1)

    def information(times: Tensor) -> Tensor:
        drawn = torch.einsum("rn,nhc->rhc", times, of_class)
        return entropy_of_counts(drawn).mean(1) - cross_entropy(times)

    def interval(figure: Callable[[Tensor], Tensor]) -> Interval:
        return Interval(
            *bootstrap_interval(
                figure,
                len(rows),
                resamples=settings.resamples,
                confidence=settings.confidence,
                seed=settings.seed,
            )
        )

    def p_value(strata: Tensor | None) -> float:
        return permutation_test(
            log_probability,
            target,
            strata,
            permutations=settings.permutations,
            seed=settings.seed,
        )

    once = torch.ones(1, len(rows), dtype=torch.float64)
    return ProbeAudit(
        accuracy=accuracy(once).item(),
        accuracy_interval=interval(accuracy),
        cross_entropy=cross_entropy(once).item(),
        information=information(once).item(),
        information_interval=interval(information),
        p_value=p_value(None),
        p_value_within_labels=p_value(labels[rows]),
        epochs=fitted.epochs,
        converged=fitted.converged,
    )
