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

from lnl_ext.adversary.bias_adversary import BiasAdversary
from lnl_ext.training.distributed import current


class Term(NamedTuple):
    """A figure of a batch as two 0-dim tensors, which add up over steps and processes."""

    total: Tensor
    """The mean times its weight."""
    weight: Tensor
    """What the mean is over; 0 where there is nothing, as when all targets are ignored."""


class Shares(NamedTuple):
    """What makes the losses of a part of a batch add up to those of the whole."""

    task: Tensor
    """0-dim: the factor of the task loss, a mean over this process's samples."""
    denominators: dict[str, Tensor]
    """For `BiasAdversary`, by adversary; those that need none are left out."""


class BatchCounts(NamedTuple):
    """The counts of a batch, float64 (float32 on MPS)."""

    samples: Tensor
    """0-dim: the number of samples of this process."""
    mean_samples: Tensor
    """0-dim: the mean over the processes."""
    sites: dict[str, Tensor]
    """Shape ``(heads, 2)`` by adversary: what its means of CE and H are over (`count_sites`); the
    mean over the processes."""


class BatchCounter:
    """Counts the samples and the targets of batches, over all connected processes.

    Parameters
    ----------
    adversaries
        Which targets to count, and how.
    """

    def __init__(self, adversaries: Mapping[str, BiasAdversary]) -> None:
        self._adversaries = dict(adversaries)
        # A batch of which all targets have class weight 0 has 0 / 0 for a gradient, unlike one of
        # which all are ignored.
        self._zero_weighted = {
            name
            for name, adversary in adversaries.items()
            if adversary.weight is not None and bool((adversary.weight == 0).any())
        }

    def count(self, labels: Tensor, bias: Mapping[str, Tensor]) -> BatchCounts:
        """Count a batch, with several processes in one transfer that each of them must join.

        Waits for no CUDA device.

        Parameters
        ----------
        labels
            One per sample.
        bias
            The targets by adversary.
        """
        dtype = torch.float32 if labels.device.type == "mps" else torch.float64
        sites = {n: count_sites(a, bias[n], dtype) for n, a in self._adversaries.items()}
        samples = torch.full((), len(labels), dtype=dtype, device=labels.device)
        processes = current().world_size
        if processes == 1:
            return BatchCounts(samples, samples, sites)
        mean = torch.cat([samples[None], *(counts.flatten() for counts in sites.values())])
        dist.all_reduce(mean)
        sizes = [1, *(counts.numel() for counts in sites.values())]
        mean_samples, *parts = torch.split(mean / processes, sizes)
        pairs = zip(sites.items(), parts, strict=True)
        sites = {name: part.view_as(counts) for (name, counts), part in pairs}
        return BatchCounts(samples, mean_samples[0], sites)

    def shares(self, counts: BatchCounts) -> Shares | None:
        """Return what the objectives need to know; None where every mean is right by itself.

        The mean over processes of gradients that were divided by the mean of the numbers is the
        gradient of the whole batch; so DistributedDataParallel's mean needs no correction.
        """
        processes = current().world_size
        if processes == 1 and not self._zero_weighted:
            return None
        denominators = {}
        for name, sites in counts.sites.items():
            if self._adversaries[name].reduction == "sum":
                given = torch.full_like(sites, 1 / processes)
            else:
                given = torch.where(sites == 0, 1.0, sites)
            if processes > 1 or name in self._zero_weighted:
                denominators[name] = given
        return Shares(counts.samples / counts.mean_samples, denominators)

    def terms(self, counts: BatchCounts, values: Mapping[str, Tensor]) -> dict[str, Term]:
        """Give the values of an objective their weights.

        A mean over sites weighs what it is over (its mean over the heads), so that the figure of
        an epoch is that over the sites of the epoch; a sum weighs the samples. With several heads
        a batch in which one of them has no site weighs nothing: the sum over the heads lacks one.
        """
        weights = dict.fromkeys(("label_loss", "label_accuracy"), counts.samples)
        for name, sites in counts.sites.items():
            known, counted = sites.mean(0), (sites > 0).all(0)
            by_cross_entropy, by_entropy = (known * counted).unbind()
            if self._adversaries[name].reduction == "sum":
                by_cross_entropy = by_entropy = counts.mean_samples
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
