"""Where batches come from, and passes over them that can be left and entered at any step."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lnl_ext.training import distributed
from lnl_ext.training.balance import draws
from lnl_ext.training.checkpoint import capture_random_state, restore_random_state
from lnl_ext.training.target_names import ADJUSTMENT, by_name

Batch = tuple[Tensor, Tensor, dict[str, Tensor]]
"""``(images (N, ...), labels (N,) int64, {adversary: bias target})``."""


class ShardedBatchSampler(Sampler[list[int]]):
    """Batches of sample numbers; of every batch this process takes its share.

    All processes draw the same order, cut it into batches of ``batch_size``, and take every
    ``world_size``-th sample of each. So W processes see together, step by step, the batches that
    one process with the same ``batch_size`` sees. `torch.utils.data.DistributedSampler` does not:
    it repeats samples, or leaves some out, where their number is not a multiple of W. For
    ``DataLoader(dataset, batch_sampler=ShardedBatchSampler(...))``.

    Parameters
    ----------
    samples : int
        Size of the data set.
    batch_size : int
        Samples per batch of all processes together, at least one for each.
    shuffle : bool
        A new order for every pass, drawn from ``generator``.
    drop_last : bool
        Leave out the last batch when it is smaller than ``batch_size``. Where it has fewer samples
        than there are processes it is left out in any case, since one of them would have nothing.
    weights : Tensor, shape (samples,), optional
        Draw every sample of a pass anew, with replacement, in proportion to these weights >= 0
        (`lnl_ext.training.balance.balanced_weights`); needs ``shuffle``.
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
        If ``batch_size`` is not a whole number or is too small, or there is not a single batch.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        weights: Tensor | None = None,
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
        if weights is not None:
            if weights.shape != (samples,):
                raise ValueError(
                    f"weights has shape {tuple(weights.shape)}, expected ({samples},), one a sample"
                )
            if not shuffle:
                raise ValueError("weights are for drawing samples: shuffle=False has an order")
        self.samples = samples
        self.batch_size = batch_size
        self.weights = weights
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

    def shares(self, device: torch.device | None = None) -> Iterator[Tensor]:
        """One pass over this process's sample numbers; the order is drawn before the first batch.

        Parameters
        ----------
        device
            Where the numbers are to be; the CPU by default.
        """
        if self.weights is not None:
            order = torch.multinomial(
                self.weights.cpu(), self.samples, replacement=True, generator=self.generator
            )
        elif self.shuffle:
            order = torch.randperm(self.samples, generator=self.generator)
        else:
            order = torch.arange(self.samples)
        order = order.to(device)
        for number in range(len(self)):
            start = number * self.batch_size
            yield order[start : start + self.batch_size][self.rank :: self.world_size]

    def __iter__(self) -> Iterator[list[int]]:
        """One pass; the order is drawn before the first batch."""
        for share in self.shares():
            yield share.tolist()


