"""Steps that accumulate batches are those of one large batch; gradients are clipped to a norm."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_run import SAMPLES, Problem
from processes import in_processes, needs_gloo
from tiny_run import differences, tiny_trainer
from torch import Tensor, nn
from trainer_runs import SGD, Kill, Watched, loader, without_dropout

from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.checkpoint import load_checkpoint
from lnl_ext.training.config import TrainerConfig
from lnl_ext.training.trainer import CHECKPOINT, Trainer

CASES: dict[str, dict[str, Any]] = {
    "missing targets": {},
    "masked entropy": {"mask_entropy": True},
    "class weights": {"weight": [0.5, 1.0, 2.0, 0.0, 4.0]},
    "sum": {"reduction": "sum"},
}


def linear_run(
    case: str, update: str, dtype: torch.dtype, batch: int, accumulate: int
) -> dict[str, Any]:
    """Gradients of the last step, weights and record of an epoch."""
    problem = Problem()
    options = dict(CASES[case])
    if "weight" in options:
        options["weight"] = torch.tensor(options["weight"]).to(dtype)
    problem.many[:7, 1] = IGNORE_INDEX  # nothing for one of three heads
    problem.images = problem.images.to(dtype)
    networks = {"f": problem.features, "g": problem.classifier, **problem.heads}
    for network in networks.values():
        network.to(dtype)
    adversaries = {name: problem.adversary(name, **options) for name in ("one", "many")}
    record = problem.fit(adversaries, batch=batch, update=update, accumulate=accumulate)
    return {
        "gradients": {
            f"{name}.{key}": parameter.grad
            for name, network in networks.items()
            for key, parameter in network.named_parameters()
        },
        "weights": {name: network.state_dict() for name, network in networks.items()},
        "record": {k: v for k, v in record.items() if k not in ("seconds", "kind")},
    }


def check_same(found: Any, expected: Any, tolerance: float) -> None:
    for name, value in expected.items():
        rel = 1e-6 if name == "record" else tolerance  # accuracies are float32
        torch.testing.assert_close(found[name], value, rtol=rel, atol=rel, equal_nan=True)


# The last of 20 samples are less than a step; 3 + 3 of 6 targets are not those of one process of 2.
@pytest.mark.parametrize(("batch", "accumulate"), [(4, 2), (3, 2), (2, 7)])
@pytest.mark.parametrize("update", ["joint", "two_step"])
@pytest.mark.parametrize("case", CASES)
def test_accumulated_batches_are_one_large_batch(
    case: str, update: str, batch: int, accumulate: int
) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        whole = linear_run(case, update, dtype, batch * accumulate, 1)
        assert whole["record"]["step"] == -(-SAMPLES // (batch * accumulate))
        check_same(linear_run(case, update, dtype, batch, accumulate), whole, tolerance)


@needs_gloo
@pytest.mark.parametrize("update", ["joint", "two_step"])
def test_two_processes_accumulate_as_one(update: str) -> None:
    for case in ("missing targets", "sum"):
        whole = linear_run(case, update, torch.float64, 8, 1)
        for found in in_processes(linear_run, case, update, torch.float64, 4, 2):
            check_same(found, whole, 1e-12)


def test_weighted_samples_accumulate() -> None:
    results = []
    for batch, accumulate in ((SAMPLES, 1), (4, 5)):
        problem = Problem()
        weights = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(1)).double()
        config = TrainerConfig(optimizer=SGD, head_optimizer=SGD, accumulate=accumulate)
        adversaries = {"many": problem.adversary("many", reduction="sum")}
        trainer = Trainer(
            problem.features,
            problem.classifier,
            adversaries,
            config,
            sample_weights={"many": "weight"},
        )
        bias = {"many": problem.many, "weight": weights}
        batches = TensorBatches(
            problem.images, problem.labels, bias, batch_size=batch, shuffle=False
        )
        trainer.fit(batches, progress=False)
        results.append(problem.weights())
    check_same(results[1], results[0], 1e-12)


def stopping(batches: Any, number: int) -> Watched:
    """Batches that end the run instead of giving the given one, counted over all passes."""
    asked = iter(range(number))

    def stop() -> None:
        if next(asked, None) is None:
            raise Kill

    return Watched(batches, stop)


@pytest.mark.parametrize("number", [4, 5, 7])  # the next is drawn, but not given
def test_a_run_that_accumulates_resumes_bit_for_bit(tmp_path: Path, number: int) -> None:
    """With random numbers drawn wherever they can be."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    def build() -> Trainer:
        return tiny_trainer(accumulate=2)

    def fit(trainer: Trainer, batches: Iterable[Any], folder: Path) -> None:
        trainer.fit(batches, output=folder, checkpoint_every=1, log_every=1, progress=False)

    fit(build(), loader("loader"), whole)
    first = build()
    with pytest.raises(Kill):
        fit(first, stopping(loader("loader"), number), stopped)
    first.fit(loader("loader"), progress=False)  # in the same process
    again = build()
    again.load(stopped / CHECKPOINT)
    fit(again, loader("loader"), stopped)
    expected, found = (load_checkpoint(folder / CHECKPOINT) for folder in (whole, stopped))
    assert expected["step"] == 6  # an epoch has 6 batches, 3 steps
    assert differences(expected, found) == []
    assert differences(again.features.state_dict(), first.features.state_dict()) == []


