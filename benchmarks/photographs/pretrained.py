"""Pretrained features: the first blocks are frozen and run once, the later ones are trained.

What the frozen blocks give is kept in half precision in place of the images, so that a step costs
the later blocks only.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lnl_ext import OptimizerConfig, TrainerConfig
from lnl_ext.data.images import IMAGENET_MEAN, IMAGENET_STD
from lnl_ext.models.efficientnet import (
    EFFICIENTNET_LITE0,
    LITE0_WEIGHTS,
    efficientnet_lite0,
    fold_batch_norm,
)
from lnl_ext.models.weights import load_weights
from lnl_ext.paper.image_networks import SplitNetwork
from lnl_ext.training.batches import Batch, TensorBatches
from lnl_ext.training.methods import Method
from lnl_ext.training.recipe import Recipe

if TYPE_CHECKING:
    from photographs.runs import Cuts, Images, Target, Task

VIEWS = 2  # parts cut out of every training image
_FROZEN, _FEATURES = 8, 11  # blocks: those that are frozen, and those before the features
_CHANNELS, _STRIDE = 112, 16  # of the features
_BATCH = 16  # images that the frozen blocks take at once

RECIPE = Recipe(warm_up=0.1, rise=0.5, head_steps=1, balance=0.0, adjust=False)


def network(classes: int) -> tuple[nn.Module, SplitNetwork]:
    """Make the pretrained network with a new last layer: the frozen blocks, and the others.

    Parameters
    ----------
    classes
        Of the label.

    Returns
    -------
    frozen
        ImageNet-normalised images ``(N, 3, 160, 160)`` to ``(N, 80, 10, 10)``.
    SplitNetwork
        From there to features ``(N, 112, 10, 10)``, and from these to the logits.
    """
    whole = efficientnet_lite0(classes)
    load_weights(whole, EFFICIENTNET_LITE0, LITE0_WEIGHTS)
    fold_batch_norm(whole)
    blocks = whole.get_submodule("_blocks")
    assert isinstance(blocks, nn.Sequential)
    at = [name for name, _ in whole.named_children()].index("_blocks")
    frozen = whole[:at] + blocks[:_FROZEN]
    features, classifier = blocks[_FROZEN:_FEATURES], blocks[_FEATURES:] + whole[at + 1 :]
    return frozen, SplitNetwork(features, classifier, _CHANNELS, _STRIDE)


def config(seed: int, epochs: float) -> TrainerConfig:
    """Return how all methods train; an epoch of the trainer passes over all `VIEWS`."""
    return RECIPE.config(
        epochs=epochs / VIEWS,
        optimizer=OptimizerConfig(name="adam", learning_rate=2e-4, schedule="cosine"),
        average_decay=0.97,
        seed=seed,
        channels_last=True,
    )


class Outputs:
    """Batches of what the frozen blocks gave, as `photographs.runs.Cuts` makes them of images."""

    def training(self, images: Images, targets: Iterable[Target], size: int) -> TensorBatches:
        """Return shuffled batches of this size."""
        return _batches(images, targets, batch_size=size, drop_last=True)

    def evaluation(self, images: Images, targets: Iterable[Target] = ()) -> TensorBatches:
        """Return batches in order."""
        return _batches(images, targets, batch_size=250, shuffle=False)


def _batches(images: Images, targets: Iterable[Target], **options: Any) -> TensorBatches:
    bias = {target.target: images.bias[target.target] for target in targets}
    return TensorBatches(images.images, images.labels, bias, prepare=Tensor.float, **options)


def frozen_task(task: Task, cuts: Cuts, method: Method) -> Task:
    """Return the task with the outputs of the frozen blocks in place of images.

    The training set holds `VIEWS` random parts of every image, always the same ones; their targets
    follow what was cut out.
    """
    frozen, _ = network(len(task.classes))
    targets: list[Target] = [*task.adversaries, task.probe]

    def centres(images: Images) -> Images:
        found, _, bias = outputs(frozen, cuts.evaluation(images, targets), method)
        return dataclasses.replace(images, images=found, bias=images.bias | bias)

    sets = task.sets
    parts = cuts.training(sets.train, targets, _BATCH)
    parts.generator.manual_seed(0)
    views = itertools.chain.from_iterable(itertools.repeat(parts, VIEWS))
    found, labels, bias = outputs(frozen, views, method)
    done = dataclasses.replace(
        sets,
        train=dataclasses.replace(sets.train, images=found, labels=labels, bias=bias),
        opposite=centres(sets.opposite),
        test=centres(sets.test),
        opposite_validation=centres(sets.opposite_validation),
        test_validation=centres(sets.test_validation),
    )
    return dataclasses.replace(task, sets=done)


@torch.no_grad()
def outputs(
    frozen: nn.Module, batches: Iterable[Batch], method: Method
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Run frozen blocks over batches of images as the method sees them.

    Returns
    -------
    outputs
        float16.
    labels, targets
        Of all batches.
    """
    transform = method.image_transform(IMAGENET_MEAN, IMAGENET_STD)
    frozen.eval().to(memory_format=torch.channels_last)
    kept = []
    for images, labels, bias in batches:
        seen = images if transform is None else transform(images)
        part_outputs = [frozen(part).half() for part in torch.split(seen, _BATCH)]
        kept.append((torch.cat(part_outputs), labels, bias))
    found, known, targets = zip(*kept, strict=True)
    bias = {name: torch.cat([target[name] for target in targets]) for name in targets[0]}
    return torch.cat(found), torch.cat(known), bias
