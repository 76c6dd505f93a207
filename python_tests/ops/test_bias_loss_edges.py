"""Values at the edges: certain rows, infinities, NaN, one class, many classes, nothing at all."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from backends import Backend, run_operators
from bias_loss_cases import Case, Inputs, assert_matches_oracle, make_inputs
from torch.nn import functional as F  # noqa: N812

import lnl_ext

INF = math.inf


def check(backend: Backend, case: Case, logits: torch.Tensor, target: torch.Tensor) -> None:
    inputs = Inputs(case, logits, target, None, torch.tensor(1.0, dtype=torch.float32))
    assert_matches_oracle(inputs, backend.run(inputs.to(backend.device)))


@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("layout", ["rows", "sites"])
def test_certain_rows_keep_their_relative_accuracy(backend: Backend, layout: str, target: int):
    row = torch.tensor([20.0, 0.0, 0.0, 0.0])
    shape = (1, 4) if layout == "rows" else (1, 4, 70)
    logits = row.reshape(1, 4, *(1,) * (len(shape) - 2)).expand(shape).contiguous()
    index = torch.full((1, *shape[2:]), target)
    for entropy_weight in (0.0, 1.0):
        check(backend, Case(1, 4, shape[2:], entropy_weight=entropy_weight), logits, index)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("space", [(), (5,)])
def test_huge_logits(backend: Backend, sign: float, space: tuple[int, ...]):
    case = Case(6, 9, space, entropy_weight=0.5, reversal=0.1)
    inputs = make_inputs(case)
    logits = inputs.logits.sign() * 1e4
    logits[0] = sign * 1e4  # a row of equals
    logits[1] += torch.arange(9.0).reshape(9, *(1,) * len(space))
    check(backend, case, logits, inputs.target)


@pytest.mark.parametrize("space", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_impossible_classes_add_nothing(backend: Backend, dtype: torch.dtype, space):
    case = Case(8, 6, space, dtype=dtype, entropy_weight=0.5, reversal=0.1)
    inputs = make_inputs(case)
    inputs.logits[:, 2] = -INF
    inputs.logits[0, 1:] = -INF
    inputs.target[:] = torch.where(inputs.target == 2, 3, inputs.target)
    inputs.target[0] = 0
    results = backend.run(inputs.to(backend.device))
    assert_matches_oracle(inputs, results)
    assert results.loss.isfinite()
    assert results.gradient is not None
    assert results.gradient.isfinite().all()
    assert (results.gradient[:, 2] == 0).all()


def test_an_impossible_target_is_infinitely_wrong(backend: Backend):
    logits = torch.tensor([[1.0, -INF, 2.0], [0.0, 0.0, 0.0]])
    check(backend, Case(2, 3, reversal=0.5, entropy_weight=0.1), logits, torch.tensor([1, 0]))


def test_smoothing_with_an_impossible_class_is_infinite(backend: Backend):
    logits = torch.tensor([[1.0, -INF, 2.0]])
    check(backend, Case(1, 3, label_smoothing=0.1), logits, torch.tensor([0]))


@pytest.mark.parametrize("classes", [1, 2, 5, 40])
@pytest.mark.parametrize("space", [(), (2,), (33,)])
@pytest.mark.parametrize("bad", [-INF, INF, math.nan])
def test_rows_without_probabilities_are_nan(backend: Backend, bad: float, space, classes: int):
    case = Case(3, classes, space, reduction="none", entropy_weight=0.5)
    inputs = make_inputs(case)
    if bad == -INF:
        inputs.logits[1] = bad
    else:
        inputs.logits[1, classes // 2] = bad
    results = backend.run(inputs.to(backend.device))
    for name in ("loss", "cross_entropy", "entropy", "gradient", "head_gradient"):
        value = getattr(results, name).cpu()
        assert value[1].isnan().all(), name
        assert value[[0, 2]].isfinite().all(), name


@pytest.mark.parametrize("space", [(), (7,)])
def test_one_class_is_certain(backend: Backend, space):
    results = backend.run(make_inputs(Case(4, 1, space, entropy_weight=1.0)).to(backend.device))
    for value in vars(results).values():
        assert (value == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 8.0])
def test_many_classes(backend: Backend, dtype: torch.dtype, scale: float):
    case = Case(5, 32000, dtype=dtype, scale=scale, entropy_weight=0.5, reversal=0.3)
    inputs = make_inputs(case)
    assert_matches_oracle(inputs, backend.run(inputs.to(backend.device)))


@pytest.mark.parametrize(
    "case",
    [
        Case(rows, 5, space, heads=heads, reduction=reduction, layout=layout, entropy_weight=0.1)
        for (rows, space), heads, reduction, layout in itertools.product(
            [(0, ()), (0, (3,)), (4, (0,)), (0, (0, 2))],
            [1, 2],
            ["mean", "sum", "none"],
            ["contiguous", "channels_last"],
        )
    ],
    ids=str,
)
def test_no_sites(backend: Backend, case: Case):
    inputs = make_inputs(case)
    results = backend.run(inputs.to(backend.device))
    assert_matches_oracle(inputs, results)
    if case.reduction != "none":
        assert results.loss.isnan() == (case.reduction == "mean")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mask_entropy", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_all_targets_ignored(backend: Backend, reduction, mask_entropy, heads):
    case = Case(
        3,
        4,
        (5,),
        heads=heads,
        ignored=1.0,
        reduction=reduction,
        mask_entropy=mask_entropy,
        entropy_weight=1.0,
        confusion_weight=0.5,
    )
    inputs = make_inputs(case)
    results = backend.run(inputs.to(backend.device))
    assert_matches_oracle(inputs, results)
    assert results.head_gradient is not None
    assert results.gradient is not None
    assert (results.head_gradient == 0).all()
    assert (results.gradient == 0).all() == mask_entropy
    if reduction != "none":
        assert results.cross_entropy.isnan() == (reduction == "mean")


def test_weights_that_sum_to_zero_are_as_in_pytorch():
    logits = torch.randn(3, 2)
    weight = torch.tensor([0.0, 1.0])
    target = torch.zeros(3, dtype=torch.int64)
    for reduction in ("mean", "sum"):
        torch.testing.assert_close(
            lnl_ext.fused_bias_loss(logits, target, weight, reduction=reduction),
            F.cross_entropy(logits, target, weight, reduction=reduction),
            equal_nan=True,
        )


def test_results_do_not_change_from_run_to_run():
    inputs = make_inputs(Case(512, 12, (9,), entropy_weight=0.1, reversal=0.3))
    first = run_operators(inputs)
    for _ in range(5):
        again = run_operators(inputs)
        assert all(torch.equal(getattr(again, name), value) for name, value in vars(first).items())
