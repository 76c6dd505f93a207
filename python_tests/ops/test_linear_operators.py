"""The linear operators: PyTorch's contracts, errors, edges, memory, the same results every time."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import REDUCTIONS, scalar
from bias_loss_cases import Case
from linear_cases import LinearCase, make_linear_inputs, run

from lnl_ext import fused_linear_bias_loss, reference
from lnl_ext.ops import bias_loss as ops
from lnl_ext.ops.loss_arguments import LossArguments

CASES = [
    Case(6, 4, reversal=0.5, entropy_weight=0.1),
    Case(6, 4, reduction="none", weighted=True, ignored=0.3),
    Case(5, 4, heads=2, confusion_weight=0.5, mask_entropy=True),
    Case(4, 70, target="probabilities", label_smoothing=0.1, reduction="sum"),
    Case(4, 5, dtype=torch.float16, entropy_weight=0.1),
    Case(4, 5, dtype=torch.float64, reversal=0.5, confusion_weight=0.5),
]


def arguments(case: Case, requires_grad: bool, biased: bool = True):
    inputs = make_linear_inputs(LinearCase(case, width=6, biased=biased))
    for tensor in inputs.differentiable:
        tensor.requires_grad_(requires_grad)
    tensors = (
        inputs.features,
        inputs.head_weight,
        inputs.head_bias,
        inputs.target,
        inputs.weight,
    )
    cpu = torch.device("cpu")
    coefficients = [
        scalar(c, cpu) for c in (case.reversal, case.entropy_weight, case.confusion_weight)
    ]
    options = (
        case.ignore_index,
        case.label_smoothing,
        REDUCTIONS[case.reduction],
        case.mask_entropy,
        case.heads,
    )
    return inputs, tensors, (*coefficients, *options)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward(case: Case, requires_grad: bool):
    _, tensors, rest = arguments(case, requires_grad)
    # opcheck differentiates by every output that may have a gradient.
    early = not requires_grad
    torch.library.opcheck(
        torch.ops.lnl_ext.linear_bias_loss.default, (*tensors, None, *rest, early, early)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_backward(case: Case, requires_grad: bool):
    inputs, tensors, rest = arguments(case, requires_grad)
    detached = [None if t is None else t.detach() for t in tensors]
    denominators = torch.ops.lnl_ext.linear_bias_loss(*detached, None, *rest, False, False)[3]
    torch.library.opcheck(
        torch.ops.lnl_ext.linear_bias_loss_backward.default,
        (inputs.upstream, *tensors, denominators, *rest, True, True),
    )


def test_the_gradients_that_the_operator_returns_stay_as_they_were():
    _, tensors, rest = arguments(CASES[0], True)
    result = torch.ops.lnl_ext.linear_bias_loss(*tensors, None, *rest, True, True)
    before = [g.clone() for g in result[4:]]
    (3.0 * result[0]).backward()
    for made, old, tensor in zip(result[4:], before, tensors[:3], strict=True):
        assert torch.equal(made, old)
        torch.testing.assert_close(tensor.grad, 3.0 * old)


@pytest.mark.parametrize("confusion_weight", [0.5, 1.0])
@pytest.mark.parametrize("classes", [5, 70])
@pytest.mark.parametrize("reversal", [None, 0.3])
def test_the_confusion_term_acts_on_the_features(classes, reversal, confusion_weight):
    case = Case(
        7,
        classes,
        dtype=torch.float64,
        reversal=reversal,
        entropy_weight=0.1,
        confusion_weight=confusion_weight,
    )
    inputs, tensors, rest = arguments(case, True)
    results = torch.ops.lnl_ext.linear_bias_loss(
        *(None if t is None else t.detach() for t in tensors), None, *rest, True, True
    )
    loss, *_ = reference.linear_bias_loss(
        inputs.features,
        inputs.head_weight,
        inputs.head_bias,
        LossArguments(inputs.target, None, None, *rest[:3]),
    )
    torch.testing.assert_close(results[0], loss.detach())
    expected = torch.autograd.grad(loss, inputs.differentiable)
    torch.testing.assert_close(results[4:], expected)


# ---- errors

X, W, T = torch.randn(8, 3), torch.randn(5, 3), torch.randint(5, (8,))
BAD_CALLS = {
    "features type": ((None, W, T), TypeError, "features: expected a Tensor, got NoneType"),
    "features dtype": ((X.int(), W, T), TypeError, "features has dtype torch.int32"),
    "features rank": (
        (X[None], W, T),
        ValueError,
        r"features has shape \(1, 8, 3\), expected \(N, D\)",
    ),
    "weight type": ((X, 1.0, T), TypeError, "head_weight: expected a Tensor, got float"),
    "weight width": (
        (X, W[:, :2], T),
        ValueError,
        r"head_weight has shape \(5, 2\), expected \(heads \* C, 3\) for features of shape",
    ),
    "weight dtype": (
        (X, W.double(), T),
        TypeError,
        "head_weight has dtype torch.float64, expected torch.float32 as features",
    ),
    "weight device": (
        (X, W.to("meta"), T),
        RuntimeError,
        "head_weight is on meta, expected cpu as features",
    ),
    "bias shape": (
        (X, W, T, torch.zeros(4)),
        ValueError,
        r"head_bias has shape \(4,\), expected \(5,\) for head_weight of shape \(5, 3\)",
    ),
    "bias dtype": ((X, W, T, torch.zeros(5).half()), TypeError, "head_bias has dtype"),
    "target shape": (
        (X, W, T[:7]),
        ValueError,
        r"target has shape \(7,\), expected \(8,\) for logits of shape \(8, 5\)",
    ),
    "target dtype": ((X, W, T.int()), TypeError, "target has dtype torch.int32"),
    "no classes": ((X, W[:0], T), ValueError, "no classes"),
    "class": ((X, W, T * 0 + 5), IndexError, r"target\[0\] is 5, expected a class in \[0, 5\)"),
    "class weights": (
        (X, W, T, None, torch.ones(4)),
        ValueError,
        r"weight has shape \(4,\), expected \(5,\)",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_what_goes_wrong_is_named(name: str):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        fused_linear_bias_loss(*call)


OPERATOR_ERRORS = {
    "features": (0, X[0], r"features has shape \(3,\), expected \(N, D\)"),
    "weight": (1, W[:, :2], r"head_weight has shape \(5, 2\), expected \(heads \* C, 3\) for"),
    "weight dtype": (
        1,
        W.double(),
        r"head_weight has dtype torch\.float64, expected torch\.float32 as features",
    ),
    "bias": (2, torch.zeros(4), r"head_bias has shape \(4,\), expected \(5,\) for head_weight"),
    "target": (3, T[:3], r"target has shape \(3,\), expected \(8,\) for logits of shape \(8, 5\)"),
}


@pytest.mark.parametrize("name", OPERATOR_ERRORS)
def test_the_operator_itself_checks_what_it_is_given(name: str):
    place, value, message = OPERATOR_ERRORS[name]
    tensors = [X, W, torch.zeros(5), T]
    tensors[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lnl_ext.linear_bias_loss(
            *tensors, *[None] * 5, -100, 0.0, 1, False, 1, False, False
        )


def test_a_gradient_for_the_class_weights_is_an_error():
    with pytest.raises(ValueError, match="weight requires grad"):
        fused_linear_bias_loss(X, W, T, None, torch.ones(5, requires_grad=True))


def test_reference_and_devices_without_kernels_take_the_plain_path(monkeypatch):
    inputs = make_linear_inputs(LinearCase(Case(6, 4, reversal=0.5, entropy_weight=0.1)))
    expected = run(reference.fused_linear_bias_loss, inputs)
    monkeypatch.setattr(ops, "has_kernel", lambda features: False)
    actual = run(fused_linear_bias_loss, inputs)
    torch.testing.assert_close(actual.gradients, expected.gradients, rtol=0, atol=0)


# ---- edges


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "width"), [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("classes", [5, 70])
def test_nothing(rows, width, classes, reduction):
    case = Case(rows, classes, reduction=reduction, reversal=0.5, entropy_weight=0.1)
    inputs = make_linear_inputs(LinearCase(case, width=width))
    actual = run(fused_linear_bias_loss, inputs)
    expected = run(reference.fused_linear_bias_loss, inputs)
    torch.testing.assert_close(actual.loss, expected.loss, equal_nan=True)
    for gradient, tensor in zip(actual.gradients, inputs.differentiable, strict=True):
        assert gradient.shape == tensor.shape
        assert gradient.isfinite().all()
        assert rows > 0 or (gradient == 0).all()


@pytest.mark.parametrize("mask_entropy", [False, True])
@pytest.mark.parametrize("classes", [5, 70])
def test_all_targets_ignored(classes, mask_entropy):
    case = Case(6, classes, ignored=1.0, reversal=0.5, entropy_weight=0.3)
    case = Case(**{**vars(case), "mask_entropy": mask_entropy})
    results = run(fused_linear_bias_loss, make_linear_inputs(LinearCase(case)))
    assert results.loss.isnan()
    assert (results.gradients[1] == 0).all()
    assert (results.gradients[2] == 0).all()
    assert (results.gradients[0] == 0).all() == mask_entropy


@pytest.mark.parametrize("classes", [5, 70])
def test_rows_with_nan_and_infinite_features_stay_alone(classes):
    case = Case(6, classes, reduction="none", reversal=0.5, entropy_weight=0.3)
    inputs = make_linear_inputs(LinearCase(case))
    inputs.features[1, 3] = math.nan
    inputs.features[4, 2] = math.inf
    results = run(fused_linear_bias_loss, inputs)
    for value in (results.loss, results.gradients[0]):
        assert value[[1, 4]].isnan().all()
        assert value[[0, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize("classes", [5, 70])
def test_impossible_classes_add_nothing(classes):
    case = Case(6, classes, reversal=0.5, entropy_weight=0.3, dtype=torch.float64)
    inputs = make_linear_inputs(LinearCase(case))
    inputs.head_bias[2] = -math.inf
    inputs.target[inputs.target == 2] = 3
    results = run(fused_linear_bias_loss, inputs)
    expected = run(reference.fused_linear_bias_loss, inputs)
    assert results.loss.isfinite()
    torch.testing.assert_close(results.gradients, expected.gradients)
    assert (results.gradients[1][2] == 0).all()


def test_the_largest_number_of_classes():
    case = Case(3, 262144, reversal=0.5, entropy_weight=0.3)
    inputs = make_linear_inputs(LinearCase(case, width=4))
    results = run(fused_linear_bias_loss, inputs)
    expected = run(reference.fused_linear_bias_loss, inputs, torch.float64)
    for actual, wanted in zip(results.gradients, expected.gradients, strict=True):
        # sums of 262,144 products in float32
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm()


# ---- the same every time, with any number of threads


@pytest.mark.parametrize("shape", [(3000, 130, 12), (500, 64, 700)], ids=str)
def test_results_do_not_change_from_run_to_run(shape):
    rows, width, classes = shape
    case = Case(rows, classes, reversal=0.5, entropy_weight=0.3)
    inputs = make_linear_inputs(LinearCase(case, width=width))
    first = run(fused_linear_bias_loss, inputs)
    for _ in range(3):
        again = run(fused_linear_bias_loss, inputs)
        assert torch.equal(again.loss, first.loss)
        assert all(map(torch.equal, again.gradients, first.gradients))


# ---- memory

MEMORY = """
import re, sys, torch
from lnl_ext import fused_linear_bias_loss, reference
torch.set_num_threads(1)
kind = sys.argv[1]
rows, width, classes = 2048, 64, 16384  # logits of 128 MiB
x = torch.randn(rows, width, requires_grad=True)
w = (torch.randn(classes, width) / 8).requires_grad_()
t = torch.randint(classes, (rows,))
small = (x[:64], w[:256], t[:64] % 256)  # what is loaded and allocated once
f = fused_linear_bias_loss if kind == "fused" else reference.fused_linear_bias_loss
options = {"reversal": float(sys.argv[2]), "entropy_weight": 0.01}
f(*small, **options).backward()
x.grad = w.grad = None
# Not getrusage: its maximum begins with that of the process from which this one was forked.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
f(x, w, t, **options).backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
def test_the_logits_never_exist_whole():
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])

    def peak(kind: str) -> int:
        command = [sys.executable, "-c", MEMORY, kind, "0.5"]
        result = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, check=True
        )
        return int(result.stdout)

    fused, plain = peak("fused"), peak("plain")
    logits = 2048 * 16384 * 4
    assert plain > 2 * logits
    assert fused < plain / 8
