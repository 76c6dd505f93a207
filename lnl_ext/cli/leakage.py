"""How much of each bias a network's features hold, and what the label gives away by itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lnl_ext.adversary.heads import bias_head
from lnl_ext.data.table import IGNORE
from lnl_ext.measuring.evaluation import evaluating
from lnl_ext.measuring.probe import fresh_probe
from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.distributed import gather_rows

__all__ = ["Features", "Leakage", "collect_features", "measure"]

_STEPS = 600  # a probe learns for at least so many steps, however few the images
_BATCH = 64
_EPOCHS = 100  # but passes at most: of a handful of images more is learning by heart


@dataclasses.dataclass(frozen=True)
class Leakage:
    """What a fresh probe tells about a bias.

    Attributes
    ----------
    accuracy : float
        Of the probe on images it has not seen.
    label_only : float
        Of guessing the most frequent bias of the image's label: what the label gives away, and
        with it every feature that is good for the label.
    majority : float
        Of always guessing the most frequent bias.
    information : float
        H(bias) - CE(probe), in nats.
    samples : int
        Images it is measured on.
    """

    accuracy: float
    label_only: float
    majority: float
    information: float
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of samples, on the CPU."""

    features: Tensor
    """(N, ...)."""
    labels: Tensor
    """(N,) int64."""
    bias: dict[str, Tensor]
    """(N,) int64 by column, -100 where missing."""


def collect_features(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Mapping[str, Tensor]]]
) -> Features:
    """Run ``network`` over the batches, shared out among the processes, in evaluation mode."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    kept = []
    with evaluating(network):
        for images, labels, bias in batches:
            kept.append((network(images.to(device)).float().cpu(), labels, bias))
    names = list(kept[0][2])
    return Features(
        gather_rows(torch.cat([features for features, _, _ in kept])),
        gather_rows(torch.cat([labels for _, labels, _ in kept])),
        {name: gather_rows(torch.cat([bias[name] for _, _, bias in kept])) for name in names},
    )


def measure(
    train: Features, test: Features, classes: Mapping[str, Sequence[str]], seed: int
) -> dict[str, Leakage]:
    """Train a fresh probe for every bias on ``train`` and measure it on ``test``.

    A column without a known value in one of the two is left out.
    """
    found = {}
    for name, names in classes.items():
        known = [part.bias[name] != IGNORE for part in (train, test)]
        if not (known[0].sum() > 1 and known[1].any()):
            continue
        (x, y, b), (x_test, y_test, b_test) = (
            (part.features[rows], part.labels[rows], part.bias[name][rows])
            for part, rows in zip((train, test), known, strict=True)
        )
        steps_per_epoch = max(1, len(x) // _BATCH)
        result = fresh_probe(
            nn.Identity(),
            bias_head(tuple(x.shape[1:]), len(names)),
            TensorBatches(x, y, {name: b}, batch_size=1024, shuffle=False),
            TensorBatches(x_test, y_test, {name: b_test}, batch_size=1024, shuffle=False),
            name,
            epochs=min(_EPOCHS, max(6, math.ceil(_STEPS / steps_per_epoch))),
            batch_size=_BATCH,
            seed=seed,
        )
        found[name] = Leakage(
            accuracy=result.accuracy,
            label_only=_label_only(y, b, y_test, b_test, len(names)),
            majority=result.majority,
            information=result.information,
            samples=len(x_test),
        )
    return found


def _label_only(y: Tensor, b: Tensor, y_test: Tensor, b_test: Tensor, classes: int) -> float:
    labels = int(max(y.max(), y_test.max())) + 1
    table = torch.bincount(y * classes + b, minlength=labels * classes).view(labels, classes)
    table = table.where(table.sum(1, keepdim=True) > 0, torch.bincount(b, minlength=classes))
    return (table.argmax(1)[y_test] == b_test).float().mean().item()
