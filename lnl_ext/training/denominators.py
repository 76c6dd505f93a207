"""What the means of a step are divided by, where the step is computed in parts.

A mean over a whole batch is not the mean of the means over its parts when these have different
numbers of targets that are not ignored. The parts are the batches that a step accumulates, and the
shares of the processes. So the targets of all parts are counted before the losses are computed, and
every part divides its sums by the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.training.batches import Batch
from lnl_ext.training.distributed import current


class Term(NamedTuple):
    """A metric of a step as two 0-dim tensors, which add up over steps and processes."""

    total: Tensor
    """The mean times its weight."""
    weight: Tensor
    """What the mean is over; 0 where there is nothing, as when all targets are ignored."""


class Denominators(NamedTuple):
    """What a part divides by. The results of all parts of a process add up to its result.

    The result of the step is the mean of those over the processes. Of gradients it is what
    DistributedDataParallel makes of them.
    """

    samples: Tensor | None
    """0-dim: of the task loss. None in a step of one part, which divides by its own number."""
    sites: dict[str, Tensor]
    """Shape ``(heads, 2)`` by adversary, for `BiasAdversary`; those that need none are left out."""


class Counts(NamedTuple):
    """The counts of a step, over the number of processes; float64 (float32 on MPS)."""

    samples: Tensor
    """0-dim."""
    sites: dict[str, Tensor]
    """Shape ``(heads, 2)`` by adversary: what its means of CE and H are over (`count_sites`)."""
    parts: int
    """The number of parts of the step, in all processes."""


class Counter:
    """Counts the samples and the targets of steps, over all connected processes.

    Parameters
    ----------
    adversaries
        Which targets to count, and how.
    weighted
        Those of which samples have weights: their means are over the samples.
    """

    def __init__(
        self, adversaries: Mapping[str, BiasAdversary], weighted: Collection[str] = ()
    ) -> None:
        self._adversaries = dict(adversaries)
        self._weighted = set(weighted)
        # A batch of which all targets have class weight 0 has 0 / 0 for a gradient, unlike one of
        # which all are ignored.
        self._zero_weighted = {
            name
            for name, adversary in adversaries.items()
            if adversary.weight is not None and bool((adversary.weight == 0).any())
        }

    def count(self, batches: Sequence[Batch]) -> Counts:
        """Count this process's batches of a step, and with several processes theirs as well.

        That is one transfer, which each of them must join. Waits for no CUDA device.
        """
        device = batches[0][1].device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        number = sum(len(labels) for _, labels, _ in batches)
        samples = torch.full((), number, dtype=dtype, device=device)
        sites = {
            name: torch.stack([count_sites(a, bias[name], dtype) for *_, bias in batches]).sum(0)
            for name, a in self._adversaries.items()
        }
        processes = current().world_size
        if processes > 1:
            flat = torch.cat([samples[None], *(counts.flatten() for counts in sites.values())])
            dist.all_reduce(flat)
            lengths = [1, *(counts.numel() for counts in sites.values())]
            total, *parts = torch.split(flat / processes, lengths)
            samples = total[0]
            sites = {
                name: part.view_as(counts)
                for (name, counts), part in zip(sites.items(), parts, strict=True)
            }
        return Counts(samples, sites, processes * len(batches))

    def denominators(self, counts: Counts) -> Denominators:
        """Return what every part of the step divides by."""
        processes, alone = current().world_size, counts.parts == 1
        given = {}
        for name, sites in counts.sites.items():
            if self._adversaries[name].reduction == "sum":
                if processes > 1:  # whose mean is to be the sum
                    given[name] = torch.full_like(sites, 1 / processes)
            elif not alone or name in self._zero_weighted:
                given[name] = torch.where(sites == 0, 1.0, sites)
        return Denominators(None if alone else counts.samples, given)

    def terms(self, counts: Counts, values: Mapping[str, Tensor]) -> dict[str, Term]:
        """Give the results of an objective, added up over this process's parts, their weights.

        A mean over sites weighs what it is over (its mean over the heads), so that the metric of
        an epoch is that over the sites of the epoch; others weigh the samples. With several heads
        a step in which one of them has no site weighs nothing: the sum over the heads lacks one.
        """
        weights = dict.fromkeys(("label_loss", "label_accuracy"), counts.samples)
        for name, sites in counts.sites.items():
            known, counted = sites.mean(0), (sites > 0).all(0)
            by_cross_entropy, by_entropy = (known * counted).unbind()
            if self._adversaries[name].reduction == "sum" or name in self._weighted:
                by_cross_entropy = by_entropy = counts.samples
            weights[f"{name}_cross_entropy"] = weights[f"{name}_loss"] = by_cross_entropy
            weights[f"{name}_entropy"] = by_entropy
        return {
            key: Term(torch.where(weights[key] == 0, 0.0, value * weights[key]), weights[key])
            for key, value in values.items()
        }


def count_sites(adversary: BiasAdversary, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``(heads, 2)``: what the adversary's means of CE and H over ``target`` divide by.

    Parameters
    ----------
    adversary
        Its options decide what counts.
    target
        Class indices ``(N, *S)``, ``(N, heads, *S)`` for several heads, or probabilities
        ``(N, heads * C, *S)``.
    dtype
        Of the result.

    Raises
    ------
    ValueError
        If the shape of the indices does not fit the number of heads.
    """
    heads = adversary.heads
    if target.is_floating_point():
        number = len(target) * math.prod(target.shape[2:])
        return target.new_full((heads, 2), number, dtype=dtype)
    if heads > 1 and (target.dim() < 2 or target.shape[1] != heads):
        raise ValueError(
            f"target has shape {tuple(target.shape)}, expected (N, {heads}, ...) for {heads} heads"
        )
    index = target.reshape(len(target), heads, math.prod(target.shape[1 + (heads > 1) :]))
    valid = index != adversary.ignore_index
    known = valid.sum((0, 2)).to(dtype)
    counted = known
    if adversary.weight is not None:
        # A class that is out of range is the loss's error to report.
        classes = index.clamp(0, len(adversary.weight) - 1)
        counted = (adversary.weight.to(dtype)[classes] * valid).sum((0, 2))
    sites = known if adversary.mask_entropy else torch.full_like(known, len(index) * index.shape[2])
    return torch.stack([counted, sites], dim=1)
