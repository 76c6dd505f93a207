"""Several processes that train together: who takes part, equal networks, shares, gathered results.

``torchrun`` starts the processes and ``torch.distributed`` connects them; what is here holds as
well for a single process, so that a program needs no second form.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Subset

from lnl_ext.coefficients import ScheduledCoefficients

_Rows = TypeVar("_Rows", bound=tuple[Tensor, ...])
_T = TypeVar("_T")

TIMEOUT = datetime.timedelta(minutes=10)
"""How long a process waits for the others by default before it takes them for lost."""

_VARIABLES = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # beside RANK


class LostProcessError(RuntimeError):
    """Another process of the run ended, or did not answer in time."""


class Processes(NamedTuple):
    """The processes of a run, as one of them sees them."""

    rank: int = 0
    """The number of this process, 0 to ``world_size - 1``."""
    world_size: int = 1
    """How many there are."""
    local_rank: int = 0
    """The number of this process on its machine."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and messages, rank 0."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The device of this process: its own GPU where there are any, else the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")


@contextlib.contextmanager
def from_environment(timeout: datetime.timedelta = TIMEOUT) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started; without torchrun, be the only one.

    It connects over NCCL for CUDA tensors where there are GPUs, and over gloo for CPU tensors.

    Parameters
    ----------
    timeout
        How long to wait for another process, within a step or at the start, before the run ends
        with an error.

    Yields
    ------
    Processes

    Raises
    ------
    RuntimeError
        If only some of torchrun's variables are set.
    LostProcessError
        If the processes do not find each other, or one ends meanwhile.

    Examples
    --------
    >>> with from_environment() as processes:
    ...     if processes.is_main:
    ...         print(f"{processes.world_size} processes")
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
        yield Processes()
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"RANK is set, but {', '.join(missing)} not: start the processes with torchrun, or "
            "unset RANK for a single process"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    # Imported later, this module would keep the group in its functions' default arguments, and a
    # group that something keeps has threads that still drop tensors while Python ends: an abort.
    importlib.import_module("torch.distributed.nn")
    try:
        dist.init_process_group(backend, timeout=timeout)
    except RuntimeError as error:
        if not _is_of_connection(error):
            raise
        raise LostProcessError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not connect to the "
            "others: one ended or did not answer in time, the reason is among its messages. Start "
            "all of them again"
        ) from error
    try:
        yield current()
    finally:
        dist.destroy_process_group()


def current() -> Processes:
    """Return the processes that are connected now, by :func:`from_environment` or otherwise."""
    if not (dist.is_available() and dist.is_initialized()):
        return Processes()
    return Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))


@contextlib.contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turn the error of a connection that broke into one that says what it means.

    Raises
    ------
    LostProcessError
    """
    try:
        yield
    except RuntimeError as error:
        if current().world_size == 1 or not _is_of_connection(error):
            raise
        rank, world_size, _ = current()
        raise LostProcessError(
            f"process {rank} of {world_size} lost another one, which ended or did not answer in "
            "time: the reason is among the messages of that one. Start all of them again to "
            "continue from the last checkpoint"
        ) from error


def _is_of_connection(error: RuntimeError) -> bool:
    # gloo's errors have no type of their own; its source file is in their text.
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of what every process calls it with; overwrites ``values``."""
    if current().world_size > 1:
        dist.all_reduce(values)
    return values


def on_main(function: Callable[[], _T]) -> _T:
    """Call ``function`` in process 0 only. Every process gets its result, or raises its error."""
    if current().world_size == 1:
        return function()
    outcome: list[Any] = [None, None]
    if current().is_main:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise failure
    return cast(_T, result)


def gather_objects(own: _T) -> list[_T]:
    """Return what every process calls it with, by rank."""
    _, world_size, _ = current()
    if world_size == 1:
        return [own]
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, own)
    return gathered


