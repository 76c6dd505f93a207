"""Where batches come from, and passes over them that can be left and entered at any batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lnl_ext.training.batch_sampler import ShardedBatchSampler
from lnl_ext.training.distributed import current
from lnl_ext.training.random_state import capture_random_state, restore_random_state, seed_all

Batch = tuple[Tensor, Tensor, dict[str, Tensor]]
"""``(images (N, ...), labels (N,) int64, {adversary: bias target})``."""


class TensorBatches:
    """Batches from tensors in memory: what a DataLoader does, without a call per sample.

    Parameters
    ----------
    images : Tensor, shape (M, ...)
        Any dtype; ``prepare`` turns a batch of them into what the network takes.
    labels : Tensor, shape (M,), integer
    bias : mapping of str to Tensor, shape (M, ...), optional
        One bias target per adversary.
    batch_size, shuffle, drop_last
        As for :class:`~lnl_ext.training.batch_sampler.ShardedBatchSampler`, which decides on the
        order and,
        with several processes, on this process's share of every batch.
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
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.bias = dict(bias or {})
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
            len(images), batch_size, shuffle=shuffle, drop_last=drop_last
        )
        self.generator = self._sampler.generator

    def __len__(self) -> int:
        """Return the number of batches in a pass."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[Batch]:
        """One pass; the order is drawn before the first batch."""
        order = self._sampler.order()
        if order is not None:
            order = order.to(self.images.device)
        for share in self._sampler.slices():
            rows = share if order is None else order[share]
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

    Raises
    ------
    TypeError, ValueError
        If ``batches`` has no length, or is empty; if it is a DataLoader with
        ``persistent_workers``; or if there are several processes and it is a DataLoader that gives
        each of them every sample.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        try:
            self.steps = len(batches)  # type: ignore[arg-type]
        except TypeError as error:
            raise TypeError(
                f"batches must have a length (its number of batches), got {type(batches).__name__}"
            ) from error
        if self.steps == 0:
            raise ValueError("batches is empty: there is nothing to train on")
        sampler = getattr(batches, "batch_sampler", None)
        if (
            isinstance(batches, DataLoader)
            and current().world_size > 1
            and not isinstance(sampler, ShardedBatchSampler)
        ):
            raise ValueError(
                "batches is a DataLoader whose batches are not shared out among the "
                f"{current().world_size} processes: give it batch_sampler=ShardedBatchSampler(...)"
            )
        if getattr(batches, "persistent_workers", False):
            raise ValueError(
                "batches is a DataLoader with persistent_workers=True, whose workers keep random "
                "states from pass to pass that no checkpoint can hold: use False"
            )
        self._batches = batches
        self._generators = _generators(batches)
        self._pass_began: dict[str, Any] | None = None

    def seed(self, seed: int) -> None:
        """Seed the global generators and those of the batches.

        Each process draws other numbers from its global generators, and all the same from those of
        the batches, which decide on the order.
        """
        rank = current().rank
        own = seed if rank == 0 else int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
        seed_all(own)
        for generator in self._generators:
            generator.manual_seed(seed)

    def one_pass(self, offset: int) -> Iterator[Batch]:
        """Begin a pass, or enter one that was left after ``offset`` batches.

        To enter it, the pass is begun again from the random state it began with, up to the place;
        then the random state of that place returns. So any loader resumes exactly, whatever it
        draws.
        """
        if offset == 0:
            self._pass_began = capture_random_state(self._generators)
            iterator = iter(self._batches)
        else:
            here = capture_random_state(self._generators)
            assert self._pass_began is not None
            restore_random_state(self._pass_began, self._generators)
            iterator = iter(self._batches)
            for _ in itertools.islice(iterator, offset):
                pass
            restore_random_state(here, self._generators)
        yielded = offset
        for batch in iterator:
            yielded += 1
            yield batch
        if yielded < self.steps:
            raise ValueError(
                f"batches ended after {yielded} batches, its length promises {self.steps}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return every random state now and at the beginning of the pass."""
        return {"now": capture_random_state(self._generators), "pass_began": self._pass_began}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        restore_random_state(state["now"], self._generators)
        self._pass_began = state["pass_began"]


def _generators(batches: Any) -> list[torch.Generator]:
    """Return the generators that decide on the order of batches, each once."""
    sampler = getattr(batches, "batch_sampler", None)
    inner = getattr(sampler, "sampler", None)
    places = (batches, getattr(batches, "sampler", None), sampler, inner)
    found = [getattr(place, "generator", None) for place in places]
    return list({id(place): place for place in found if place is not None}.values())


def to_device(batch: Batch, names: Collection[str], device: torch.device) -> Batch:
    """Return ``batch`` on ``device``, with the bias targets in ``names`` only.

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
        images.to(device, non_blocking=True),
        labels.to(device, non_blocking=True),
        {name: bias[name].to(device, non_blocking=True) for name in names},
    )
