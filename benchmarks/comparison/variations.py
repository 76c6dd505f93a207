"""What was tried beside the recipe of `lnl`: the same training as a plain loop, with variations."""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from comparison.data_sets import Data
from comparison.networks import network
from comparison.protocol import DATA_SETS, VARIATIONS, Variation
from comparison.ways import OPTIMIZER, Trained
from lnl_ext import independence_weights, logit_adjustment
from lnl_ext.adversary.heads import bias_head
from lnl_ext.training.balance import balanced_weights
from lnl_ext.training.head_steps import KEPT
from lnl_ext.training.recipe import LNL


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch as the heads see it."""

    features: Tensor
    bias: Tensor
    weight: Tensor
    """(N,) under which label and bias are independent."""


def train(data: Data, name: str, seed: int) -> Trained:
    """Train one variation from new weights, with the numbers of `LNL`."""
    variation, part, length = VARIATIONS[name], data.train, DATA_SETS[data.name]
    torch.manual_seed(seed)
    features, classifier = network(tuple(part.inputs.shape[1:]), data.classes)
    if variation.width is not None:
        narrow = nn.Linear(classifier.in_features, variation.width)
        features = nn.Sequential(features, narrow, nn.ReLU())
        classifier = nn.Linear(variation.width, data.classes)
    classes = int(part.bias.max()) + 1
    heads = nn.ModuleList(
        bias_head((classifier.in_features,), classes, sizes=LNL.head_sizes)
        for _ in range(variation.heads)
    )
    balance = LNL.balance if variation.balance is None else variation.balance
    draws = balanced_weights(part.labels, part.bias) ** balance
    adjustment = logit_adjustment(part.labels, part.bias, weights=draws)
    if not variation.adjust:
        adjustment.zero_()
    weights = independence_weights(part.labels, part.bias, weights=draws)
    steps_per_epoch = len(part) // length.batch_size
    steps = length.epochs * steps_per_epoch
    optimizer = OPTIMIZER.build([*features.parameters(), *classifier.parameters()])
    scheduler = OPTIMIZER.build_scheduler(optimizer, steps, steps_per_epoch)
    head_optimizer = LNL.config().head_optimizer.build(heads.parameters()) if heads else None
    recent: list[Batch] = []
    began = time.monotonic()
    for step in range(steps):
        if step % steps_per_epoch == 0:
            order = torch.multinomial(draws, len(part), replacement=True)
        rows = order[step % steps_per_epoch * length.batch_size :][: length.batch_size]
        hidden = features(data.augment(part.inputs[rows]))
        loss = F.cross_entropy(classifier(hidden) + adjustment[rows], part.labels[rows])
        strength = LNL.strength(step / steps)
        if heads and strength > 0:
            seen = Batch(hidden, part.bias[rows], weights[rows])
            loss = loss - strength * pressure(heads, seen, variation, classes)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        scheduler.step()
        if head_optimizer is None:
            continue
        recent = [*recent, Batch(hidden.detach(), part.bias[rows], weights[rows])][-KEPT:]
        drawn = torch.randint(len(recent), (LNL.head_steps,)).tolist()
        for batch in [recent[-1], *(recent[number] for number in drawn)]:
            head_optimizer.zero_grad()
            losses = [weighed_mean(cross_entropies(head, batch), batch) for head in heads]
            torch.autograd.backward(losses)
            head_optimizer.step()
        if variation.renew and (step + 1) % variation.renew == 0:
            renew(heads[(step + 1) // variation.renew % len(heads)], head_optimizer)
    seconds = time.monotonic() - began
    return Trained(features.eval(), classifier.eval(), steps, seconds)


def pressure(heads: nn.ModuleList, batch: Batch, variation: Variation, classes: int) -> Tensor:
    """Return what the features are to make large: the heads' mean losses, less the penalty."""
    total = batch.features.new_zeros(())
    if variation.hsic:
        total = total - variation.hsic * weighed_hsic(batch, classes)
    for head in heads:
        frozen = {name: weight.detach() for name, weight in head.named_parameters()}
        log_p = torch.func.functional_call(head, frozen, batch.features).log_softmax(1)
        cross_entropy = F.nll_loss(log_p, batch.bias, reduction="none")
        entropy = -(log_p.exp() * log_p).sum(1)
        both = LNL.reversal * cross_entropy + LNL.entropy_weight * entropy
        total = total + weighed_mean(both, batch) / len(heads)
    return total


def cross_entropies(head: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of every sample."""
    return F.cross_entropy(head(batch.features), batch.bias, reduction="none")


def weighed_mean(values: Tensor, batch: Batch) -> Tensor:
    """Return the mean over the samples of what each weighs."""
    return (values * batch.weight).mean()


def weighed_hsic(batch: Batch, classes: int) -> Tensor:
    """Return the dependence of features and bias: HSIC (Gretton et al. 2005) of weighed samples.

    A Gaussian kernel as wide as the median distance for the features; equality for the bias.
    """
    share = batch.weight / batch.weight.sum()
    squared = torch.cdist(batch.features, batch.features).square()
    kernel = torch.exp(-squared / (squared.detach().median() + 1e-6))
    bias = F.one_hot(batch.bias, classes).to(kernel.dtype)
    centred = torch.eye(len(share)) - share
    products = (centred @ kernel @ centred.T) * (centred @ (bias @ bias.T) @ centred.T)
    return share @ products @ share


def renew(head: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Start a head anew, with its optimiser's state."""
    for module in head.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    for parameter in head.parameters():
        optimizer.state.pop(parameter, None)
