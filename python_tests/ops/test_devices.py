"""Both operators and the adversary on every device with kernels: what users do with them.

The loss of logits has its cases in test_bias_loss_parity.py and test_bias_loss_operators.py; on the
CPU there is more of everything in the other files.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from backends import REDUCTIONS, scalar
from bias_loss_cases import Case, make_inputs
from hypothesis import given, settings
from linear_cases import (
    LinearCase,
    LinearInputs,
    assert_linear_matches,
    linear_cases,
    make_linear_inputs,
    run,
)
from torch import Tensor

from lnl_ext import BiasAdversary, fused_bias_loss, fused_linear_bias_loss, reference


def moved(inputs: LinearInputs, device: torch.device) -> LinearInputs:
    """Return the inputs on a device, strides as they are."""
    tensors = {
        field.name: value.to(device, memory_format=torch.preserve_format)
        for field in dataclasses.fields(inputs)
        if isinstance(value := getattr(inputs, field.name), Tensor)
    }
    return dataclasses.replace(inputs, **tensors)


def check(case: LinearCase, device: torch.device) -> None:
    inputs = make_linear_inputs(case)
    results = run(fused_linear_bias_loss, moved(inputs, device))
    for name in ("loss", "cross_entropy", "entropy"):
        setattr(results, name, getattr(results, name).cpu())
    results.gradients = [gradient.cpu() for gradient in results.gradients]
    expected = run(reference.fused_linear_bias_loss, inputs, torch.float64)
    assert_linear_matches(inputs, results, expected)


@settings(max_examples=100)
@given(case=linear_cases())
def test_linear_head_matches_the_reference(device: torch.device, case: LinearCase):
    check(case, device)


# On chip with tiles of 32 rows and of fewer, and in chunks for many columns and for a wide head.
@pytest.mark.parametrize(
    ("rows", "width", "classes", "heads"),
    [
        (5000, 24, 3, 1),
        (1300, 520, 12, 1),
        (700, 1040, 5, 4),
        (300, 16, 5000, 1),
        (90, 4000, 64, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_larger_linear_heads(device, rows, width, classes, heads, dtype):
    loss = Case(
        rows, classes, heads=heads, dtype=dtype, entropy_weight=0.2, reversal=0.5, ignored=0.1
    )
    check(LinearCase(loss, width), device)


LINEAR_CASES = [
    Case(6, 4, reversal=0.5, entropy_weight=0.1),
    Case(6, 4, reduction="none", weighted=True, ignored=0.3),
    Case(5, 4, heads=2, confusion_weight=0.5, mask_entropy=True),
    Case(4, 70, target="probabilities", label_smoothing=0.1, reduction="sum"),
    Case(4, 5, dtype=torch.float16, entropy_weight=0.1),
]


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_linear_operators_keep_their_contract(device: torch.device, case: Case):
    inputs = moved(make_linear_inputs(LinearCase(case, width=6)), device)
    tensors = (
        inputs.features,
        inputs.head_weight,
        inputs.head_bias,
        inputs.target,
        inputs.weight,
    )
    rest = (
        *(scalar(c, device) for c in (case.reversal, case.entropy_weight, case.confusion_weight)),
        case.ignore_index,
        case.label_smoothing,
        REDUCTIONS[case.reduction],
        case.mask_entropy,
        case.heads,
    )
    early = case.dtype != torch.float16 and case.reduction != "none"
    forward, backward = (
        torch.ops.lnl_ext.linear_bias_loss,
        torch.ops.lnl_ext.linear_bias_loss_backward,
    )
    torch.library.opcheck(forward.default, (*tensors, None, *rest, early, early))
    denominators = forward(*tensors, None, *rest, False, False)[3]
    arguments = (inputs.upstream, *tensors, denominators, *rest, True, True)
    torch.library.opcheck(backward.default, arguments)


def losses_of(device: torch.device, dtype: torch.dtype, reversal: float | None):
    """Return functions of leaves: logits in both layouts, heads on chip and in chunks."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    options = {"entropy_weight": 0.4, "reversal": reversal, "ignore_index": 1}

    def loss_of(*shape: int):
        target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
        return lambda z: fused_bias_loss(z, target, **options), (normal(*shape),)

    def linear_of(n: int, d: int, c: int):
        target = torch.randint(c, (n,), device=device)
        leaves = (normal(n, d), normal(c, d), normal(c))
        return lambda x, w, b: fused_linear_bias_loss(x, w, target, b, **options), leaves

    return [loss_of(5, 4), loss_of(2, 3, 4), linear_of(5, 4, 3), linear_of(3, 2, 66)]


@pytest.mark.parametrize("reversal", [None, 0.3])
@pytest.mark.parametrize("which", range(4))
def test_first_and_second_derivatives(device: torch.device, which: int, reversal: float | None):
    loss, leaves = losses_of(device, torch.float64, reversal)[which]
    if reversal is None:
        assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    linear = len(leaves) > 1
    if reversal is None or not linear:  # a split gradient: test_linear_autograd.py
        assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("which", range(4))
