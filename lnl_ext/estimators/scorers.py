"""Scorers that take the bias, for model selection with scikit-learn; higher is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.metadata_routing import MetadataRequest

from lnl_ext.estimators.encoding import encode_groups
from lnl_ext.measuring.audit import audit
from lnl_ext.measuring.groups import GroupAccuracy, demographic_parity_difference

__all__ = [
    "BiasScorer",
    "neg_bias_information",
    "neg_demographic_parity_difference",
    "worst_group_accuracy",
]


class BiasScorer:
    """A scorer ``scorer(estimator, X, y, *, bias)`` that asks metadata routing for the bias.

    Parameters
    ----------
    score : callable
        ``score(estimator, X, y, *, bias)``. It gets the bias as a Tensor (N,) int64: the number of
        each sample's group, -1 where the bias is missing.

    Examples
    --------
    >>> from lnl_ext.estimators import worst_group_accuracy
    >>> worst_group_accuracy(model, X_test, y_test, bias=sex_test)
    >>> sklearn.set_config(enable_metadata_routing=True)
    >>> search = GridSearchCV(
    ...     AdversarialClassifier(), {"reversal": [0.3, 1.0]}, scoring=worst_group_accuracy
    ... )
    >>> search.fit(X, y, bias=sex)
    """

    def __init__(self, score: Callable[..., float]) -> None:
        self._score = score

    def __call__(self, estimator: Any, X: Any, y: Any, *, bias: Any) -> float:
        """Return the score of a fitted estimator on samples of which the bias is known."""
        groups, _ = encode_groups("bias", bias, len(y))
        return self._score(estimator, X, np.asarray(y), bias=torch.from_numpy(groups))

    def __repr__(self) -> str:
        return self._score.__name__

    def get_metadata_routing(self) -> MetadataRequest:
        """Return what scikit-learn is to pass on: ``bias``."""
        request = MetadataRequest(owner=self)
        request.score.add_request(param="bias", alias=True)
        return request


@BiasScorer
def worst_group_accuracy(estimator: Any, X: Any, y: Any, *, bias: Any) -> float:
    """Accuracy in the group of class and bias where it is lowest."""
    predicted, labels = _numbered(estimator.predict(X), y)
    return GroupAccuracy.of(predicted, labels, bias).worst


@BiasScorer
def neg_demographic_parity_difference(estimator: Any, X: Any, y: Any, *, bias: Any) -> float:
    """Minus the largest difference between two bias groups in how often a class is predicted."""
    predicted, _ = _numbered(estimator.predict(X), y)
    return -demographic_parity_difference(predicted, bias)


@BiasScorer
def neg_bias_information(estimator: Any, X: Any, y: Any, *, bias: Any) -> float:
    """Minus the information about the bias in the features, in nats.

    That of the strongest probe of `lnl_ext.audit` on ``estimator.transform(X)``: an
    `AdversarialClassifier`, or a pipeline that ends in one. Takes seconds.
    """
    _, labels = _numbered(y, y)
    features = torch.from_numpy(np.asarray(estimator.transform(X)))
    report = audit(features, labels, bias, permutations=1, resamples=10)
    return -report.biases["bias"].leakage.information


def _numbered(predicted: NDArray[Any], y: NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return numbers for predicted and true classes alike, each (N,) int64."""
    numbers = np.unique(np.concatenate([predicted, y]), return_inverse=True)[1]
    return torch.from_numpy(numbers[: len(y)]), torch.from_numpy(numbers[len(y) :])
