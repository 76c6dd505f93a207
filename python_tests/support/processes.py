"""Runs a function in several connected processes, as torchrun would."""

from __future__ import annotations

import atexit
import concurrent.futures
import datetime
import functools
import multiprocessing
import multiprocessing.context
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed as dist

from lnl_ext.training import distributed

needs_gloo = pytest.mark.skipif(
    os.name != "posix" or not dist.is_available() or not dist.is_gloo_available(),
    reason="needs torch.distributed with gloo, and POSIX",
)


@functools.cache
def _workers(world_size: int) -> concurrent.futures.ProcessPoolExecutor:
    """Processes that have torch loaded; kept, since starting one takes seconds."""
    workers = concurrent.futures.ProcessPoolExecutor(world_size, mp_context=forkserver())
    # What the cache still holds when Python takes its modules apart would print a trace.
    atexit.register(workers.shutdown)
    return workers


def forkserver() -> multiprocessing.context.ForkServerContext:
    """What starts processes that have torch loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lnl_ext.training.trainer"])
    return context


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def member(
    rank: int,
    world_size: int,
    port: int,
    function: Callable[..., Any],
    arguments: Any,
    timeout: datetime.timedelta = distributed.TIMEOUT,
) -> Any:
    """Call ``function`` as the process ``rank`` of several."""
    torch.set_num_threads(1)
    variables = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        with distributed.from_environment(timeout):
            return function(*arguments)
    finally:
        for name in variables:
            del os.environ[name]


def in_processes(function: Callable[..., Any], *arguments: Any, world_size: int = 2) -> list[Any]:
    """Call ``function`` in ``world_size`` connected processes; return their results by rank.

    The function and its arguments must be picklable; so must what it returns.
    """
    port = free_port()
    workers = _workers(world_size)
    # A member waits for the others, so that each is taken by a worker of its own.
    futures = [
        workers.submit(member, rank, world_size, port, function, arguments)
        for rank in range(world_size)
    ]
    return [future.result(timeout=120) for future in futures]