def test_compiled_whole(device: torch.device, which: int):
    torch._dynamo.reset()
    loss, leaves = losses_of(device, torch.float32, 0.3)[which]
    compiled = torch.compile(lambda *tensors: loss(*tensors) * 2.0, fullgraph=True)
    actual, expected = compiled(*leaves), 2.0 * loss(*leaves)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_with_a_loss_scaler(device: torch.device, dtype: torch.dtype):
    torch.manual_seed(0)
    features = torch.randn(4096, 32, device=device)
    target = torch.randint(5, (4096,), device=device)
    head = torch.nn.Linear(32, 5, device=device)
    scaler = torch.amp.GradScaler(device.type)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.0)
    exact = torch.autograd.grad(
        reference.fused_bias_loss(head(features).double(), target, entropy_weight=0.1), head.weight
    )[0]
    for loss in (
        lambda: fused_bias_loss(head(features), target, entropy_weight=0.1),
        lambda: fused_linear_bias_loss(
            features, head.weight, target, head.bias, entropy_weight=0.1
        ),
    ):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype):
            value = loss()
        assert value.dtype == torch.float32
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert head.weight.grad.dtype == torch.float32
        # a gradient of one site is about 1e-5: without the scale float16 would lose it
        assert (head.weight.grad - exact).norm() <= 0.05 * exact.norm()


def test_the_adversary_gives_every_network_its_gradient(device, monkeypatch):
    # cuDNN's convolutions round to 11 bits where that is allowed, and sums of gradients differ.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    for head, shape in (
        (torch.nn.Linear(8, 5), (64, 8)),
        (
            torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)),
            (64, 8),
        ),
        (torch.nn.Conv2d(8, 5, 3, padding=1), (4, 8, 6, 6)),
    ):
        features = torch.randn(shape, device=device).requires_grad_()
        target = torch.randint(5, (shape[0], *shape[2:]), device=device)
        head.to(device)
        adversary = BiasAdversary(head, reversal=0.3, entropy_weight=0.2).to(device)
        leaves = [features, *head.parameters()]
        actual = torch.autograd.grad(adversary(features, target), leaves)
        logits = head(features)
        log_p = torch.log_softmax(logits, 1)
        entropy = -(log_p.exp() * log_p).sum(1).mean()
        cross_entropy = torch.nn.functional.cross_entropy(logits, target)
        for_head = torch.autograd.grad(cross_entropy, leaves[1:], retain_graph=True)
        for_features = torch.autograd.grad(-0.3 * cross_entropy - 0.2 * entropy, features)
        torch.testing.assert_close(actual, for_features + for_head, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("which", range(4))
def test_the_same_results_every_time(device: torch.device, which: int):
    loss, leaves = losses_of(device, torch.float32, 0.3)[which]
    first = torch.autograd.grad(loss(*leaves), leaves)
    for _ in range(5):
        assert all(map(torch.equal, first, torch.autograd.grad(loss(*leaves), leaves)))


# ---- CUDA alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(4))
def test_nothing_waits_for_the_device(cuda_device: torch.device, which: int):
    loss, leaves = losses_of(cuda_device, torch.float32, 0.3)[which]
    torch.autograd.grad(loss(*leaves), leaves)  # cuBLAS and the allocator start
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(3.0 * loss(*leaves), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("which", range(4))
def test_work_is_on_the_current_stream(cuda_device: torch.device, which: int):
    loss, leaves = losses_of(cuda_device, torch.float32, 0.3)[which]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # work on another stream would come before the copies
        doubled = [leaf.detach().mul(1.0).requires_grad_() for leaf in leaves]
        actual = torch.autograd.grad(loss(*doubled), doubled)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(actual, expected)  # cuBLAS may choose otherwise on another stream


@pytest.mark.parametrize("target", [5, -3, 2**40])
@pytest.mark.parametrize("linear", [False, True])
def test_a_label_out_of_range_makes_its_own_site_nan(cuda_device, linear: bool, target: int):
    labels = torch.tensor([0, 1, target, 2], device=cuda_device)
    features = torch.randn(4, 6, device=cuda_device).requires_grad_()
    weight = torch.randn(5, 6, device=cuda_device)
    if linear:
        loss = fused_linear_bias_loss(features, weight, labels, reduction="none")
    else:
        loss = fused_bias_loss(features @ weight.t(), labels, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), features)
    others = torch.tensor([0, 1, 3], device=cuda_device)
    assert loss[2].isnan()
    assert gradient[2].isnan().all()
    assert loss[others].isfinite().all()
    assert gradient[others].isfinite().all()


def test_another_device_than_the_current_one(cuda_device: torch.device):
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one CUDA device")
    inputs = make_inputs(Case(6, 4, entropy_weight=0.1))
    logits = inputs.logits.to("cuda:1").requires_grad_()
    with torch.cuda.device(0):
        loss = fused_bias_loss(logits, inputs.target.to("cuda:1"), entropy_weight=0.1)
        (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.device == gradient.device == logits.device
    expected = reference.fused_bias_loss(inputs.logits, inputs.target, entropy_weight=0.1)
    torch.testing.assert_close(loss.cpu(), expected)
