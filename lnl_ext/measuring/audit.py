"""The audit of features or of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lnl_ext.measuring.audit_arguments import (
    PROBES,
    aligned_samples,
    class_labels,
    features_of,
    predicted_classes,
    probe_names,
    task_of,
)
from lnl_ext.measuring.audit_groups import group_audit
from lnl_ext.measuring.audit_probes import (
    IGNORED,
    Fitted,
    Task,
    chosen,
    class_frequencies,
    fit_probe,
    log_probabilities,
)
from lnl_ext.measuring.audit_split import Split, stratified_split
from lnl_ext.measuring.report import AuditReport, BiasAudit, Interval, ProbeAudit
from lnl_ext.measuring.statistics import (
    bootstrap_interval,
    entropy_of_counts,
    permutation_test,
    plug_in_entropy,
)


def audit(
    model: nn.Module | Tensor | np.ndarray[Any, Any],
    labels: Tensor | np.ndarray[Any, Any],
    bias: Tensor | np.ndarray[Any, Any] | Mapping[str, Tensor | np.ndarray[Any, Any]],
    *,
    inputs: Tensor | np.ndarray[Any, Any] | Iterable[Any] | None = None,
    classifier: nn.Module | None = None,
    predictions: Tensor | np.ndarray[Any, Any] | None = None,
    aligned: Tensor | np.ndarray[Any, Any] | None = None,
    probes: str | Sequence[str] = PROBES,
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

    Tensors may as well be NumPy arrays.

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
        Which of "linear" and "mlp" (one hidden layer of 256) to train; one or several.
    head
        An architecture to train as a probe as well, from features to logits
        ``(N, heads * C, *S)``, C at least the number of classes: that of the adversary. It is
        copied and its parameters drawn anew, which each of its modules with parameters of its own
        must be able to (``reset_parameters``).
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
        empty; features or logits are not finite; a parameter of `head` cannot be drawn anew.

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
    kinds = probe_names(probes, head)
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
    features = features_of(model, inputs, batch_size)
    labels = class_labels(labels, len(features))
    aligned = aligned_samples(aligned, len(features))
    predicted = predicted_classes(features, classifier, predictions, batch_size)
    named = dict(bias) if isinstance(bias, Mapping) else {"bias": bias}
    if not named:
        raise ValueError("bias is empty, expected a tensor or at least one by name")
    split = stratified_split(labels, validation, test, seed)
    found = {}
    for name, values in named.items():
        task = task_of(name, features, values, heads, split)
        groups = None
        if predicted is not None and task.target[0].numel() == 1:
            groups = group_audit(predicted, labels, task.given_target[:, 0, 0], aligned)
        majority, entropy = _without_features(task, split)
        found[name] = BiasAudit(
            classes=task.classes,
            class_names=tuple(task.class_names.tolist()),
            heads=heads,
            chance=1 / task.classes,
            majority=majority,
            entropy=entropy,
            probes={
                kind: _measure(
                    fit_probe(kind, task, split, head=head, batch_size=batch_size, seed=seed),
                    task,
                    split.test,
                    labels,
                    settings,
                )
                for kind in kinds
            },
            groups=groups,
        )
    return AuditReport(
        samples={"all": len(features), **{k: len(v) for k, v in split._asdict().items()}},
        accuracy=None if predicted is None else (predicted == labels).double().mean().item(),
        biases=found,
        settings=settings._asdict() | {"validation": validation, "test": test},
    )


def _without_features(task: Task, split: Split) -> tuple[float, float]:
    """Return the accuracy of the most frequent class, and H(b); means over the heads."""
    common = class_frequencies(task.target[split.train], task.classes).argmax(1)
    accuracy, entropy = [], []
    for head, target in enumerate(task.target[split.test].unbind(1)):
        known = target[target != IGNORED]
        accuracy.append((known == common[head]).double().mean())
        entropy.append(_entropy(torch.bincount(known, minlength=task.classes).double()))
    return torch.stack(accuracy).mean().item(), torch.stack(entropy).mean().item()


def _entropy(counts: Tensor) -> Tensor:
    """Return H(b), to which the correction of the estimate adds no more than is possible."""
    return entropy_of_counts(counts).clamp_max(math.log(counts.shape[-1]))


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
    if log_probability.isnan().any():
        raise ValueError("head gives logits that are NaN, expected finite ones")
    known = target != IGNORED
    right = (log_probability.argmax(1) == target) & known
    nats = -chosen(log_probability, target).double()
    of_class = torch.stack([(target == c).sum(2) for c in range(task.classes)], 2).double()
    # What bootstrap draws are whole samples: sums over positions, (n, heads). Those of which
    # nothing is known are not drawn; a head of which nothing was drawn is left out of the mean.
    told = known.any(2).any(1)
    counts, right_sum = known.sum(2)[told].double(), right.sum(2)[told].double()
    nats_sum, of_class = nats.sum(2)[told], of_class[told]

    def accuracy(times: Tensor) -> Tensor:
        return (times @ right_sum / (times @ counts)).nanmean(1)

    def each_cross_entropy(times: Tensor) -> Tensor:
        return times @ nats_sum / (times @ counts)

    def each_count(times: Tensor) -> Tensor:
        return torch.einsum("rn,nhc->rhc", times, of_class)

    def information(times: Tensor) -> Tensor:
        return (plug_in_entropy(each_count(times)) - each_cross_entropy(times)).nanmean(1)

    def interval(
        figure: Callable[[Tensor], Tensor], estimate: float, bounds: tuple[float, float]
    ) -> Interval:
        low, high = bootstrap_interval(
            figure,
            len(counts),
            estimate=estimate,
            resamples=settings.resamples,
            confidence=settings.confidence,
            seed=settings.seed,
        )
        return Interval(max(low, bounds[0]), min(high, bounds[1]))

    def p_value(strata: Tensor | None) -> float:
        return permutation_test(
            log_probability,
            target,
            strata,
            permutations=settings.permutations,
            seed=settings.seed,
        )

    once = torch.ones(1, len(counts), dtype=torch.float64)
    right_share = accuracy(once).item()
    cross_entropy = each_cross_entropy(once).mean().item()
    told_nats = _entropy(each_count(once)).mean().item() - cross_entropy
    return ProbeAudit(
        accuracy=right_share,
        accuracy_interval=interval(accuracy, right_share, (0, 1)),
        cross_entropy=cross_entropy,
        information=told_nats,
        information_interval=interval(information, told_nats, (-math.inf, math.log(task.classes))),
        p_value=p_value(None),
        p_value_within_labels=p_value(labels[rows]),
        epochs=fitted.epochs,
        converged=fitted.converged,
    )
