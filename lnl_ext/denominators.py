"""What the means of a batch are divided by, also where the batch is spread over processes.

A mean over a whole batch is not the mean of the means over its parts when these have different
numbers of targets that are not ignored. So the numbers are summed over the processes before the
losses are computed, and every process divides its sums by the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lnl_ext.adversary import BiasAdversary
from lnl_ext.distributed import current


class SiteCounts(NamedTuple):
    """What the means of a bias loss are divided by.

    Both have shape ``(heads, 2)``, for CE and for H: the number of sites that count, for CE with
    class weights the sum of the weights of their targets.
    """

    own: Tensor
    """Of this process's part of the batch."""
    mean: Tensor
    """The mean over the processes."""


class BatchCounts(NamedTuple):
    """The counts of a batch."""

    samples: Tensor
    """0-dim: the number of samples of this process."""
    mean_samples: Tensor
    """0-dim: the mean over the processes."""
    sites: dict[str, SiteCounts]
    """By adversary."""
    processes: int
    """How many processes have a part of the batch."""

    def given(self, name: str, adversary: BiasAdversary) -> Tensor | None:
        """Return the `denominators` for an adversary; None where its own are right.

        The mean over processes of gradients that were divided by the mean of the numbers is the
        gradient of the whole batch; so DistributedDataParallel's mean needs no correction.
        """
        if self.processes == 1:
            return None
        mean = self.sites[name].mean
        if adversary.reduction == "sum":
            return torch.full_like(mean, 1 / self.processes)
        return torch.where(mean == 0, 1.0, mean)


class Term(NamedTuple):
    """A loss term of a batch as two 0-dim tensors, which add up over steps and processes."""

    total: Tensor
    """The mean times its weight."""
    weight: Tensor
    """What the mean is over; 0 where there is nothing, as when all targets are ignored."""


def count_batch(
    labels: Tensor, bias: Mapping[str, Tensor], adversaries: Mapping[str, BiasAdversary]
) -> BatchCounts:
    """Count samples and targets, over all connected processes in one transfer.

    Waits for no CUDA device. With several processes each must call it.

    Parameters
    ----------
    labels
        One per sample.
    bias
        The targets by adversary.
    adversaries
        Which targets to count, and how.
    """
    dtype = torch.float32 if labels.device.type == "mps" else torch.float64
    own = {name: count_sites(a, bias[name], dtype) for name, a in adversaries.items()}
    samples = torch.full((), len(labels), dtype=dtype, device=labels.device)
    _, world_size, _ = current()
    if world_size == 1:
        sites = {name: SiteCounts(counts, counts) for name, counts in own.items()}
        return BatchCounts(samples, samples, sites, 1)
    mean = torch.cat([samples[None], *(counts.flatten() for counts in own.values())])
    dist.all_reduce(mean)
    sizes = [1, *(counts.numel() for counts in own.values())]
    mean_samples, *parts = torch.split(mean / world_size, sizes)
    sites = {
        name: SiteCounts(counts, part.view_as(counts))
        for (name, counts), part in zip(own.items(), parts, strict=True)
    }
    return BatchCounts(samples, mean_samples[0], sites, world_size)


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
