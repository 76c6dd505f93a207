"""fused_bias_loss under autograd: derivatives of both orders, graphs that stay, several losses."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import scalar
from bias_loss_cases import Case, Results, assert_matches_oracle, cases, make_inputs
from hypothesis import given, settings

from lnl_ext import BiasLoss, fused_bias_loss, fused_linear_bias_loss, reference


def run_function(inputs, loss=fused_bias_loss) -> Results:
    case = inputs.case
    logits = inputs.logits.detach().requires_grad_()
    terms = loss(
        logits,
        inputs.target,
        inputs.weight,
        entropy_weight=case.entropy_weight,
        reversal=case.reversal,
        ignore_index=case.ignore_index,
        label_smoothing=case.label_smoothing,
        reduction=case.reduction,
        mask_entropy=case.mask_entropy,
        heads=case.heads,
        return_terms=True,
    )
    assert isinstance(terms, BiasLoss)
    assert not terms.cross_entropy.requires_grad
    assert not terms.entropy.requires_grad
    (gradient,) = torch.autograd.grad(terms.loss, logits, inputs.upstream)
    return Results(*(term.detach() for term in terms), gradient)


@settings(max_examples=max(600, settings.default.max_examples))
@given(case=cases())
def test_value_and_gradient_match_the_oracle(case: Case):
    inputs = make_inputs(case)
    before = inputs.logits.clone()
    assert_matches_oracle(inputs, run_function(inputs))
    assert torch.equal(inputs.logits, before)


@settings(max_examples=100)
@given(case=cases())
def test_the_reference_in_the_logits_dtype_agrees_too(case: Case):
    # What devices without kernels run. Without the float64 of the oracle it is held to what the
    # plain sums of PyTorch keep: 1e-6 of the larger of the terms.
    inputs = make_inputs(case)
    assert_matches_oracle(inputs, run_function(inputs, reference.fused_bias_loss))


OPTIONS = [
    {"space": (3,)},
    {"space": (3,), "layout": "channels_last"},
    {"heads": 2},
    {"space": (2,), "heads": 2, "target": "probabilities", "weighted": True},
    {"weighted": True, "ignored": 0.3, "mask_entropy": True},
    {"space": (2, 2), "label_smoothing": 0.2, "weighted": True, "ignored": 0.3},
    {"target": "probabilities", "label_smoothing": 0.2},
    {"classes": 1},
]


@pytest.mark.parametrize("reversal", [None, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: str(Case(**o)))
def test_first_and_second_derivatives(options: dict, reduction: str, reversal: float | None):
    case = Case(
        **{
            "rows": 3,
            "classes": 3,
            "dtype": torch.float64,
            "reduction": reduction,
            "entropy_weight": 0.4,
            "reversal": reversal,
            **options,
        }
    )
    inputs = make_inputs(case)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return fused_bias_loss(
            logits,
            inputs.target,
            inputs.weight,
            entropy_weight=case.entropy_weight,
            reversal=case.reversal,
            ignore_index=case.ignore_index,
            label_smoothing=case.label_smoothing,
            reduction=case.reduction,
            mask_entropy=case.mask_entropy,
            heads=case.heads,
        )

    logits = inputs.logits.requires_grad_()
    if reversal is None:
        assert torch.autograd.gradcheck(loss, logits, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, logits, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_penalty_matches_the_reference(dtype, reduction):
    logits = torch.randn(6, 4, 3, dtype=dtype)
    target = torch.randint(4, (6, 3))
    results = []
    for loss in (fused_bias_loss, reference.fused_bias_loss):
        z = logits.double() if loss is reference.fused_bias_loss else logits
        z = z.clone().requires_grad_()
        value = loss(z, target, entropy_weight=0.5, reversal=0.7, reduction=reduction).sum()
        (first,) = torch.autograd.grad(value, z, create_graph=True)
        (value + first.double().square().sum()).backward()
        results.append(z.grad.double())
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert (results[0] - results[1]).norm() <= bound * results[1].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_retain_graph_gives_the_same_gradient_again(dtype, reduction):
    z = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    loss = fused_bias_loss(z, torch.randint(4, (6,)), entropy_weight=0.5, reduction=reduction)
    upstream = torch.full_like(loss, 3.0)
    first = torch.autograd.grad(loss, z, upstream, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, z, upstream, retain_graph=True)[0].clone()
    third = torch.autograd.grad(loss, z, upstream)[0]
    # The last may be scaled in place of being copied, with one rounding less.
    for other in (second, third):
        torch.testing.assert_close(other, first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, z, upstream)


def test_two_losses_on_one_logits_tensor():
    z = torch.randn(6, 4, requires_grad=True)
    before = z.detach().clone()
    targets = torch.randint(4, (2, 6))

    def gradient(*losses: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(sum(losses), z)[0]

    def loss(i: int) -> torch.Tensor:
        return fused_bias_loss(z, targets[i], entropy_weight=0.1 * i, reversal=0.5 + i)

    together = gradient(loss(0), 2 * loss(1))
    torch.testing.assert_close(together, gradient(loss(0)) + gradient(2 * loss(1)))
    assert torch.equal(z, before)


def test_gradients_accumulate_and_are_not_shared():
    z = torch.randn(6, 4, requires_grad=True)
    target = torch.randint(4, (6,))
    fused_bias_loss(z, target).backward()
    once = z.grad.clone()
    fused_bias_loss(z, target).backward()
    torch.testing.assert_close(z.grad, 2 * once)


def test_no_gradient_is_made_where_none_is_needed():
    z = torch.randn(6, 4)
    target = torch.randint(4, (6,))
    assert not fused_bias_loss(z, target).requires_grad
    with torch.no_grad():
        assert not fused_bias_loss(z.requires_grad_(), target).requires_grad


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_numbers_and_tensors_are_the_same_coefficients(kind):
    z = torch.randn(6, 4, requires_grad=True)
    target = torch.randint(4, (6,))
    expected = torch.autograd.grad(fused_bias_loss(z, target, entropy_weight=0.25, reversal=0.5), z)
    actual = torch.autograd.grad(
        fused_bias_loss(z, target, entropy_weight=kind(0.25), reversal=kind(0.5)), z
    )
    torch.testing.assert_close(actual, expected)


def test_a_coefficient_written_between_forward_and_backward_is_an_error():
    for dtype in (torch.float32, torch.float16):
        z = torch.randn(6, 4, dtype=dtype, requires_grad=True)
        target = torch.randint(4, (6,))
        reversal = scalar(0.5, z.device)
        loss = fused_bias_loss(z, target, reversal=reversal)
        reversal.fill_(3.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, z)


def test_functional_gradient():
    z = torch.randn(6, 4)
    target = torch.randint(4, (6,))
    for reversal, reduction in itertools.product((None, 0.5), ("mean", "sum", "none")):

        def loss(z: torch.Tensor, function=fused_bias_loss, r=reversal, reduction=reduction):
            return function(z, target, entropy_weight=0.3, reversal=r, reduction=reduction).sum()

        leaf = z.clone().requires_grad_()
        expected = torch.autograd.grad(loss(leaf, reference.fused_bias_loss), leaf)[0]
        torch.testing.assert_close(torch.func.grad(loss)(z), expected)
        value, gradient = torch.func.grad_and_value(loss)(z)[::-1]
        torch.testing.assert_close(value, loss(z))
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    "transform",
    [
        lambda loss, z: torch.func.jvp(loss, (z,), (torch.ones_like(z),)),
        lambda loss, z: torch.func.jvp(torch.func.grad(loss), (z,), (torch.ones_like(z),)),
        lambda loss, z: torch.func.vmap(loss)(z.expand(2, *z.shape)),
        lambda loss, z: torch.func.vmap(torch.func.grad(loss))(z.expand(2, *z.shape)),
        lambda loss, z: torch.func.hessian(loss)(z),
    ],
    ids=["jvp", "jvp of grad", "vmap", "vmap of grad", "hessian"],
)
def test_forward_mode_and_vmap_say_that_they_are_missing(transform):
    z = torch.randn(3, 4)
    target = torch.randint(4, (3,))
    with pytest.raises((RuntimeError, NotImplementedError), match=r"vmap|jvp"):
        transform(lambda z: fused_bias_loss(z, target, entropy_weight=0.1), z)


def test_forward_mode_outside_of_functional_transforms_is_an_error_too():
    z = torch.randn(3, 4)
    target = torch.randint(4, (3,))
    with torch.autograd.forward_ad.dual_level():
        for leaf in (z, z.clone().requires_grad_()):
            dual = torch.autograd.forward_ad.make_dual(leaf, torch.ones_like(z))
            with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
                fused_bias_loss(dual, target)


def test_float16_survives_the_mean_of_many_sites_and_a_loss_scaler():
    z = torch.randn(4096, 64, dtype=torch.float16)
    target = torch.randint(64, (4096,))
    scale = 2.0**16
    leaf = z.clone().requires_grad_()
    (fused_bias_loss(leaf, target, entropy_weight=0.1) * scale).backward()
    exact = z.double().requires_grad_()
    (reference.fused_bias_loss(exact, target, entropy_weight=0.1) * scale).backward()
    assert (leaf.grad.double() - exact.grad).norm() <= 2.0**-11 * exact.grad.norm()


def test_autocast_computes_in_float32():
    x = torch.randn(8, 16)
    weight = torch.randn(5, 16, requires_grad=True)
    target = torch.randint(5, (8,))
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.nn.functional.linear(x, weight)
        assert logits.dtype == torch.bfloat16
        loss = fused_bias_loss(logits, target, torch.ones(5), entropy_weight=0.1, reversal=0.5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, reference.fused_bias_loss(logits.float(), target, entropy_weight=0.1)
    )
    loss.backward()
    assert weight.grad.dtype == torch.float32


def test_results_depend_on_neither_run_nor_memory_format():
    z = torch.randn(64, 8, 14, 14)
    target = torch.randint(8, (64, 14, 14))

    def gradient(z: torch.Tensor) -> torch.Tensor:
        leaf = z.detach().requires_grad_()
        fused_bias_loss(leaf, target, entropy_weight=0.1, reversal=0.5).backward()
        return leaf.grad

    first = gradient(z)
    assert all(torch.equal(gradient(z), first) for _ in range(3))
    channels_last = gradient(z.to(memory_format=torch.channels_last))
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last, first)


@pytest.mark.parametrize("linear", [False, True])
def test_what_a_saved_tensor_hook_keeps_stays_as_it_was(linear):
    x, target = torch.randn(6, 4, requires_grad=True), torch.randint(4, (6,))
    kept: list[torch.Tensor] = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if linear:
            loss = fused_linear_bias_loss(x, torch.randn(4, 4), target, entropy_weight=0.1)
        else:
            loss = fused_bias_loss(x, target, entropy_weight=0.1)
    before = [tensor.clone() for tensor in kept]
    (3.0 * loss).backward()
    assert all(map(torch.equal, kept, before))
