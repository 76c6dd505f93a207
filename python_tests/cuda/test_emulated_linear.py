"""fused_linear_bias_loss as on CUDA tensors agrees with the float64 reference.

csrc/cuda/linear_bias_loss_cuda.cpp itself, on the emulated kernels: the kernel for heads that fit
on chip, and for the others chunks of rows whose products are torch's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import emulated_cuda
import pytest
import torch
from bias_loss_cases import Case
from emulated_operators import emulated_device, in_place_of_the_cpu_kernels
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from linear_cases import (
    LinearCase,
    LinearInputs,
    LinearResults,
    assert_linear_matches,
    linear_cases,
    make_linear_inputs,
    run,
)

from lnl_ext import fused_linear_bias_loss, reference

pytestmark = pytest.mark.skipif(
    emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing())
)


@pytest.fixture(scope="module", autouse=True)
def operators_on_the_emulator() -> Iterator[None]:
    """The operators' CPU kernels are the emulated CUDA kernels for this module."""
    names = ("linear_bias_loss", "linear_bias_loss_backward", "scale_gradient_")
    with in_place_of_the_cpu_kernels(*names):
        yield


def fits(case: LinearCase) -> bool:
    loss = case.loss
    return emulated_cuda.linear_fits(loss.dtype, loss.rows, loss.heads, loss.classes, case.width)


def check(case: LinearCase, on_chip: bool) -> tuple[LinearInputs, LinearResults]:
    inputs = make_linear_inputs(case)
    before = [t.clone() for t in inputs.differentiable]
    results = run(fused_linear_bias_loss, inputs)
    expected = run(reference.fused_linear_bias_loss, inputs, torch.float64)
    # Beside the chip, products have factors of the tensors' own dtype.
    assert_linear_matches(inputs, results, expected, rounded_factors=not on_chip)
    assert all(map(torch.equal, before, inputs.differentiable))
    return inputs, results


@settings(max_examples=200)
@given(case=linear_cases())
def test_on_chip(case: LinearCase):
    assume(fits(case))
    check(case, on_chip=True)


@settings(max_examples=300)
@given(case=linear_cases(), chunk=st.sampled_from((1, 2, 7, 16, 1000)))
def test_in_chunks(case: LinearCase, chunk: int):
    # Without shared memory of its own no head fits.
    with emulated_device(shared_memory=0, chunk_bytes=1, chunk_rows=chunk):
        check(case, on_chip=False)


@pytest.mark.parametrize("dtype", emulated_cuda.DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "classes", "heads"), [(300, 520, 12, 1), (130, 400, 5, 4), (70, 150, 64, 1)]
)
def test_larger_shapes_on_chip(rows: int, width: int, classes: int, heads: int, dtype: torch.dtype):
    loss = Case(rows, classes, heads=heads, dtype=dtype, entropy_weight=0.2, reversal=0.5)
    case = LinearCase(loss, width)
    assert fits(case)
    check(case, on_chip=True)