def check_alike(**values: object) -> None:
    """Refuse values that are not the same in all processes.

    Raises
    ------
    ValueError
        In every process, with the name of the first such value and what each has.
    """
    gathered = gather_objects(values)
    for name in values:
        found = [process[name] for process in gathered]
        if any(value != found[0] for value in found):
            listed = "; ".join(f"process {rank}: {value!r}" for rank, value in enumerate(found))
            raise ValueError(f"{name} is not the same in all processes ({listed})")


def replicate(module: nn.Module, *, unused: bool) -> nn.Module:
    """Return the module with gradients averaged over the processes; alone, the module itself.

    With several processes each must call it, and the networks of process 0 become everybody's; at
    every forward so do its buffers (the statistics of batch norm).

    Parameters
    ----------
    module
        Its forward computes the losses.
    unused
        Whether a forward may leave parameters without a gradient.
    """
    if current().world_size == 1:
        return module
    # A broadcast is a write, after which a coefficient is not known to be 0 any more.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        module, _coefficient_buffers(module)
    )
    device = next(module.parameters()).device
    on_cpu = device.type == "cpu"
    # The replica lives as long as its trainer and keeps its group with it. Were that the group of
    # everything else, its threads could outlive `from_environment` and abort a process that ends.
    return DistributedDataParallel(
        module,
        device_ids=None if on_cpu else [device],
        process_group=dist.new_group(backend="gloo") if on_cpu else None,
        find_unused_parameters=unused,
    )


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over the processes, outside of a `replicate`d module."""
    if current().world_size == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= current().world_size


def broadcast_buffers(modules: Iterable[nn.Module]) -> None:
    """Give every process the buffers of process 0, as its next forward in training would.

    For before an evaluation or a checkpoint. Coefficients are left out: the progress of the run
    sets them, alike in all processes.
    """
    if current().world_size == 1:
        return
    for module in modules:
        coefficients = _coefficient_buffers(module)
        for name, buffer in module.named_buffers():
            if name not in coefficients:
                whole = buffer.contiguous()
                dist.broadcast(whole, src=0)
                if whole is not buffer:
                    with torch.no_grad():
                        buffer.copy_(whole)


def _coefficient_buffers(module: nn.Module) -> set[str]:
    """Return the names of the buffers in ``module`` that hold coefficients of losses."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, ScheduledCoefficients)
        for name in part.coefficient_names()
    }


def shard(dataset: Dataset[_T]) -> Dataset[_T]:
    """Return this process's share of a data set to evaluate on: every sample is in exactly one.

    Process r of W takes samples r, r + W, r + 2W ...; none is doubled, so that shares may differ by
    one sample. :func:`gather_rows` undoes it. For training use
    `lnl_ext.training.batches.ShardedBatchSampler`.
    """
    rank, world_size, _ = current()
    if world_size == 1:
        return dataset
    samples: Any = dataset
    return Subset(dataset, range(rank, len(samples), world_size))


def gather_rows(rows: Tensor) -> Tensor:
    """Put the rows that every process has for its :func:`shard` in the order of the whole set.

    Every process must call it, and every process gets the result.

    Parameters
    ----------
    rows
        One row per sample of the share, any dtype and device.

    Returns
    -------
    Tensor
        One row per sample of the whole set, on the CPU (with a single process, ``rows`` itself on
        the CPU).

    Raises
    ------
    ValueError
        If the lengths are not those of shares of one set.
    """
    rows = rows.detach().cpu()
    _, world_size, _ = current()
    if world_size == 1:
        return rows
    parts = gather_objects(rows)
    total = sum(len(part) for part in parts)
    lengths = [len(part) for part in parts]
    if lengths != [len(range(rank, total, world_size)) for rank in range(world_size)]:
        raise ValueError(f"the processes have {lengths} rows, which are not shares of one data set")
    whole = rows.new_empty((total, *rows.shape[1:]))
    for rank, part in enumerate(parts):
        whole[rank::world_size] = part
    return whole


def gather_predictions(predictions: _Rows) -> _Rows:
    """Apply :func:`gather_rows` to each field of a named tuple of tensors."""
    fields = [gather_rows(field) for field in predictions]
    return type(predictions)(*fields)
