"""fused_linear_bias_loss on the emulated CUDA kernel agrees with the float64 reference.

The cases, the tolerances and the autograd on top are those of test_linear_parity.py; heads that the
kernel leaves to chunks of rows are not among them (csrc/tests has those).
"""

from __future__ import annotations

from collections.abc import Iterator

import emulated_cuda
import pytest
import torch
from bias_loss_cases import Case
from hypothesis import assume, given, settings
from linear_cases import LinearCase, linear_cases
from test_linear_parity import check

pytestmark = pytest.mark.skipif(
    emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing())
)


@pytest.fixture(scope="module", autouse=True)
def operators_on_the_emulator() -> Iterator[None]:
    """The operators' CPU kernels are the emulated CUDA kernels for this module."""
    library = torch.library.Library("lnl_ext", "IMPL")
    for name in ("linear_bias_loss", "linear_bias_loss_backward", "scale_gradient_"):
        library.impl(name, getattr(emulated_cuda, name), "CPU", allow_override=True)
    yield
    library._destroy()


@settings(max_examples=200)
@given(case=linear_cases())
def test_value_and_gradients_match_the_reference(case: LinearCase):
    loss = case.loss
    assume(emulated_cuda.linear_fits(loss.dtype, loss.rows, loss.heads, loss.classes, case.width))
    check(case)


@pytest.mark.parametrize("dtype", emulated_cuda.DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "classes", "heads"), [(300, 520, 12, 1), (130, 400, 5, 4), (70, 150, 64, 1)]
)
def test_larger_shapes(rows: int, width: int, classes: int, heads: int, dtype: torch.dtype):
    loss = Case(rows, classes, heads=heads, dtype=dtype, entropy_weight=0.2, reversal=0.5)
    check(LinearCase(loss, width))
