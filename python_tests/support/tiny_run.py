"""A run small enough for tests, in which everything that has a state draws on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.schedules import Linear
from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.config import OptimizerConfig, TrainerConfig
from lnl_ext.training.trainer import Trainer

SAMPLES, BATCH, CLASSES, BINS = 22, 4, 3, 4
STEPS_PER_EPOCH = 6  # the last batch has 2 samples

CONFIG: dict[str, Any] = {
    "epochs": 2.0,
    "strength": Linear(begin=2.5 / 12, finish=8 / 12),  # 0 in the first 3 of 12 steps
    "optimizer": OptimizerConfig(name="adam", learning_rate=0.01, schedule="cosine"),
    "head_optimizer": OptimizerConfig(
        name="sgd", learning_rate=0.05, momentum=0.9, schedule="step", decay_epochs=0.5
    ),
    "average_decay": 0.8,
    "seed": 3,
}


def tiny_data() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Images (N, 3, 8, 8), labels, and targets of a head per pixel and a head per image."""
    generator = torch.Generator().manual_seed(11)
    return (
        torch.randn(SAMPLES, 3, 8, 8, generator=generator),
        torch.randint(CLASSES, (SAMPLES,), generator=generator),
        {
            "pixel": torch.randint(BINS, (SAMPLES, 3, 4, 4), generator=generator),
            "image": torch.randint(BINS, (SAMPLES,), generator=generator),
        },
    )


def tiny_batches(**options: Any) -> TensorBatches:
    """Shuffled batches of the tiny data."""
    return TensorBatches(*tiny_data(), batch_size=BATCH, **options)


def tiny_networks(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Features with batch norm and dropout, and a classifier with batch norm."""
    torch.manual_seed(5)
    features = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1)
    )
    classifier = nn.Sequential(
        nn.Conv2d(8, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, CLASSES)
    )
    return features.to(dtype), classifier.to(dtype)


def tiny_heads(dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """A head per pixel (three channels side by side) and a head per image."""
    torch.manual_seed(7)
    return {
        "pixel": nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3 * BINS, 1)
        ).to(dtype),
        "image": nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, BINS)
        ).to(dtype),
    }


def tiny_trainer(
    adversary: Callable[..., BiasAdversary] = BiasAdversary, **changes: Any
) -> Trainer:
    """A trainer with two adversaries; their coefficients are schedules unless changed."""
    heads = tiny_heads()
    adversaries = {
        "pixel": adversary(heads["pixel"], reversal=0.3, entropy_weight=0.05, heads=3),
        "image": adversary(heads["image"], reversal=ramp(0.5), entropy_weight=ramp(0.1)),
    }
    return Trainer(*tiny_networks(), adversaries, TrainerConfig(**{**CONFIG, **changes}))


def ramp(top: float) -> Callable[[float], float]:
    """A straight line from 0 to ``top``."""
    return lambda t: top * t


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of nested containers by its path, so that a difference has a name."""
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, (list, tuple)):
        items = enumerate(state)
    else:
        return {prefix: state}
    leaves = {}
    for key, value in items:
        leaves |= flat(value, f"{prefix}/{key}")
    return leaves


def differences(first: Any, second: Any) -> list[str]:
    """Paths at which two nested states differ; clocks are left out."""
    one, two = flat(first), flat(second)
    found = sorted(one.keys() ^ two.keys())
    for path in one.keys() & two.keys():
        a, b = one[path], two[path]
        if path.endswith("seconds"):
            continue
        same = torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b
        if not same:
            found.append(path)
    return found
