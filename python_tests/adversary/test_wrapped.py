"""Replicated and sharded in two processes, a BiasAdversary trains as in one without a wrapper."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import pytest
import torch
from adversary_networks import CLASSES, LABELS, expected_gradients
from processes import in_processes, needs_gloo
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel

from lnl_ext import BiasAdversary

pytestmark = needs_gloo

N, INPUTS, D, STEPS, RATE = 5, 3, 4, 3, 0.5
COEFFICIENTS = {"lnl": (0.3, 0.2, 0.0), "grl": (0.3, 0.0, 0.0), "everything": (0.3, 0.2, 0.5)}


class Model(nn.Module):
    """Everything that is trained: features, classifier and adversary, to the sum of the losses."""

    def __init__(self, coefficients: tuple[float, float, float], unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f, self.g = nn.Linear(INPUTS, D), nn.Linear(D, LABELS)
        head = nn.Sequential(
            nn.Linear(D, 8),
            nn.Tanh(),
            nn.Linear(8, 8),
            nn.ReLU(inplace=True),
            nn.Linear(8, CLASSES),
        )
        names = ("reversal", "entropy_weight", "confusion_weight")
        self.adversary = BiasAdversary(head, **dict(zip(names, coefficients, strict=True)))
        if unused:
            self.unused = nn.Linear(2, 2)
        self.double()

    def forward(self, images: Tensor, labels: Tensor, bias: Tensor) -> Tensor:
        features = self.f(images)
        return F.cross_entropy(self.g(features), labels) + self.adversary(features, bias)


def batches(rank: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7 + rank)
    return [
        (
            torch.randn(N, INPUTS, generator=generator, dtype=torch.float64),
            torch.randint(LABELS, (N,), generator=generator),
            torch.randint(CLASSES, (N,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def expected_weights(coefficients, accumulate: int) -> list[Tensor]:
    """Of f, g and h, after steps with the mean gradients of both processes."""
    model = Model(coefficients)
    networks = [model.f, model.g, model.adversary.head]
    parameters = [p for network in networks for p in network.parameters()]
    total = [torch.zeros_like(p) for p in parameters]
    for step, both in enumerate(zip(batches(0), batches(1), strict=True), 1):
        for batch in both:
            found = expected_gradients(*networks, *batch, coefficients, seed=0, heads=1)
            for sum_, gradient in zip(total, (g for part in found for g in part), strict=True):
                sum_ += gradient / 2
        if step % accumulate == 0:
            with torch.no_grad():
                for p, gradient in zip(parameters, total, strict=True):
                    p -= RATE * gradient
                    gradient.zero_()
    return [p.detach() for p in parameters]


def train(
    model: nn.Module, run: Callable[..., Tensor], averaged: bool, accumulate: int = 1
) -> None:
    """Train on this process's batches; `averaged` tells that the wrapper averages everything."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step, batch in enumerate(batches(dist.get_rank()), 1):
        last = step % accumulate == 0
        with contextlib.nullcontext() if last else run.no_sync():
            run(*batch).backward()
        if not last:
            continue
        if not averaged:
            for p in model.parameters():
                # Of FSDP's own the gradients are averages already.
                if not isinstance(p, DTensor) and not getattr(p, "_is_flat_param", False):
                    dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
                    p.grad /= 2
        optimizer.step()
        optimizer.zero_grad()


def weights_of(model: Model) -> list[Tensor]:
    parts = (model.f, model.g, model.adversary)
    parameters = [p for part in parts for p in part.parameters()]
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in parameters]


DDP = {
    "plain": {},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "bucket views": {"gradient_as_bucket_view": True},
    "several buckets": {"bucket_cap_mb": 1e-4},
    "no_sync": {},
}


def replicated(kind: str, coefficients) -> list[Tensor]:
    model = Model(coefficients, unused=kind == "unused parameters")
    run = DistributedDataParallel(model, **DDP[kind])
    train(model, run, averaged=True, accumulate=3 if kind == "no_sync" else 1)
    return weights_of(model)


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("kind", DDP)
def test_distributed_data_parallel(kind: str, name: str):
    expected = expected_weights(COEFFICIENTS[name], accumulate=3 if kind == "no_sync" else 1)
    for found in in_processes(replicated, kind, COEFFICIENTS[name]):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


PARTS: dict[str, Callable[[Model], list[nn.Module]]] = {
    "adversary": lambda model: [model.adversary],
    "head": lambda model: [model.adversary.head],
    "first layer": lambda model: [model.adversary.head[0]],
    "last layer": lambda model: [model.adversary.head[-1]],
    "each layer, head and adversary": lambda model: [
        *(model.adversary.head[i] for i in (0, 2, 4)),
        model.adversary.head,
        model.adversary,
    ],
}


def sharded(part: str, reshard: bool, coefficients) -> list[Tensor]:
    model = Model(coefficients)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for module in PARTS[part](model):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    train(model, model, averaged=False)
    return weights_of(model)


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_fully_shard(part: str, reshard: bool, name: str):
    expected = expected_weights(COEFFICIENTS[name], accumulate=1)
    for found in in_processes(sharded, part, reshard, COEFFICIENTS[name]):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def wrapped(part: str, original: bool, coefficients) -> list[Tensor]:
    model = Model(coefficients)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)

        def wrap(module: nn.Module) -> FullyShardedDataParallel:
            cpu = torch.device("cpu")
            return FullyShardedDataParallel(module, device_id=cpu, use_orig_params=original)

        if part == "head":
            model.adversary.head = wrap(model.adversary.head)
        elif part == "last layer":
            model.adversary.head[-1] = wrap(model.adversary.head[-1])
        elif part == "adversary":
            model.adversary = wrap(model.adversary)
        run = wrap(model)
        train(run, run, averaged=True)
        with FullyShardedDataParallel.summon_full_params(run):
            return weights_of(model)


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("original", [False, True], ids=["flat", "use_orig_params"])
@pytest.mark.parametrize("part", ["everything", "adversary", "head", "last layer"])
def test_fully_sharded_data_parallel(part: str, original: bool, name: str):
    expected = expected_weights(COEFFICIENTS[name], accumulate=1)
    for found in in_processes(wrapped, part, original, COEFFICIENTS[name]):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