class TensorBatches:
    """Batches from tensors in memory: what a DataLoader does, without a call per sample.

    Parameters
    ----------
    images : Tensor, shape (M, ...)
        Any dtype; ``prepare`` turns a batch of them into what the network takes.
    labels : Tensor, shape (M,), integer
    bias : mapping of str to Tensor, shape (M, ...), optional
        One bias target per adversary.
    batch_size, shuffle, drop_last, weights
        As for `ShardedBatchSampler`, which decides on the order and, with several processes, on
        this process's share of every batch.
    prepare : callable, optional
        Maps a batch of images (on its device, after selection) to network input, for instance
        uint8 to normalised float.

    Attributes
    ----------
    generator : torch.Generator
        The only source of the order. The trainer seeds it when a run starts and keeps its state
        in the checkpoint.

    Notes
    -----
    Integer labels and bias targets of any width come out as int64, which the losses ask for;
    the stored ones may be uint8 to save memory.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        bias: Mapping[str, Tensor] | None = None,
        *,
        batch_size: int,
        shuffle: bool = True,
        drop_last: bool = False,
        weights: Tensor | None = None,
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.bias = by_name("bias", bias)
        named = {"labels": labels, **{f"bias[{name!r}]": b for name, b in self.bias.items()}}
        for name, tensor in named.items():
            if tensor.dim() == 0 or len(tensor) != len(images):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {len(images)} rows as images"
                )
        self.images = images
        self.labels = labels
        self.prepare = prepare
        self._sampler = ShardedBatchSampler(
            len(images), batch_size, shuffle=shuffle, drop_last=drop_last, weights=weights
        )
        self.generator = self._sampler.generator
        self.weights = weights

    def drawn(self, balance: float, *, adjust: bool) -> TensorBatches:
        """Return batches of `lnl_ext.training.balance.draws`, and a generator of their own.

        The columns are the integer bias targets of shape (M,) or (M, K). Weights that are there
        stay.

        Raises
        ------
        ValueError
            There is no such target, or the order is fixed.
        """
        columns = {
            name: target.long()
            for name, target in self.bias.items()
            if target.dim() <= 2 and not target.is_floating_point()
        }
        if not columns:
            raise ValueError(
                f"balance and adjust need an integer bias target of shape ({len(self.images)},) or "
                f"({len(self.images)}, K) in the batches, which have "
                f"{', '.join(map(repr, self.bias)) or 'none'}"
            )
        weights, targets = draws(
            self.labels.long(), columns, balance=balance, adjust=adjust, weights=self.weights
        )
        return TensorBatches(
            self.images,
            self.labels,
            self.bias | targets,
            batch_size=self._sampler.batch_size,
            shuffle=self._sampler.shuffle,
            drop_last=self._sampler.drop_last,
            weights=weights,
            prepare=self.prepare,
        )

    def __len__(self) -> int:
        """Return the number of batches in a pass."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[Batch]:
        """One pass; the order is drawn before the first batch."""
        for rows in self._sampler.shares(self.images.device):
            images = self.images[rows]
            yield (
                images if self.prepare is None else self.prepare(images),
                _widened(self.labels[rows]),
                {name: _widened(target[rows]) for name, target in self.bias.items()},
            )


def _widened(target: Tensor) -> Tensor:
    """Integers as int64; probabilities as they are."""
    return target if target.is_floating_point() else target.long()


