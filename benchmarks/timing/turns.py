"""Timing by turns: every candidate once a round, in a new order each round.

A machine that slows down then slows all candidates, and none always finds the caches as the same
other one left them. A ratio is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Candidates = Mapping[str, Callable[[], object]]
Times = dict[str, list[float]]


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Run once and return the seconds: wall time on the CPU, between two events on a GPU."""
    if device.type == "cuda":
        begin, end = (
            torch.Event("cuda", enable_timing=True),
            torch.Event("cuda", enable_timing=True),
        )
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


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
        for name in order:
            times[name].append(seconds_of(candidates[name], device))
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
