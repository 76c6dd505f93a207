"""The order of the samples in a pass, and which of them this process takes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from lnl_ext.training import distributed


class ShardedBatchSampler(Sampler[list[int]]):
    """Batches of sample numbers; of every batch this process takes its share.

    All processes draw the same order, cut it into batches of ``batch_size``, and take every
    ``world_size``-th sample of each. So W processes see together, step by step, the batches that
    one process with the same ``batch_size`` sees. For
    ``DataLoader(dataset, batch_sampler=ShardedBatchSampler(...))``.

    Parameters
    ----------
    samples : int
        Size of the data set.
    batch_size : int
        Samples per step of all processes together, at least one for each.
    shuffle : bool
        A new order for every pass, drawn from ``generator``.
    drop_last : bool
        Leave out the last batch when it is smaller than ``batch_size``. Where it has fewer samples
        than there are processes it is left out in any case, since one of them would have nothing.
    processes : Processes, optional
        By default those of :func:`lnl_ext.training.distributed.current`.

    Attributes
    ----------
    generator : torch.Generator
        The only source of the order. The trainer seeds it when a run starts, alike in all
        processes, and keeps its state in the checkpoint.

    Raises
    ------
    ValueError
        If ``batch_size`` is no whole number or too small, or there is not a single batch.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        processes: distributed.Processes | None = None,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}")
        processes = distributed.current() if processes is None else processes
        self.rank, self.world_size, _ = processes
        if batch_size < self.world_size:
            raise ValueError(
                f"batch_size is {batch_size} for {self.world_size} processes: it counts the "
                "samples of all processes together, and each needs one"
            )
        self.samples = samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        if samples > 0 and len(self) == 0:
            why = "with drop_last" if drop_last else f"for {self.world_size} processes"
            raise ValueError(f"batch_size {batch_size} {why} leaves no batch of {samples} samples")
        self.generator = torch.Generator()

    def __len__(self) -> int:
        """Return the number of batches in a pass."""
        full, rest = divmod(self.samples, self.batch_size)
        return full + (1 if rest >= self.world_size and not self.drop_last else 0)

    def slices(self) -> Iterator[slice]:
        """Where this process's share of each batch lies in the order."""
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            stop = min(start + self.batch_size, self.samples)
            yield slice(start + self.rank, stop, self.world_size)

    def order(self) -> torch.Tensor | None:
        """Draw the order of a pass; None without ``shuffle``."""
        if not self.shuffle:
            return None
        return torch.randperm(self.samples, generator=self.generator)

    def __iter__(self) -> Iterator[list[int]]:
        """One pass; the order is drawn before the first batch."""
        order = self.order()
        for share in self.slices():
            if order is None:
                yield list(range(share.start, share.stop, share.step))
            else:
                yield order[share].tolist()
