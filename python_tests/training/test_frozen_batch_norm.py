"""Batch norm whose statistics are frozen: any number of processes has one process's gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import in_processes, needs_gloo
from tiny_run import CONFIG, differences, tiny_data, tiny_heads, tiny_networks
from torch import nn
from trainer_runs import SGD, without_dropout

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.config import TrainerConfig
from lnl_ext.training.trainer import Trainer

pytestmark = needs_gloo


class Frozen(nn.Module):
    """Batch norm in evaluation mode for good; its scale and shift still learn."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(norm.num_features)
        norm.running_mean = torch.randn(norm.num_features, generator=generator) / 4
        norm.running_var = torch.rand(norm.num_features, generator=generator) + 0.5
        self.norm = norm

    def train(self, mode: bool = True) -> Frozen:
        self.training = mode
        self.norm.eval()
        return self

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        frozen: torch.Tensor = self.norm(maps)
        return frozen


def freeze(module: nn.Module) -> nn.Module:
    for name, part in module.named_children():
        if isinstance(part, nn.BatchNorm2d):
            setattr(module, name, Frozen(part))
    return module


def frozen_run(update: str, dtype: torch.dtype) -> dict[str, Any]:
    """Gradients of the last of three steps, and all states."""
    images, labels, bias = tiny_data()
    bias["image"][:8] = -100  # nothing for one head in the first batch
    features, classifier = (freeze(part) for part in tiny_networks())
    heads = {name: freeze(head) for name, head in tiny_heads().items()}
    modules = {"f": features, "g": classifier, **heads}
    for module in modules.values():
        module.to(dtype)
    adversaries = {
        "pixel": BiasAdversary(heads["pixel"], reversal=0.3, entropy_weight=0.05, heads=3),
        "image": BiasAdversary(heads["image"], reversal=0.5, entropy_weight=0.1),
    }
    settings = {**CONFIG, "epochs": 1, "strength": 1.0, "update": update}
    settings |= {"optimizer": SGD, "head_optimizer": SGD, "average_decay": None}
    trainer = Trainer(features, classifier, adversaries, TrainerConfig(**settings))
    without_dropout(trainer)
    batches = TensorBatches(images.to(dtype), labels, bias, batch_size=8, shuffle=False)
    trainer.fit(batches, progress=False)
    return {
        "gradients": {
            f"{name}.{key}": parameter.grad
            for name, module in modules.items()
            for key, parameter in module.named_parameters()
        },
        "states": {name: module.state_dict() for name, module in modules.items()},
    }


@pytest.mark.parametrize("update", ["joint", "two_step"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_train_as_one_with_the_whole_batch(world_size: int, update: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        expected = frozen_run(update, dtype)
        results = in_processes(frozen_run, update, dtype, world_size=world_size)
        for found in results:
            assert differences(found["states"], results[0]["states"]) == []
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        statistics = expected["states"]["f"]["1.norm.running_mean"]
        assert torch.equal(results[-1]["states"]["f"]["1.norm.running_mean"], statistics)
