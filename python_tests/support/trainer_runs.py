"""Tiny runs that are watched, killed or compared: what the tests of the trainer share."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_run import (
    BATCH,
    SAMPLES,
    tiny_batches,
    tiny_data,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lnl_ext.measuring.evaluation import predict
from lnl_ext.training.balance import balanced_weights
from lnl_ext.training.config import OptimizerConfig
from lnl_ext.training.trainer import Trainer

STEPS = 12  # of the tiny run: two epochs


# Adam would turn the rounding noise of a gradient that is zero (a bias before batch norm) to steps.
SGD = OptimizerConfig("sgd", learning_rate=0.05)


class Kill(Exception):  # noqa: N818 - it is no error
    """Ends a run from within."""


class Watched:
    """Batches that call ``before`` each time the trainer asks for one."""

    def __init__(self, batches: Any, before: Callable[[], None]) -> None:
        self.batches, self.before = batches, before
        self.generator = getattr(batches, "generator", None)
        self.weights = getattr(batches, "weights", None)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.before()
            yield batch


def killing(batches: Any, trainer: Trainer, step: int) -> Watched:
    """Batches that kill the run when it asks for one after ``step`` steps."""

    def kill() -> None:
        if trainer.step >= step:
            raise Kill

    return Watched(batches, kill)


class Augmented(Dataset):
    """Samples that draw from every global generator, as augmentations do."""

    def __init__(self) -> None:
        self.images, self.labels, self.bias = tiny_data()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        bias = {name: target[index] for name, target in self.bias.items()}
        return self.images[index] + noise, self.labels[index], bias


def loader(kind: str) -> Any:
    """Batches of the tiny data from a source of some kind."""
    if kind == "tensors":
        return tiny_batches()
    if kind == "balanced":
        _, labels, bias = tiny_data()
        return tiny_batches(weights=balanced_weights(labels, bias["image"]))
    if kind == "list":
        return list(tiny_batches(shuffle=False))
    options: dict[str, Any] = {"batch_size": BATCH, "shuffle": True}
    if kind == "loader with generator":
        options["generator"] = torch.Generator()
    if kind == "loader with workers":
        options |= {"num_workers": 2, "multiprocessing_context": "fork"}
    return DataLoader(Augmented(), **options)


def evaluate(trainer: Trainer) -> dict[str, float]:
    """An evaluation that draws random numbers, as a probe would."""
    model = nn.Sequential(*trainer.inference_modules())
    test = tiny_batches(shuffle=False)
    return {"accuracy": predict(model, test).accuracy, "draw": torch.rand(()).item()}


def without_dropout(trainer: Trainer) -> Trainer:
    """Take out what draws differently in another layout, precision or compilation."""
    for module in (trainer.features, *trainer.adversaries.values()):
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    return trainer


def metrics(folder: Path) -> list[dict]:
    """Records of a run without their clocks."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]
