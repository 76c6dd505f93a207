"""Timing by turns: every candidate once a round, in a new order each round.

A machine that slows down then slows all candidates, and none always finds the caches as the same
other one left them. A ratio is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Candidates = Mapping[str, Callable[[], object]]
Times = dict[str, list[float]]
FLUSHED = 256 * 2**20
"""Bytes that are written to empty a GPU's second level cache, which has up to 126 MB."""


def seconds_of(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Run each once and return the seconds: wall time on the CPU, between two events on a GPU.

    A GPU's second level cache is filled with something else before each, as it is between two
    steps of a training; the host waits once, when all have been enqueued, so that no time is that
    of a host which has waited.
    """
    if device.type == "cuda":
        events = []
        for run in runs:
            begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
            _flush_cache(device)
            begin.record()
            run()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize(device)
        return [float(begin.elapsed_time(end)) / 1e3 for begin, end in events]
    seconds = []
    for run in runs:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


@functools.cache
def _written(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSHED, dtype=torch.uint8, device=device)


def _flush_cache(device: torch.device) -> None:
    _written(device).zero_()


def take_turns(
    candidates: Candidates,
    device: torch.device,
    seconds: float,
    *,
    warm_up: int = 3,
    min_rounds: int = 5,
) -> Times:
    """Time the candidates for about ``seconds`` after ``warm_up`` calls of each.

    Returns
    -------
    dict
        The seconds of every call, by candidate and in the order of the rounds.
    """
    for run in candidates.values():  # compilation, allocator, caches
        for _ in range(warm_up):
            run()
    times: Times = {name: [] for name in candidates}
    order = list(candidates)
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < end:
        shuffle(order)
        for name, taken in zip(
            order, seconds_of([candidates[name] for name in order], device), strict=True
        ):
            times[name].append(taken)
        rounds += 1
    return times


def spread(values: list[float], scale: float = 1.0) -> dict[str, float]:
    """Return median and quartiles of ``scale * values``."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {
        "median": round(scale * middle, 5),
        "q1": round(scale * low, 5),
        "q3": round(scale * high, 5),
    }


def row(case: str, times: Times, base: str, *, base_over: bool = False) -> dict[str, Any]:
    """Summarise a case: milliseconds of every candidate, and ratios by round.

    The ratio is ``candidate / base``, or ``base / candidate`` with ``base_over``.
    """
    ratios = {}
    for name, values in times.items():
        pairs = zip(values, times[base], strict=True)
        ratios[name] = spread([b / a if base_over else a / b for a, b in pairs])
    return {
        "case": case,
        "rounds": len(times[base]),
        "values": {name: spread(values, 1e3) for name, values in times.items()},
        "ratios": ratios,
    }
