"""The recipe of ``lnl``: its numbers reach the run, and a run by it unlearns."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from lnl_ext.measuring.audit import audit
from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.config import OptimizerConfig, TrainerConfig
from lnl_ext.training.methods import METHODS
from lnl_ext.training.recipe import LNL, Recipe
from lnl_ext.training.trainer import Trainer


def test_its_numbers_are_those_of_the_configuration() -> None:
    recipe = Recipe(warm_up=0.2, rise=0.4, head_steps=3, balance=0.5, head_learning_rate=0.1)
    config = recipe.config(epochs=7.0, seed=5)
    assert [config.strength_at(t) for t in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx(
        [0.0, 0.0, 0.5, 1.0, 1.0]
    )
    assert (config.head_steps, config.balance, config.epochs, config.seed) == (3, 0.5, 7.0, 5)
    assert config.head_optimizer == OptimizerConfig("adam", 0.1, betas=LNL.head_betas)
    assert recipe.config(head_steps=0).head_steps == 0
    assert Recipe(warm_up=0.8).strength.finish == 1.0


def test_columns_share_its_strength() -> None:
    for method, terms in (
        ("lnl", (LNL.reversal / 2, LNL.entropy_weight / 2, 0.0)),
        ("blindeye", (0.0, 0.0, LNL.confusion_weight / 2)),
    ):
        made = LNL.adversaries((16,), {"a": 2, "b": 3}, method=METHODS[method], mask_entropy=True)
        for adversary, classes in zip(made.values(), (2, 3), strict=True):
            assert adversary.mask_entropy
            assert adversary.head(torch.randn(4, 16)).shape == (4, classes)
            found = (adversary.reversal, adversary.entropy_weight, adversary.confusion_weight)
            assert [float(value) for value in found] == pytest.approx(terms)


def test_a_run_unlearns_and_is_more_accurate_where_the_bias_misleads() -> None:
    """Against the same network without any of it: a bias that is the label in 19 of 20."""
    generator = torch.Generator().manual_seed(0)

    def data(samples: int, aligned: float) -> tuple[torch.Tensor, ...]:
        labels = torch.randint(2, (samples,), generator=generator)
        same = torch.rand(samples, generator=generator) < aligned
        bias = torch.where(same, labels, 1 - labels)
        images = torch.randn(samples, 64, generator=generator)
        images[:, :32] += 0.25 * (2 * labels - 1)[:, None]
        images[:, 32:] += 0.75 * (2 * bias - 1)[:, None]
        return images, labels, bias

    images, labels, bias = data(1000, 0.95)
    test, test_labels, test_bias = data(1000, 0.5)
    adam = OptimizerConfig("adamw", 1e-3, schedule="cosine")
    recipe = dataclasses.replace(LNL, head_sizes=(64,))
    accuracy, information = [], []
    for unlearn in (False, True):
        torch.manual_seed(0)
        f = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
        g = nn.Linear(32, 2)
        adversaries = recipe.adversaries((32,), {"bias": 2}) if unlearn else {}
        config = recipe.config if unlearn else TrainerConfig
        trainer = Trainer(f, g, adversaries, config(epochs=30, optimizer=adam))
        batches = TensorBatches(images, labels, {"bias": bias}, batch_size=32)
        trainer.fit(batches, progress=False)
        with torch.no_grad():
            features = f(test)
            right = g(features).argmax(1) == test_labels
        accuracy.append(right[test_bias != test_labels].float().mean().item())
        found = audit(features, test_labels, {"bias": test_bias}, permutations=19)
        information.append(found.biases["bias"].leakage.information)
    assert accuracy[1] > accuracy[0] + 0.2
    assert information[0] > 0.2
    assert information[1] < information[0] / 4
