"""A run of linear networks, which learn the same however a batch is split; with missing targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.config import OptimizerConfig, TrainerConfig
from lnl_ext.training.trainer import Trainer

SAMPLES, BATCH, BINS, HEADS = 20, 4, 5, 3


class Problem:
    """Linear networks, without batch norm: what they learn does not depend on the batching."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(SAMPLES, 6, generator=generator).double()
        self.labels = torch.randint(3, (SAMPLES,), generator=generator)
        self.one = torch.randint(BINS, (SAMPLES,), generator=generator)
        self.many = torch.randint(BINS, (SAMPLES, HEADS), generator=generator)
        self.one[torch.rand(SAMPLES, generator=generator) < 0.3] = IGNORE_INDEX
        self.one[BATCH : 2 * BATCH] = IGNORE_INDEX  # the whole second batch
        torch.manual_seed(2)
        self.features, self.classifier = nn.Linear(6, 4).double(), nn.Linear(4, 3).double()
        self.heads = {
            "one": nn.Linear(4, BINS).double(),
            "many": nn.Linear(4, HEADS * BINS).double(),
        }

    def adversary(self, name: str, **options: Any) -> BiasAdversary:
        heads = HEADS if name == "many" else 1
        given = {"reversal": 0.5, "entropy_weight": 0.2, "heads": heads, **options}
        return BiasAdversary(self.heads[name], **given)

    def fit(
        self,
        adversaries: dict[str, BiasAdversary],
        rate: float = 0.1,
        batch: int = BATCH,
        output: Path | None = None,
        kind: type[TensorBatches] = TensorBatches,
        **config: Any,
    ) -> dict[str, Any]:
        """Train, one epoch by default, and return the last record."""
        sgd = OptimizerConfig("sgd", learning_rate=rate)
        trainer = Trainer(
            self.features,
            self.classifier,
            adversaries,
            TrainerConfig(optimizer=sgd, head_optimizer=sgd, **config),
        )
        bias = {"one": self.one, "many": self.many}
        batches = kind(self.images, self.labels, bias, batch_size=batch, shuffle=False)
        return trainer.fit(batches, output=output, progress=False)[-1]

    def weights(self) -> dict[str, Any]:
        return {"f": self.features.state_dict(), "g": self.classifier.state_dict()}

    def head_cross_entropy(self) -> Tensor:
        return F.cross_entropy(self.heads["one"](self.features(self.images)), self.one)
