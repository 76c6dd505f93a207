"""scikit-learn estimators and scorers, for tables and embeddings."""

try:
    import sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lnl_ext.estimators needs scikit-learn: pip install 'lnl_ext[train]'"
    ) from error

from lnl_ext.estimators.classifier import AdversarialClassifier
from lnl_ext.estimators.scorers import (
    BiasScorer,
    neg_bias_information,
    neg_demographic_parity_difference,
    worst_group_accuracy,
)

__all__ = [
    "AdversarialClassifier",
    "BiasScorer",
    "neg_bias_information",
    "neg_demographic_parity_difference",
    "worst_group_accuracy",
]