class BatchStream:
    """Passes over a sized iterable of batches, with a position that a checkpoint can hold.

    Parameters
    ----------
    batches
        A `torch.utils.data.DataLoader`, `TensorBatches`, or anything with a length that can be
        passed over again. The generators of it and of its samplers (their attribute
        ``generator``) are part of the state.
    accumulate
        Batches per step.

    Attributes
    ----------
    steps : int
        Steps in a pass.

    Raises
    ------
    TypeError, ValueError
        If ``batches`` has no length, or is empty; if it is a DataLoader with
        ``persistent_workers``; or if there are several processes and it is a DataLoader that gives
        each of them every sample.
    """

    def __init__(self, batches: Iterable[Batch], accumulate: int = 1) -> None:
        try:
            self._length = len(batches)  # type: ignore[arg-type]
        except TypeError as error:
            raise TypeError(
                f"batches must have a length (its number of batches), got {type(batches).__name__}"
            ) from error
        if self._length == 0:
            raise ValueError("batches is empty: there is nothing to train on")
        processes = distributed.current().world_size
        sampler = getattr(batches, "batch_sampler", None)
        if (
            isinstance(batches, DataLoader)
            and processes > 1
            and not isinstance(sampler, ShardedBatchSampler)
        ):
            raise ValueError(
                f"batches is a DataLoader whose batches are not shared out among the {processes} "
                "processes: give it batch_sampler=ShardedBatchSampler(...)"
            )
        if getattr(batches, "persistent_workers", False):
            raise ValueError(
                "batches is a DataLoader with persistent_workers=True, whose workers keep random "
                "states from pass to pass that no checkpoint can hold: use False"
            )
        self.steps = math.ceil(self._length / accumulate)
        self._accumulate = accumulate
        self._batches = batches
        self._generators = _generators(batches)
        self._pass_began: dict[str, Any] | None = None

    def seed(self, seed: int) -> None:
        """Seed the global generators and those of the batches.

        Global generators have a different random sequence in each process; those of the batches,
        which set the order, have the same in all.
        """
        import numpy as np  # here: a training step alone needs none

        rank = distributed.current().rank
        own = seed if rank == 0 else int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
        random.seed(own)
        np.random.seed(own)  # noqa: NPY002 - data sets and transforms of others draw from it
        torch.manual_seed(own)
        for generator in self._generators:
            generator.manual_seed(seed)

    def one_pass(self, offset: int) -> Iterator[list[Batch]]:
        """Begin a pass, or enter one that was left after ``offset`` steps; the batches by step.

        To enter it, the pass is begun again from the random state it began with, up to the place;
        then the random state of that place returns. So any loader resumes exactly, whatever it
        draws.
        """
        done = offset * self._accumulate
        if done == 0:
            self._pass_began = self._random_state()
            iterator = iter(self._batches)
        else:
            here = self._random_state()
            assert self._pass_began is not None
            self._restore(self._pass_began)
            iterator = iter(self._batches)
            for _ in itertools.islice(iterator, done):
                pass
            self._restore(here)
        while step := self._next_step(iterator):
            done += len(step)
            yield step
        if done < self._length:
            raise ValueError(
                f"batches ended after {done} batches, its length promises {self._length}"
            )

    def _next_step(self, iterator: Iterator[Batch]) -> list[Batch]:
        """Return the batches of the next step, or change no random state."""
        if self._accumulate == 1:
            return list(itertools.islice(iterator, 1))
        before = self._random_state()
        try:
            return list(itertools.islice(iterator, self._accumulate))
        except BaseException:
            self._restore(before)  # those that were read before the error are read again
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return every random state now and at the beginning of the pass."""
        return {"now": self._random_state(), "pass_began": self._pass_began}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._restore(state["now"])
        self._pass_began = state["pass_began"]

    def _random_state(self) -> dict[str, Any]:
        return capture_random_state(self._generators)

    def _restore(self, state: dict[str, Any]) -> None:
        restore_random_state(state, self._generators)


def _generators(batches: Any) -> list[torch.Generator]:
    """Return the generators that decide on the order of batches, each once."""
    return list({id(found): found for found in _attributes(batches, "generator")}.values())


def _attributes(batches: Any, name: str) -> list[Any]:
    """Return what batches and their samplers have under a name."""
    sampler = getattr(batches, "batch_sampler", None)
    inner = getattr(sampler, "sampler", None)
    places = (batches, getattr(batches, "sampler", None), sampler, inner)
    found = [getattr(place, name, None) for place in places]
    return [value for value in found if value is not None]


def drawn(batches: Iterable[Batch], balance: float, *, adjust: bool) -> Iterable[Batch]:
    """Return batches that are balanced and have the targets to adjust losses with.

    These, or those of `TensorBatches.drawn`.

    Raises
    ------
    ValueError
        They are to be balanced, are of another kind, and nothing in them has weights. They may be
        balanced in a way that cannot be seen: an attribute ``weights`` says so.
    """
    weighted = bool(_attributes(batches, "weights"))
    if isinstance(batches, TensorBatches):
        done = (weighted or not balance) and (not adjust or ADJUSTMENT in batches.bias)
        return batches if done else batches.drawn(balance, adjust=adjust)
    if balance and not weighted:
        raise ValueError(
            f"balance: {type(batches).__name__} has no sampler with weights. Draw its samples with "
            "ShardedBatchSampler(..., weights=lnl_ext.training.balance.draws(...).weights) as the "
            "batch_sampler of a DataLoader, or set an attribute weights on batches of your own "
            "that are balanced"
        )
    return batches


def to_device(
    batch: Batch,
    names: Collection[str],
    device: torch.device,
    prepare: Callable[[Tensor], Tensor],
) -> Batch:
    """Return ``batch`` on ``device``, its images prepared, with the bias targets in ``names`` only.

    Raises
    ------
    TypeError
        If it is not a triple.
    KeyError
        If it has no target of one of the names.
    """
    try:
        images, labels, bias = batch
    except (TypeError, ValueError) as error:
        raise TypeError(
            "a batch must be (images, labels, {adversary: bias target}), got "
            f"{type(batch).__name__}"
        ) from error
    missing = [name for name in names if name not in bias]
    if missing:
        raise KeyError(
            f"the batch has no bias target for {', '.join(map(repr, missing))} "
            f"(it has {', '.join(map(repr, bias)) or 'none'})"
        )
    return (
        prepare(images.to(device, non_blocking=True)),
        labels.to(device, non_blocking=True),
        {name: bias[name].to(device, non_blocking=True) for name in names},
    )