@pytest.mark.parametrize("dtype", emulated_cuda.DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "classes", "heads"),
    [(100, 8192, 12, 1), (130, 40, 70, 3), (61, 24, 5000, 1), (5, 4, 262144, 1)],
)
def test_larger_shapes_in_chunks(
    rows: int, width: int, classes: int, heads: int, dtype: torch.dtype
):
    loss = Case(rows, classes, heads=heads, dtype=dtype, entropy_weight=0.2, reversal=0.5)
    case = LinearCase(loss, width)
    assert not fits(case)
    with emulated_device(chunk_bytes=1, chunk_rows=max(2, rows // 3)):
        check(case, on_chip=False)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "width"), [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("classes", [5, 70])
def test_nothing(rows: int, width: int, classes: int, reduction: str):
    case = Case(rows, classes, reduction=reduction, reversal=0.5, entropy_weight=0.1)
    check(LinearCase(case, width), on_chip=classes == 5)


def test_the_number_of_rows_of_a_chunk_changes_nothing_but_rounding():
    case = LinearCase(Case(40, 70, dtype=torch.float64, entropy_weight=0.2, reversal=0.5), 24)
    results = []
    for rows in (3, 40):
        with emulated_device(chunk_bytes=1, chunk_rows=rows):
            results.append(check(case, on_chip=False)[1])
    few, all_ = results
    assert not torch.equal(few.gradients[1], all_.gradients[1])  # or it was not in chunks
    torch.testing.assert_close(few.gradients, all_.gradients)


@pytest.mark.parametrize("schedule", ["reverse", "random", "priority"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "classes", "shared_memory"),
    [
        (150, 12, emulated_cuda.SHARED_MEMORY),
        (150, 70, emulated_cuda.SHARED_MEMORY),
        (20, 1100, 2048),  # a row's logits are read twice, and its gradient written over them
    ],
)
def test_results_do_not_depend_on_the_order_of_threads(
    schedule: str, dtype: torch.dtype, rows: int, classes: int, shared_memory: int
):
    case = Case(rows, classes, dtype=dtype, entropy_weight=0.3, reversal=0.5, ignored=0.1)
    inputs = make_linear_inputs(LinearCase(case, width=72))
    with emulated_device(shared_memory, chunk_bytes=1, chunk_rows=64):
        expected = run(fused_linear_bias_loss, inputs)
        emulated_cuda.set_schedule(schedule, seed=7)
        try:
            results = run(fused_linear_bias_loss, inputs)
        finally:
            emulated_cuda.set_schedule("forward")
    assert torch.equal(results.loss, expected.loss)
    assert all(map(torch.equal, results.gradients, expected.gradients))


@pytest.mark.parametrize("classes", [5, 70])
@pytest.mark.parametrize("target", [-3, 2**40])
def test_a_target_out_of_range_makes_its_own_row_nan(classes: int, target: int):
    # The package's own check of CPU tensors would refuse it.
    operator = torch.ops.lnl_emulated.linear_bias_loss_backward
    inputs = make_linear_inputs(LinearCase(Case(6, classes, reduction="none"), width=8))
    inputs.target[2] = target
    tensors = (inputs.features, inputs.head_weight, inputs.head_bias, inputs.target, None)
    gradients = operator(
        torch.ones(6), *tensors, torch.ones(1, 2), *[None] * 3, -100, 0.0, 0, False, 1, True, False
    )
    assert gradients[0][2].isnan().all()
    assert gradients[0][[0, 1, 3, 4, 5]].isfinite().all()


def test_rows_with_nan_features_stay_alone():
    for classes in (5, 70):
        case = Case(6, classes, reduction="none", reversal=0.5, entropy_weight=0.3)
        inputs = make_linear_inputs(LinearCase(case))
        inputs.features[1, 3] = math.nan
        results = run(fused_linear_bias_loss, inputs)
        for value in (results.loss, results.gradients[0]):
            assert value[1].isnan().all()
            assert value[[0, 2, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("shape", [(2000, 12), (2000, 70)], ids=str)
def test_autograd(shape: tuple[int, int]):
    """A loss that is scaled afterwards, and one without the head's gradients."""
    rows, classes = shape[0] // 100, shape[1]
    case = LinearCase(Case(rows, classes, dtype=torch.float64, upstream=-2.0, entropy_weight=0.1))
    check(case, on_chip=classes == 12)
    inputs = make_linear_inputs(case)
    x = inputs.features.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: fused_linear_bias_loss(
            x, inputs.head_weight, inputs.target, inputs.head_bias, entropy_weight=0.1
        ),
        x,
    )


def peak_of_tensors(function, path: Path) -> int:
    """Return by how many bytes the tensors on the CPU rose above what there was before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    held, peak = 0, 0
    for event in sorted(
        (e for e in events if e.get("name") == "[memory]"), key=lambda event: event["ts"]
    ):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("reversal", [None, 0.5])
def test_the_logits_of_a_chunk_take_64_mib(reversal: float | None, tmp_path: Path):
    rows, width, classes = 700, 4, 33000  # 508 rows a chunk; all logits would be 88 MiB
    case = Case(rows, classes, entropy_weight=0.1, reversal=reversal)
    inputs = make_linear_inputs(LinearCase(case, width))
    for tensor in inputs.differentiable:
        tensor.requires_grad_()

    def call() -> None:
        fused_linear_bias_loss(
            inputs.features,
            inputs.head_weight,
            inputs.target,
            inputs.head_bias,
            entropy_weight=0.1,
            reversal=reversal,
        ).backward()

    buffers = 2 if reversal is not None else 1
    gradients = 4 * sum(tensor.numel() for tensor in inputs.differentiable)
    peak = peak_of_tensors(call, tmp_path / "trace.json")
    assert peak >= buffers * (60 << 20)
    assert peak <= buffers * (64 << 20) + 3 * gradients
