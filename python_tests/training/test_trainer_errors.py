"""What the trainer and its configuration refuse."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import (
    differences,
    tiny_batches,
    tiny_networks,
    tiny_trainer,
)
from torch import nn
from torch.nn import functional as F  # noqa: N812
from trainer_runs import SGD, Watched

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.training.checkpoint import NonFiniteError, load_checkpoint
from lnl_ext.training.config import OptimizerConfig, TrainerConfig
from lnl_ext.training.trainer import CHECKPOINT, Trainer


@pytest.mark.parametrize(
    ("term", "poison"),
    [("label_loss", "classifier"), ("image_(cross_)?entropy", "image")],
)
@pytest.mark.parametrize("update", ["joint", "two_step"])
def test_a_loss_that_is_not_finite_names_term_epoch_and_step(
    tmp_path: Path, update: str, term: str, poison: str
) -> None:
    trainer = tiny_trainer(update=update)
    module = trainer.classifier if poison == "classifier" else trainer.adversaries["image"].head

    def poison_step_11() -> None:
        if trainer.step == 10:
            with torch.no_grad():
                next(module.parameters()).fill_(torch.nan)

    with pytest.raises(
        NonFiniteError,
        match=rf"{term} is nan at epoch 1, step 11 \(batch 5 of 6\)",
    ):
        trainer.fit(
            Watched(tiny_batches(), poison_step_11),
            output=tmp_path,
            checkpoint_every=1,
            progress=False,
        )
    saved = load_checkpoint(tmp_path / CHECKPOINT)
    assert saved["step"] == 10
    assert all(t.isfinite().all() for t in saved["parts"]["classifier"].values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """Step 10 has a finite loss and an infinite gradient."""
    trainer = tiny_trainer(optimizer=SGD)
    bias = trainer.classifier[3].bias
    bias.register_hook(lambda grad: grad * torch.inf if trainer.step == 9 else grad)
    with pytest.raises(NonFiniteError, match=r"^3\.bias of classifier is not finite after step 10"):
        trainer.fit(tiny_batches(), output=tmp_path, checkpoint_every=1, progress=False)
    assert load_checkpoint(tmp_path / CHECKPOINT)["step"] == 9


def test_an_evaluation_cannot_replace_what_a_record_has() -> None:
    with pytest.raises(ValueError, match="evaluate gave label_loss, step, which the record has"):
        tiny_trainer().fit(
            tiny_batches(), evaluate=lambda _: {"step": 1.0, "label_loss": 1.0}, progress=False
        )


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ((b for b in ()), TypeError, "batches must have a length.*generator"),
        ([], ValueError, "batches is empty"),
        ([torch.zeros(4, 3, 8, 8)], TypeError, r"a batch must be \(images, labels, \{"),
        (
            [(torch.zeros(4, 3, 8, 8), torch.zeros(4).long(), {"pixel": torch.zeros(4)})],
            KeyError,
            "no bias target for 'image' .*it has 'pixel'",
        ),
        ([(torch.zeros(4, 3, 8, 8), torch.zeros(4).long(), {})], KeyError, "it has none"),
    ],
)
def test_batches_that_cannot_be_used_are_refused(
    batches: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tiny_trainer().fit(batches, progress=False)


def test_batches_shorter_than_they_say_are_refused() -> None:
    class Short(list):
        def __iter__(self) -> Iterator[Any]:
            return iter(self[:2])

    with pytest.raises(ValueError, match="batches ended after 2 batches, its length promises 6"):
        tiny_trainer().fit(Short(tiny_batches()), progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every must be >= 1, got 0"),
        ({"log_every": -1}, "log_every must be >= 1, got -1"),
        ({"checkpoint_every": 5}, "checkpoint_every needs output"),
    ],
)
def test_arguments_of_fit_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_trainer().fit(tiny_batches(), progress=False, **arguments)


def test_a_model_without_anything_to_learn_is_refused() -> None:
    f, g = tiny_networks()
    f.requires_grad_(False)
    g.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        Trainer(f, g)


def test_frozen_heads_are_left_alone() -> None:
    head = nn.Conv2d(8, 12, 1).requires_grad_(False)
    before = copy.deepcopy(head.state_dict())
    trainer = Trainer(*tiny_networks(), {"pixel": BiasAdversary(head, heads=3)})
    trainer.fit(tiny_batches(), progress=False)
    assert differences(before, head.state_dict()) == []


def test_an_adversary_must_reduce_to_a_number() -> None:
    adversary = BiasAdversary(nn.Conv2d(8, 12, 1), heads=3, reduction="none")
    with pytest.raises(ValueError, match="adversary 'pixel' has reduction=\"none\""):
        Trainer(*tiny_networks(), {"pixel": adversary})


def test_a_classifier_of_one_output_is_refused() -> None:
    f, _ = tiny_networks()
    g = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))
    labels = torch.zeros(4).long()
    batches = [(torch.zeros(4, 3, 8, 8), labels, {})]
    message = r"the classifier's output has shape \(4, 1\), a single class: .* two outputs"
    with pytest.raises(ValueError, match=message):
        Trainer(f, g).fit(batches, progress=False)

    def binary(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())

    (record,) = Trainer(f, g, task_loss=binary).fit(batches, progress=False)
    assert record["label_loss"] > 0


def test_an_adversary_of_one_class_or_no_probabilities_is_refused() -> None:
    images, labels = torch.zeros(4, 3, 8, 8), torch.zeros(4).long()
    for target, classes, message in (
        (torch.rand(4, 1), 1, "the head's output has shape .* a single class"),
        (torch.randn(4, 3), 3, "target of probabilities has the value -"),
    ):
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
        trainer = Trainer(*tiny_networks(), {"image": BiasAdversary(head)})
        with pytest.raises(ValueError, match=message):
            trainer.fit([(images, labels, {"image": target})], progress=False)


@pytest.mark.parametrize(
    ("cls", "arguments", "error", "message"),
    [
        (TrainerConfig, {"epochs": 0}, ValueError, "epochs is 0, expected a finite number > 0"),
        (TrainerConfig, {"epochs": "3"}, TypeError, "epochs is '3', expected a number"),
        (TrainerConfig, {"strength": -1}, ValueError, "strength is -1, .* >= 0"),
        (TrainerConfig, {"strength": "step"}, ValueError, "strength is 'step', .* linear, ramp"),
        (TrainerConfig, {"strength": lambda t: t}, TypeError, "strength is <function"),
        (TrainerConfig, {"update": "three"}, ValueError, "update is 'three', .* one of 'joint', "),
        (TrainerConfig, {"accumulate": 0}, ValueError, "accumulate is 0, .* an integer >= 1"),
        (TrainerConfig, {"clip_norm": 0.0}, ValueError, "clip_norm is 0.0, .* > 0"),
        (TrainerConfig, {"head_steps": -1}, ValueError, "head_steps is -1, .* >= 0"),
        (TrainerConfig, {"head_steps": 2.5}, TypeError, "head_steps is 2.5, expected an integer"),
        (
            TrainerConfig,
            {"balance": 1.5},
            ValueError,
            "balance is 1.5, expected a number from 0 to 1",
        ),
        (TrainerConfig, {"optimizer": "adam"}, TypeError, "optimizer is 'adam', .*OptimizerConfig"),
        (TrainerConfig, {"average_decay": 1.0}, ValueError, "average_decay is 1.0, .* < 1"),
        (TrainerConfig, {"average_decay": np.nan}, ValueError, "average_decay is nan, .*finite"),
        (TrainerConfig, {"seed": 2**32}, ValueError, r"seed is .* < 2\*\*32"),
        (TrainerConfig, {"seed": True}, TypeError, "seed is True, expected an integer"),
        (TrainerConfig, {"amp": "float64"}, ValueError, "amp is 'float64', .* None, 'bfloat16'"),
        (TrainerConfig, {"compile": 1}, TypeError, "compile is 1, expected True or False"),
        (OptimizerConfig, {"name": "adagrad"}, ValueError, "name is 'adagrad', .* 'adam', 'adamw'"),
        (OptimizerConfig, {"learning_rate": 0.0}, ValueError, "learning_rate is 0.0, .* > 0"),
        (OptimizerConfig, {"momentum": 0.9}, ValueError, 'momentum is for name="sgd"'),
        (OptimizerConfig, {"name": "sgd", "momentum": 1}, ValueError, "momentum is 1, .* < 1"),
        (OptimizerConfig, {"betas": (0.9,)}, ValueError, "betas is .*, expected two numbers"),
        (OptimizerConfig, {"betas": (0.9, 1.0)}, ValueError, "betas is 1.0, .* < 1"),
        (OptimizerConfig, {"schedule": "linear"}, ValueError, "schedule is 'linear', .*'constant'"),
    ],
)
def test_configurations_are_checked(
    cls: type, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cls(**arguments)
