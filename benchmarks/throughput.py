"""How fast the fused bias loss is: forward and backward against plain PyTorch, in one run.

The candidates take turns in every round, so that a machine that slows down slows all of them; a
ratio is the median over the rounds of the ratio within a round. The floor is ``torch.exp(logits)``,
which also reads the logits once and writes one fresh tensor of their size.

    python benchmarks/throughput.py loss --threads 2 --json benchmarks/results/throughput_loss.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import lnl_ext

SHAPES = [(384, 8, 14, 14), (65536, 12), (4096, 1000), (2048, 32000), (16, 8, 224, 224)]
QUICK_SHAPES = [(384, 8, 14, 14), (4096, 12)]
ENTROPY_WEIGHT = 0.01


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy minus weighted entropy, as one writes it in PyTorch."""
    log_p = functional.log_softmax(logits, dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1).mean()
    return functional.cross_entropy(logits, target) - ENTROPY_WEIGHT * entropy


def fused_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the same value from the fused kernel."""
    return lnl_ext.fused_bias_loss(logits, target, entropy_weight=ENTROPY_WEIGHT)


def step(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> None:
    """Run forward and backward; the gradient is a fresh tensor every time."""
    logits.grad = None
    loss(logits, target).backward()  # type: ignore[no-untyped-call]


def take_turns(
    candidates: dict[str, Callable[[], object]], seconds: float
) -> dict[str, list[float]]:
    """Time every candidate once a round, for about `seconds`; return seconds per call."""
    for run in candidates.values():
        for _ in range(3):  # compilation, allocator and caches
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 5:
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of the time of `name` over that of `base`."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def measure_loss(shape: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """Measure one shape; check first that the candidates compute the same."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    compiled = torch.compile(plain_loss)
    torch.testing.assert_close(
        fused_loss(logits, target), plain_loss(logits, target), rtol=1e-5, atol=1e-6
    )
    times = take_turns(
        {
            "fused": lambda: step(fused_loss, logits, target),
            "eager": lambda: step(plain_loss, logits, target),
            "compile": lambda: step(compiled, logits, target),
            "exp": lambda: torch.exp(logits.detach()),
        },
        seconds,
    )
    row: dict[str, Any] = {"shape": list(shape), "rounds": len(times["fused"])}
    for name, values in times.items():
        quartiles = statistics.quantiles(values, n=4)
        row[f"{name}_ms"] = 1e3 * statistics.median(values)
        row[f"{name}_spread_ms"] = 1e3 * (quartiles[2] - quartiles[0])
    row["eager_over_fused"] = ratio(times, "eager", "fused")
    row["compile_over_fused"] = ratio(times, "compile", "fused")
    row["fused_over_exp"] = ratio(times, "fused", "exp")
    return row


def loss_command(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return one row per shape."""
    print(
        f"{'shape':>20} {'fused ms':>9} {'eager ms':>9} {'compile ms':>11} {'exp ms':>8} "
        f"{'x eager':>8} {'x compile':>10} {'/ exp':>6}"
    )
    rows = []
    for shape in QUICK_SHAPES if options.quick else SHAPES:
        torch.compiler.reset()
        row = measure_loss(shape, 1.0 if options.quick else options.seconds)
        rows.append(row)
        print(
            f"{'x'.join(map(str, shape)):>20} {row['fused_ms']:9.3f} {row['eager_ms']:9.3f} "
            f"{row['compile_ms']:11.3f} {row['exp_ms']:8.3f} {row['eager_over_fused']:8.2f} "
            f"{row['compile_over_fused']:10.2f} {row['fused_over_exp']:6.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["loss"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="per shape")
    parser.add_argument("--quick", action="store_true", help="small shapes, one second each")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    info = lnl_ext.build_info()
    kernels = f"kernels for {info['cpu_capability']}"
    print(f"torch {torch.__version__}, {options.threads} threads, {kernels}")
    rows = loss_command(options)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "command": " ".join(["python", *sys.argv]),
            "torch": torch.__version__,
            "threads": options.threads,
            "cpu_capability": info["cpu_capability"],
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