# ---------------------------------------------------------------------- clipping


def moved(problem: Problem, **config: Any) -> dict[str, Tensor]:
    """How far one step of rate 1 moves the network, and the heads."""
    del problem.heads["many"]  # both norms would be about the same
    parts = {
        "network": nn.ModuleList([problem.features, problem.classifier]),
        "heads": nn.ModuleDict(problem.heads),
    }
    before = {k: nn.utils.parameters_to_vector(m.parameters()).detach() for k, m in parts.items()}
    problem.fit({"one": problem.adversary("one")}, rate=1.0, batch=SAMPLES, **config)
    return {
        name: nn.utils.parameters_to_vector(module.parameters()).detach() - before[name]
        for name, module in parts.items()
    }


def test_gradients_of_network_and_heads_are_clipped_apart() -> None:
    free = moved(Problem())
    norms = {name: step.norm().item() for name, step in free.items()}
    low, high = sorted(norms.values())
    assert low < 0.9 * high
    between = (low + high) / 2
    for name, step in moved(Problem(), clip_norm=between).items():
        wanted = free[name] * min(1.0, between / norms[name])
        torch.testing.assert_close(step, wanted, rtol=1e-5, atol=1e-9)
    for step in moved(Problem(), clip_norm=1e-3).values():
        assert step.norm() == pytest.approx(1e-3, rel=1e-2)  # torch adds 1e-6 to the norm


def test_clipping_sees_unscaled_gradients_in_float16() -> None:
    problem = Problem()
    problem.images = problem.images.float()
    for module in (problem.features, problem.classifier, *problem.heads.values()):
        module.float()
    for step in moved(problem, clip_norm=1e-3, amp="float16").values():
        assert step.norm() == pytest.approx(1e-3, rel=1e-2)


# ---------------------------------------------------------------------- several trainers


def test_trainers_of_different_precision_do_not_disturb_each_other() -> None:
    """One after the other, and step by step in turns."""

    def trainer(amp: str | None) -> Trainer:
        made = tiny_trainer(amp=amp, optimizer=SGD, accumulate=2, clip_norm=1.0)
        return without_dropout(made)  # which would draw from the generator they share

    precisions = ("float16", None, "bfloat16")
    alone = []
    for amp in precisions:
        trained = trainer(amp)
        trained.fit(loader("list"), progress=False)
        alone.append(trained)

    together = [trainer(amp) for amp in precisions]

    def fit(depth: int) -> None:
        if depth < len(together):
            inside = iter([depth + 1])  # in the middle of this one's run, all of the others'

            def others() -> None:
                if together[depth].step == 3 and (inner := next(inside, None)) is not None:
                    fit(inner)

            together[depth].fit(Watched(loader("list"), others), progress=False)

    fit(0)
    for one, other in zip(alone, together, strict=True):
        assert one.step == other.step
        assert differences(one.features.state_dict(), other.features.state_dict()) == []
        assert differences(one.history, other.history) == []
