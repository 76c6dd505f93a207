"""How each way trains: all but one by `lnl_ext.Trainer`, on the same network for as many steps."""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from comparison.data_sets import Data
from comparison.erasure import LinearErasure, refitted, two_logits
from comparison.networks import network
from comparison.protocol import DATA_SETS
from lnl_ext import BiasAdversary, OptimizerConfig, Trainer, TrainerConfig
from lnl_ext.errors import UserError
from lnl_ext.measuring.evaluation import outputs
from lnl_ext.training.balance import balanced_weights, group_numbers
from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.group_dro import GroupDRO
from lnl_ext.training.methods import get_method
from lnl_ext.training.recipe import LNL

OPTIMIZER = OptimizerConfig("adamw", learning_rate=1e-3, weight_decay=0.01, schedule="cosine")

METHOD = {"erm": "baseline"}  # where the package has another name


class Trained(NamedTuple):
    """What a way made, and what it cost."""

    features: nn.Module
    """f: prepared inputs to features ``(N, width)``."""
    classifier: nn.Module
    steps: int
    seconds: float


def train(data: Data, way: str, seed: int, *, progress: bool = True) -> Trained:
    """Train one way from new weights."""
    if way == "erasure":
        return _erased(data, seed, progress)
    if way == "estimator":
        return _estimator(data, seed)
    if way == "fairlearn":
        return _fairlearn(data, seed)
    return train_by_trainer(data, way, seed, progress)


def _network(data: Data, seed: int, outputs: int) -> tuple[nn.Module, nn.Linear]:
    torch.manual_seed(seed)
    return network(tuple(data.train.inputs.shape[1:]), outputs)


@functools.lru_cache(maxsize=1)  # erasure begins where erm ends
def train_by_trainer(data: Data, way: str, seed: int, progress: bool) -> Trained:
    """Train a way that is one of the package's methods, with its recipe where it has bias heads."""
    part, length, method = data.train, DATA_SETS[data.name], get_method(METHOD.get(way, way))
    features, classifier = _network(data, seed, data.classes)
    bias = {"bias": part.bias}
    task_weights: str | GroupDRO | None = None
    adversaries: dict[str, BiasAdversary] = {}
    settings: dict[str, Any] = {"epochs": length.epochs, "optimizer": OPTIMIZER, "seed": seed}
    if method.adversarial:
        shape, classes = (classifier.in_features,), {"bias": int(part.bias.max()) + 1}
        adversaries = LNL.adversaries(shape, classes, method=method)
        config = LNL.config(**settings)
    else:
        config = TrainerConfig(balance=method.balanced, adjust=method.adjusted, **settings)
    if method.reweighted:
        bias["weight"] = balanced_weights(part.labels, part.bias).float()
        task_weights = "weight"
    if method.group_dro:
        bias["group"] = group_numbers(part.labels, part.bias)
        task_weights = GroupDRO(int(bias["group"].max()) + 1)
    batches = TensorBatches(
        part.inputs,
        part.labels,
        bias,
        batch_size=length.batch_size,
        drop_last=True,
        prepare=data.augment,
    )
    trainer = Trainer(features, classifier, adversaries, config, task_weights=task_weights)
    trainer.fit(batches, progress=progress)
    return Trained(*trainer.inference_modules(), trainer.step, trainer.seconds)


def independent_weights(labels: Tensor, bias: Tensor) -> Tensor:
    """Return weights ``(N,)`` under which all biases are alike frequent among a label's samples.

    Each label weighs what it weighed before: where labels are not alike frequent, a test set has
    them so, too.
    """
    _, group, sizes = torch.unique(
        torch.stack([labels, bias], 1), dim=0, return_inverse=True, return_counts=True
    )
    weight: Tensor = torch.bincount(labels)[labels].double() / sizes[group]
    return weight


def _erased(data: Data, seed: int, progress: bool) -> Trained:
    """Erase the bias from erm's features and refit the classifier, both with balanced weights.

    Without these the bias is nearly the label in the training part, and the label is erased.
    """
    learned = train_by_trainer(data, "erm", seed, progress)
    began = time.monotonic()
    inputs = (data.prepare(rows) for rows in torch.split(data.train.inputs, 500))
    features = outputs(learned.features, inputs)
    weight = independent_weights(data.train.labels, data.train.bias)
    erasure = LinearErasure(features, data.train.bias, weight)
    classifier = refitted(erasure(features), data.train.labels, weight)
    seconds = learned.seconds + time.monotonic() - began
    return Trained(nn.Sequential(learned.features, erasure), classifier, learned.steps, seconds)


def _estimator(data: Data, seed: int) -> Trained:
    """Train `AdversarialClassifier` with its own strength, for as many steps as the other ways."""
    from lnl_ext import AdversarialClassifier

    length, part = DATA_SETS[data.name], data.train
    model = AdversarialClassifier(
        epochs=length.epochs, batch_size=length.batch_size, random_state=seed
    )
    model.fit(part.inputs.numpy(), part.labels.numpy(), bias=part.bias.numpy())
    features, classifier = model.network_
    last = model.history_[-1]
    return Trained(features, classifier, last["step"], last["seconds"])


def _fairlearn(data: Data, seed: int) -> Trained:
    """Train fairlearn's adversarial classifier: its adversary sees the prediction only.

    The strength is the library's default, the optimiser that of the other ways.
    """
    try:
        from fairlearn.adversarial import AdversarialFairnessClassifier
    except ImportError as error:
        raise UserError("the way 'fairlearn' needs fairlearn: pip install fairlearn") from error
    length = DATA_SETS[data.name]
    features, output = _network(data, seed, 1)
    whole = len(data.train) // length.batch_size  # batches; the others leave out the rest, too
    part = data.train[torch.arange(whole * length.batch_size)]
    model = AdversarialFairnessClassifier(
        backend="torch",
        predictor_model=nn.Sequential(features, output, nn.Sigmoid()),
        adversary_model=nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid()),
        predictor_optimizer=lambda module: OPTIMIZER.build(module.parameters()),
        constraints="demographic_parity",
        epochs=length.epochs,
        batch_size=length.batch_size,
        shuffle=True,
        random_state=seed,
    )
    began = time.monotonic()
    model.fit(part.inputs.numpy(), part.labels.numpy(), sensitive_features=part.bias.numpy())
    seconds = time.monotonic() - began
    return Trained(features, two_logits(output), length.epochs * whole, seconds)
