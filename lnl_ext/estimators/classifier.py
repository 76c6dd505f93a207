"""A classifier for tables and embeddings that unlearns a bias, by scikit-learn's conventions."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.adversary.reweighting import logit_adjustment
from lnl_ext.estimators.encoding import encode_groups
from lnl_ext.measuring.evaluation import outputs
from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.config import OptimizerConfig
from lnl_ext.training.recipe import LNL
from lnl_ext.training.trainer import Trainer

__all__ = ["AdversarialClassifier"]

# Chosen on the validation part of UCI Adult, like the defaults of the strength.
_STEPS, _FEATURES = 2000, 16
_HEAD_WIDTH = 128
_PREDICTED_AT_ONCE = 8192


class AdversarialClassifier(
    ClassifierMixin,  # type: ignore[misc]  # scikit-learn has no types
    ClassNamePrefixFeaturesOutMixin,  # type: ignore[misc]
    TransformerMixin,  # type: ignore[misc]
    BaseEstimator,  # type: ignore[misc]
):
    """A multilayer perceptron whose features unlearn a bias.

    Hidden layers lead to a narrow feature layer of 16 units. The classes are predicted from it, and
    a bias head tries to predict the bias from it (`lnl_ext.BiasAdversary`; Kim et al., CVPR 2019).
    The bias is needed in training only. What the bias alone says about the label is added to the
    logits in the training loss (`lnl_ext.logit_adjustment`), so that the network gains nothing from
    predicting it. The rest is the recipe of ``lnl``, but that rows are drawn as they come and the
    head does not weigh them: it takes from the predictions what the labels say about the bias, too.

    scikit-learn must be installed (``pip install 'lnl_ext[train]'``).

    Parameters
    ----------
    hidden_sizes : tuple of int
        Units of the hidden layers before the feature layer.
    reversal : float
        Weight of the reversed gradient of the bias head, >= 0.
    entropy_weight : float
        Weight of the entropy of its prediction, >= 0. Both weights are 0 in the first tenth of the
        training, in which only the head learns the bias, and rise over its next three tenths.
    head_steps : int
        Further steps of the bias head a batch, on features of the last batches.
    epochs : float or None
        Passes over the training data, > 0. None: as many as make 2,000 steps, and at least 5.
    batch_size : int
        Samples a step, at least 2.
    learning_rate : float
        Of network and bias head (Adam), > 0. That of the network falls to 0 by half a cosine.
    random_state : int, numpy.random.RandomState or None
        Decides the initial weights and the order of the samples.
    device : str
        Where to train and to predict: ``"cpu"``, ``"cuda"``, ``"mps"``.

    Attributes
    ----------
    classes_ : ndarray of shape (C,)
        The classes, ascending.
    bias_groups_ : list
        The values of the bias, ascending; tuples of values for several columns.
    n_features_in_ : int
        Number of columns of X.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Their names, where X is a DataFrame with names that are strings.
    history_ : list of dict
        The losses of every epoch.
    network_ : torch.nn.Sequential
        The features and the classifier.

    See Also
    --------
    lnl_ext.estimators.worst_group_accuracy : This and other scorers that take the bias.

    Notes
    -----
    Scale the columns first, as for any perceptron. Missing values in X are refused.

    Examples
    --------
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> model = make_pipeline(StandardScaler(), lnl_ext.AdversarialClassifier(random_state=0))
    >>> model.fit(X, y, adversarialclassifier__bias=sex)
    >>> model.predict(X_new)  # without the bias
    >>> sex = np.unique(sex_new, return_inverse=True)[1]  # strings to integers
    >>> lnl_ext.audit(model.transform(X_new), y_new, sex)  # is it gone from the features?
    """

    # With metadata routing, meta-estimators pass these on to fit without a set_fit_request.
    __metadata_request__fit = {"bias": True, "sensitive_features": True}  # noqa: RUF012

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (64,),
        *,
        reversal: float = 0.5,
        entropy_weight: float = 0.05,
        head_steps: int = 4,
        epochs: float | None = None,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        random_state: Any = None,
        device: str = "cpu",
    ) -> None:
        self.hidden_sizes = hidden_sizes
        self.reversal = reversal
        self.entropy_weight = entropy_weight
        self.head_steps = head_steps
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state
        self.device = device

    def fit(
        self,
        X: Any,
        y: Any,
        *,
        bias: Any = None,
        sensitive_features: Any = None,
    ) -> AdversarialClassifier:
        """Train on a table and the bias of its rows.

        Parameters
        ----------
        X : array-like of shape (N, D)
            Numbers; computed with in float32.
        y : array-like of shape (N,)
            Classes, at least two: numbers or strings.
        bias, sensitive_features : array-like of shape (N,) or (N, columns)
            What to unlearn, numbers or strings; exactly one of the two names, the second is
            fairlearn's. Of several columns every combination is a group. Where a value is missing
            (None, NaN, ``pandas.NA``) the row trains the label only.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            An argument is of the wrong type, shape or range; X is not finite; y or the bias has
            one class only.
        NonFiniteError
            A loss became NaN or infinite: scale X, or lower `learning_rate`.
        """
        if not isinstance(self.hidden_sizes, Iterable) or not all(
            isinstance(size, Integral) and size >= 1 for size in self.hidden_sizes
        ):
            raise ValueError(
                f"hidden_sizes is {self.hidden_sizes!r}, expected a sequence of integers above 0"
            )
        if not self.batch_size >= 2:
            raise ValueError(
                f"batch_size is {self.batch_size}, expected at least 2: the head has batch norm"
            )
        X, y = validate_data(self, X, y, dtype=np.float32, order="C")
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has one class only, {self.classes_.tolist()[0]!r}")
        if (bias is None) == (sensitive_features is None):
            given = "neither" if bias is None else "both"
            raise ValueError(f"fit needs bias or sensitive_features, the same thing; got {given}")
        name, values = (
            ("bias", bias) if bias is not None else ("sensitive_features", sensitive_features)
        )
        group, self.bias_groups_ = encode_groups(name, values, len(X))
        if len(self.bias_groups_) < 2:
            raise ValueError(f"{name} has one value only, {self.bias_groups_[0]!r}")
        seed = int(check_random_state(self.random_state).randint(2**31))
        with _random_state_kept(torch.device(self.device)):
            torch.manual_seed(seed)
            self._train(
                torch.from_numpy(X),
                torch.from_numpy(labels.astype(np.int64)),
                torch.from_numpy(np.where(group < 0, IGNORE_INDEX, group)),
                seed,
            )
        return self

    def _train(self, rows: Tensor, labels: Tensor, bias: Tensor, seed: int) -> None:
        sizes = [rows.shape[1], *self.hidden_sizes, _FEATURES]
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]
        features = nn.Sequential(*layers)
        classifier = nn.Linear(_FEATURES, len(self.classes_))
        # Batch norm: a feature layer that only shrinks would mislead the head, and not the audit.
        head = nn.Sequential(
            nn.Linear(_FEATURES, _HEAD_WIDTH),
            nn.BatchNorm1d(_HEAD_WIDTH),
            nn.ReLU(),
            nn.Linear(_HEAD_WIDTH, len(self.bias_groups_)),
        )
        adversary = BiasAdversary(
            head,
            reversal=self.reversal,
            entropy_weight=self.entropy_weight,
        )
        self.network_ = nn.Sequential(features, classifier).to(self.device)
        adversary.to(self.device)
        adjustment = logit_adjustment(labels, bias, classes=len(self.classes_))
        batches = TensorBatches(
            rows,
            labels,
            {"bias": bias, "logit_adjustment": adjustment},
            batch_size=self.batch_size,
            drop_last=len(rows) > self.batch_size,  # the head's batch norm needs two samples
        )
        recipe = dataclasses.replace(
            LNL,
            head_steps=self.head_steps,
            head_learning_rate=self.learning_rate,
            balance=0.0,
            adjust=False,  # of the label loss alone: a weighted head would leave a parity gap
        )
        config = recipe.config(
            epochs=max(5, _STEPS / len(batches)) if self.epochs is None else self.epochs,
            optimizer=OptimizerConfig(
                "adamw", self.learning_rate, weight_decay=0.01, schedule="cosine"
            ),
            seed=seed,
        )
        trainer = Trainer(
            features, classifier, {"bias": adversary}, config, logit_adjustment="logit_adjustment"
        )
        self._n_features_out = _FEATURES
        self.history_ = trainer.fit(batches, progress=False)

    def predict_proba(self, X: Any) -> NDArray[np.float32]:
        """Return the probabilities of the classes, shape (N, C), in the order of ``classes_``."""
        logits = self._outputs(self._network(), X)
        return logits.softmax(1).numpy()

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most probable class of every row, shape (N,)."""
        best = self._outputs(self._network(), X).argmax(1).numpy()
        classes: NDArray[Any] = self.classes_[best]
        return classes

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Return the features from which the classes are predicted, shape (N, 16)."""
        return self._outputs(self._network()[0], X).numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []  # float32, whatever X is
        return tags

    def _network(self) -> nn.Sequential:
        check_is_fitted(self)
        return self.network_

    def _outputs(self, module: nn.Module, X: Any) -> Tensor:
        X = validate_data(self, X, dtype=np.float32, order="C", reset=False)
        batches = (X[i : i + _PREDICTED_AT_ONCE] for i in range(0, len(X), _PREDICTED_AT_ONCE))
        return outputs(module, batches).cpu()


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Put the global random states back, which the trainer seeds."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
