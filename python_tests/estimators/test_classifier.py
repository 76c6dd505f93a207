"""AdversarialClassifier keeps scikit-learn's conventions and unlearns the bias of a table."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from biased_table import COLUMNS, biased_table
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import _num_samples

import lnl_ext
from lnl_ext import AdversarialClassifier
from lnl_ext.estimators import worst_group_accuracy

QUICK: dict[str, Any] = {"epochs": 5, "batch_size": 64, "random_state": 0}
TRAIN = biased_table(800, aligned=0.9, seed=0)
TEST = biased_table(2000, aligned=0.5, seed=1)


class WithSomeBias(AdversarialClassifier):
    """Takes every second row as the bias: scikit-learn's checks call ``fit(X, y)``."""

    def fit(self, X: Any, y: Any) -> WithSomeBias:  # type: ignore[override]  # noqa: N803
        super().fit(X, y, bias=np.arange(_num_samples(X)) % 2)
        return self


# No check is expected to fail.
@parametrize_with_checks([WithSomeBias(epochs=10, batch_size=32, random_state=0)])
def test_conventions_of_scikit_learn(estimator: WithSomeBias, check: Any) -> None:
    check(estimator)


def test_the_bias_is_unlearned() -> None:
    def information(model: AdversarialClassifier) -> float:
        report = lnl_ext.audit(
            model.transform(TEST.rows), TEST.labels, TEST.bias, permutations=1, probes="mlp"
        )
        return report.biases["bias"].leakage.information

    options: dict[str, Any] = {"epochs": 60, "batch_size": 64, "random_state": 0}
    model = AdversarialClassifier(**options).fit(TRAIN.rows, TRAIN.labels, bias=TRAIN.bias)
    without = AdversarialClassifier(reversal=0.0, entropy_weight=0.0, **options)
    without.fit(TRAIN.rows, TRAIN.labels, bias=TRAIN.bias)
    assert information(model) < information(without) / 4
    plain = LogisticRegression().fit(TRAIN.rows, TRAIN.labels)
    scores = [
        worst_group_accuracy(m, TEST.rows, TEST.labels, bias=TEST.bias) for m in (model, plain)
    ]
    assert scores[0] > scores[1] + 0.05


def test_both_names_of_the_bias_mean_the_same() -> None:
    first, second = (AdversarialClassifier(**QUICK) for _ in range(2))
    first.fit(TRAIN.rows, TRAIN.labels, bias=TRAIN.bias)
    second.fit(TRAIN.rows, TRAIN.labels, sensitive_features=pd.Series(TRAIN.bias))
    assert np.array_equal(first.predict_proba(TEST.rows), second.predict_proba(TEST.rows))


@pytest.mark.parametrize("names", [(), ("bias", "sensitive_features")])
def test_one_name_of_the_bias_is_required(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="needs bias or sensitive_features, the same thing; got"):
        AdversarialClassifier().fit(TRAIN.rows, TRAIN.labels, **dict.fromkeys(names, TRAIN.bias))


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({}, {"y": np.zeros(800)}, "y has one class only, 0.0"),
        ({}, {"bias": ["a"] * 800}, "bias has one value only, 'a'"),
        ({"epochs": 0}, {}, "epochs"),
        ({"head_steps": -1}, {}, "head_steps is -1"),
        ({"reversal": -1.0}, {}, "reversal"),
        ({"batch_size": 1}, {}, "batch_size is 1, expected at least 2"),
        ({"hidden_sizes": 64}, {}, "hidden_sizes is 64, expected a sequence"),
        ({"hidden_sizes": (64, 0)}, {}, "hidden_sizes is .* integers above 0"),
        ({"hidden_sizes": (3.5,)}, {}, "hidden_sizes is .* integers above 0"),
    ],
)
def test_errors_name_the_argument(
    options: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    given = {"X": TRAIN.rows, "y": TRAIN.labels, "bias": TRAIN.bias} | data
    with pytest.raises(ValueError, match=message):
        AdversarialClassifier(**options).fit(given.pop("X"), given.pop("y"), **given)


def test_names_of_classes_and_columns_come_back_and_missing_bias_is_left_out() -> None:
    table = pd.DataFrame(TRAIN.rows, columns=[f"column {i}" for i in range(COLUMNS)])
    income = np.where(TRAIN.labels == 1, "high", "low")
    sex = pd.Series(np.where(TRAIN.bias == 1, "female", "male"))
    sex[::5] = None
    model = make_pipeline(StandardScaler(), AdversarialClassifier(**QUICK))
    model.set_output(transform="pandas")
    model.fit(table, income, adversarialclassifier__bias=sex)
    assert model.classes_.tolist() == ["high", "low"]
    assert model[-1].bias_groups_ == ["female", "male"]
    assert model[-1].feature_names_in_.tolist() == table.columns.tolist()
    assert set(model.predict(table)) == {"high", "low"}
    assert model.score(table, income) > 0.7
    features = model.transform(table)
    assert features.columns[0] == "adversarialclassifier0"
    assert features.shape == (800, 16)
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict_proba(table), model.predict_proba(table))


def test_several_columns_are_one_bias() -> None:
    columns = pd.DataFrame({"sex": TRAIN.bias, "site": np.arange(800) // 400})
    model = AdversarialClassifier(**QUICK).fit(TRAIN.rows, TRAIN.labels, bias=columns)
    assert model.bias_groups_ == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("rows", [65, 129])
def test_a_last_batch_of_one_row_is_no_error(rows: int) -> None:
    model = AdversarialClassifier(**QUICK)
    model.fit(TRAIN.rows[:rows], TRAIN.labels[:rows], bias=TRAIN.bias[:rows])
    assert model.predict(TEST.rows).shape == (2000,)


def test_global_random_states_stay() -> None:
    def states() -> list[Any]:
        return [
            random.getstate(),
            np.random.get_state()[1].tolist(),  # type: ignore[union-attr]  # noqa: NPY002
            torch.get_rng_state().tolist(),
        ]

    before = states()
    AdversarialClassifier(**QUICK).fit(TRAIN.rows, TRAIN.labels, bias=TRAIN.bias)
    assert states() == before


def test_the_random_state_decides() -> None:
    def fitted(state: Any) -> Any:
        model = AdversarialClassifier(**QUICK | {"random_state": state})
        model.fit(TRAIN.rows, TRAIN.labels, bias=TRAIN.bias)
        return model.predict_proba(TEST.rows)

    one = fitted(1)
    assert np.array_equal(one, fitted(1))
    assert not np.array_equal(one, fitted(2))
    generator = np.random.RandomState(1)
    assert not np.array_equal(fitted(generator), fitted(generator))  # it moves on


def test_model_selection_passes_the_bias_to_fit_and_to_the_scorer() -> None:
    data = (TRAIN.rows, TRAIN.labels)
    model = AdversarialClassifier(**QUICK)
    scores = cross_val_score(model, *data, params={"bias": TRAIN.bias}, cv=2)
    assert (scores > 0.7).all()
    with sklearn.config_context(enable_metadata_routing=True):
        search = GridSearchCV(
            make_pipeline(StandardScaler(), clone(model)),
            {"adversarialclassifier__reversal": [0.0, 1.0]},
            scoring={"accuracy": "accuracy", "worst": worst_group_accuracy},
            refit="worst",
            cv=2,
        )
        search.fit(*data, bias=TRAIN.bias)
    worst = search.cv_results_["mean_test_worst"]
    assert (worst < search.cv_results_["mean_test_accuracy"]).all()
    assert search.best_score_ == max(worst)
