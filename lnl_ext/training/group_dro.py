"""Group DRO: the label loss of the worst group (Sagawa et al., ICLR 2020, arXiv 1911.08731)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lnl_ext.ops.checks import check_number
from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.training.distributed import sum_over_processes

__all__ = ["GroupDRO"]


class GroupDRO(nn.Module):
    """Weights of the groups that follow their losses, by exponentiated gradient ascent.

    Algorithm 1 of the paper: after every batch the weight q of each group is multiplied by
    ``exp(step_size * loss of the group)`` and all are divided by their sum; the label loss is
    ``sum over groups of q * mean loss of the group in the batch``. A group that is not in the batch
    counts as one of loss 0. The paper draws every group as often: train with
    ``TrainerConfig(balance=True)``.

    Parameters
    ----------
    groups
        The number of groups, at least 1.
    target
        Under which name the batches' bias targets have the group of every sample: ``(N,)`` int64
        (`lnl_ext.training.balance.group_numbers`). Samples of group -100 weigh as without it.
    step_size
        The paper's eta, > 0; 0.01 is that of the authors' code.

    Attributes
    ----------
    group_weights : Tensor
        ``(groups,)`` float32, the buffer q; it is in the checkpoint.

    Examples
    --------
    >>> numbers = group_numbers(labels, bias)
    >>> batches = TensorBatches(images, labels, {"group": numbers}, batch_size=64)
    >>> trainer = Trainer(f, g, None, TrainerConfig(balance=True), task_weights=GroupDRO(4))
    """

    group_weights: Tensor

    def __init__(self, groups: int, *, target: str = "group", step_size: float = 0.01) -> None:
        super().__init__()
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
            raise ValueError(f"groups is {groups!r}, expected an int of at least 1")
        check_number("step_size", step_size, positive=True)
        self.target = target
        self.step_size = step_size
        self.register_buffer("group_weights", torch.full((groups,), 1 / groups))

    def forward(self, losses: Tensor, groups: Tensor) -> Tensor:
        """Move the groups' weights, and return those of the samples in the batch's mean loss.

        Parameters
        ----------
        losses
            ``(N,)``, of every sample. With several processes each calls it with its share, and
            groups are those of the whole batch.
        groups
            ``(N,)`` int64.

        Returns
        -------
        Tensor
            ``(N,)`` float32: q times the number of samples over that of the sample's group.
        """
        losses, known = losses.detach().float(), groups != IGNORE_INDEX
        index = groups.where(known, 0)
        totals = losses.new_zeros(2, len(self.group_weights))
        totals.index_add_(1, index, torch.stack([losses.where(known, 0.0), known.float()]))
        sums, counts = sum_over_processes(totals)
        means = sums / counts.clamp(min=1)
        weights = self.group_weights * (self.step_size * means).exp()
        self.group_weights.copy_(weights / weights.sum())
        each = self.group_weights * counts.sum() / counts.clamp(min=1)
        weight: Tensor = each[index].where(known, 1.0)
        return weight
