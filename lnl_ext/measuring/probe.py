"""Leakage: how well a *fresh* head predicts the bias from frozen features.

The adversary's own cross-entropy does not measure it: a head that is fooled today may only be one
that the features have learned to evade, while the bias is still there for another to find.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lnl_ext.measuring.evaluation import evaluating

__all__ = ["ProbeResult", "fresh_copy", "fresh_probe", "per_head"]

Batches = Iterable[tuple[Tensor, Tensor, Mapping[str, Tensor]]]


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """What a fresh head can tell about the bias. Every figure is a mean over the heads.

    Attributes
    ----------
    accuracy : float
        Share of right predictions on held-out samples, ignored targets left out: the leakage.
    majority : float
        Accuracy of always predicting the class that is most frequent in the samples the probe
        learned from: what features without any bias give.
    cross_entropy : float
        Of the probe on held-out samples, in nats.
    entropy : float
        Cross-entropy, on the same samples, of predicting the class frequencies of the samples the
        probe learned from, in nats.
    """

    accuracy: float
    majority: float
    cross_entropy: float
    entropy: float

    @property
    def information(self) -> float:
        """Estimated lower bound, in nats, of the mutual information of features and bias."""
        return self.entropy - self.cross_entropy


def fresh_probe(
    features: nn.Module,
    head: nn.Module,
    train: Batches,
    test: Batches,
    target: str,
    *,
    heads: int = 1,
    epochs: int = 6,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> ProbeResult:
    """Train a new head on frozen features and measure it on samples it has not seen.

    Use sets in which the bias does not follow the label, else the label alone predicts it.

    Parameters
    ----------
    features
        Images to features; run in evaluation mode and without gradients, and left as it was.
    head
        Features to logits ``(N, heads * C, *S)``. The module is copied, the copy's parameters
        drawn anew (see `fresh_copy`).
    train, test
        Batches ``(images, labels, {name: bias target})``. The features of ``train`` are kept in
        memory.
    target
        The name of the bias target: ``(N, heads, *S)`` int64, or ``(N, *S)`` for ``heads=1``;
        -100 is ignored.
    heads
        Number of predictions per sample.
    epochs, batch_size, learning_rate
        Adam with a cosine decay of its rate to zero.
    seed
        Seeds the head's parameters and the order of the samples. The global generator is not
        touched.

    Returns
    -------
    ProbeResult

    Raises
    ------
    ValueError
        ``train`` or ``test`` has no batch, or no target that is not ignored; a parameter of
        ``head`` cannot be drawn anew.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = fresh_copy(head)
        frozen = _Frozen(features, target, heads)
        inputs, targets = frozen.all(train)
        order = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(probe.parameters(), lr=learning_rate)
        full = len(inputs) - len(inputs) % batch_size if len(inputs) > batch_size else len(inputs)
        steps = epochs * -(-full // batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        probe.train()
        for _ in range(epochs):
            # An incomplete last batch is dropped: batch norm cannot take a batch of one.
            shuffled = torch.randperm(len(inputs), generator=order)[:full].to(inputs.device)
            for rows in torch.split(shuffled, batch_size):
                logits = per_head(probe(inputs[rows]), heads)
                loss = F.cross_entropy(logits, targets[rows])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
        return _measure(probe.eval(), frozen, targets, test, heads)


def fresh_copy(head: nn.Module) -> nn.Module:
    """Copy ``head`` and draw the copy's parameters anew, from torch's global generator.

    Every submodule with ``reset_parameters`` (or ``_reset_parameters``, as attention has it) is
    reset, after those inside it; all parameters require a gradient.

    Raises
    ------
    ValueError
        A parameter, or a persistent floating-point buffer, is not set by these methods: it would
        keep what it has learned.
    """
    probe = copy.deepcopy(head)
    values = {
        name: value
        for name, value in probe.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
        and not nn.parameter.is_lazy(value)
        and (value.is_floating_point() or value.is_complex())
    }
    with torch.no_grad():
        for value in values.values():
            value.fill_(math.nan)
        _reset(probe)
        kept = [name for name, value in values.items() if value.isnan().any()]
    if kept:
        raise ValueError(
            f"head has {', '.join(kept)}, which no reset_parameters of its modules sets: a fresh "
            "probe would not be fresh. Give their module such a method, or make constant buffers "
            "persistent=False"
        )
    for parameter in probe.parameters():
        parameter.requires_grad_(True)
    return probe


def _reset(module: nn.Module) -> None:
    """Reset the modules inside, then the module itself, which may have its own wishes for them."""
    for child in module.children():
        _reset(child)
    for name in ("reset_parameters", "_reset_parameters"):
        reset = getattr(module, name, None)
        if callable(reset):
            reset()
            return


def per_head(logits: Tensor, heads: int) -> Tensor:
    """Turn logits ``(N, heads * C, *S)`` into ``(N, C, heads, S)``, as cross_entropy wants them."""
    return logits.reshape(len(logits), heads, logits.shape[1] // heads, -1).transpose(1, 2)


class _Frozen:
    """Features and targets of batches."""

    def __init__(self, features: nn.Module, target: str, heads: int) -> None:
        self.features, self.target, self.heads = features, target, heads

    def each(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        with evaluating(self.features):
            for images, _, bias in batches:
                targets = bias[self.target]
                # (N, heads, S) in any case, also where the only head has no axis of its own.
                yield self.features(images), targets.reshape(len(targets), self.heads, -1)

    def all(self, batches: Batches) -> tuple[Tensor, Tensor]:
        pairs = list(self.each(batches))
        if not pairs:
            raise ValueError("train has no batch")
        return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])


def _measure(
    probe: nn.Module, frozen: _Frozen, fitted: Tensor, test: Batches, heads: int
) -> ProbeResult:
    totals: Tensor | None = None
    with torch.no_grad():
        for inputs, targets in frozen.each(test):
            logits = per_head(probe(inputs), heads).float()
            if totals is None:
                classes = logits.shape[1]
                prior = torch.stack([_frequencies(t, classes) for t in fitted.unbind(1)])
                common, log_prior = prior.argmax(1), prior.log()
                totals = torch.zeros(heads, 5, dtype=torch.float64)
            nats = F.cross_entropy(logits, targets, reduction="none")
            right = logits.argmax(1) == targets
            for head in range(heads):
                known = targets[:, head] != -100
                chosen = targets[:, head][known]
                totals[head] += torch.stack(
                    [
                        known.sum().double(),
                        right[:, head][known].sum().double(),
                        (chosen == common[head]).sum().double(),
                        nats[:, head][known].sum().double(),
                        -log_prior[head][chosen].sum().double(),
                    ]
                ).cpu()
    if totals is None:
        raise ValueError("test has no batch")
    if (totals[:, 0] == 0).any():
        raise ValueError("test has a head without a single target that is not ignored")
    accuracy, majority, nats, entropy = (totals[:, 1:] / totals[:, :1]).mean(0).tolist()
    return ProbeResult(accuracy, majority, nats, entropy)


def _frequencies(targets: Tensor, classes: int) -> Tensor:
    """Class frequencies with one added to each count, so that no class is impossible."""
    known = targets[targets != -100]
    if not len(known):
        raise ValueError("train has a head without a single target that is not ignored")
    counts = torch.bincount(known, minlength=classes).double() + 1
    return counts / counts.sum()
