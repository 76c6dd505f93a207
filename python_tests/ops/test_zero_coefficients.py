"""A term whose coefficient is 0 is not added: no NaN or infinity of a site that does not count."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from backends import Backend
from bias_loss_cases import Case, Inputs, make_inputs
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lnl_ext
from lnl_ext.ops import bias_loss as ops

BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
KERNELS = pytest.mark.parametrize(
    ("classes", "space", "layout"),
    [
        *((classes, (), "contiguous") for classes in (5, 40, 100, 2000)),
        *((classes, (33,), "contiguous") for classes in (5, 40)),
        (12, (3,), "channels_last"),
    ],
)


def with_bad_site(case: Case, bad: float) -> tuple[Inputs, Inputs]:
    """Return inputs whose second row is ignored, and the same with logits there that are bad."""
    clean = make_inputs(case)
    clean.target[1] = case.ignore_index
    logits = clean.logits.clone(memory_format=torch.preserve_format)
    logits[1, ::2] = bad
    return clean, dataclasses.replace(clean, logits=logits)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@KERNELS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"confusion_weight": 0.0, "reversal": 0.3, "reduction": "none"},
        {"label_smoothing": 0.1, "weighted": True, "heads": 2},
        {"mask_entropy": True, "entropy_weight": 0.4, "confusion_weight": 0.2},
        {"mask_entropy": True, "entropy_weight": 0.4, "heads": 2, "reduction": "none"},
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_a_site_that_does_not_count_may_hold_anything(
    backend: Backend, options, classes: int, space, layout: str, bad: float
):
    case = Case(3, classes, space, layout=layout, **options)
    clean, inputs = with_bad_site(case, bad)
    if bad == -math.inf:
        inputs.logits[1] = bad  # a row without probabilities
    expected, results = (backend.run(each.to(backend.device)) for each in (clean, inputs))
    for name in ("loss", "cross_entropy", "gradient", "head_gradient"):
        value = getattr(results, name)
        rest = value != 0 if "gradient" in name else torch.ones_like(value, dtype=torch.bool)
        assert value.isfinite().all(), name
        assert torch.equal(value[rest], getattr(expected, name)[rest]), name
    assert (results.head_gradient[1] == 0).all()
    assert (results.gradient[1] == 0).all()


@KERNELS
@pytest.mark.parametrize("term", ["entropy_weight", "confusion_weight"])
def test_a_site_whose_entropy_counts_is_nan_but_not_for_the_head(
    backend: Backend, classes: int, space, layout: str, term: str
):
    case = Case(3, classes, space, layout=layout, reduction="none", **{term: 0.4})
    clean, inputs = with_bad_site(case, math.nan)
    expected, results = (backend.run(each.to(backend.device)) for each in (clean, inputs))
    assert results.loss[1].isnan().all()
    assert results.gradient[1].isnan().all()
    assert results.loss[[0, 2]].isfinite().all()
    assert torch.equal(results.head_gradient, expected.head_gradient)


@KERNELS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_confusion_term_of_weight_0_is_not_added(
    backend: Backend, classes: int, space, layout: str, reduction: str
):
    """It is infinite where a class is impossible, and everything else is not."""
    case = Case(3, classes, space, layout=layout, reduction=reduction, confusion_weight=0.0)
    inputs = make_inputs(case)
    inputs.logits[:, 1] = -math.inf
    inputs.target[inputs.target == 1] = 0
    without = dataclasses.replace(inputs, case=dataclasses.replace(case, confusion_weight=None))
    results, expected = (backend.run(each.to(backend.device)) for each in (inputs, without))
    torch.testing.assert_close(vars(results), vars(expected))
    assert results.loss.isfinite().all()


# ---- the entry points ----------------------------------------------------------------------

MODULES = pytest.mark.parametrize("module", [lnl_ext, lnl_ext.reference], ids=["kernel", "plain"])
ZEROS = pytest.mark.parametrize(
    "zero", [0.0, torch.tensor(0.0), torch.tensor(0.0, dtype=torch.float64)], ids=str
)
ROWS, IGNORED = 5, [1, 3]


@MODULES
@ZEROS
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("options", [{}, {"reversal": 0.5}, {"mask_entropy": True}], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_fused_bias_loss(module, zero, bad: float, heads: int, options, reduction: str):
    torch.manual_seed(0)
    logits = torch.randn(ROWS, heads * 4)
    logits[IGNORED] = bad
    logits.requires_grad_()
    target = torch.randint(4, (ROWS, heads) if heads > 1 else (ROWS,))
    target[IGNORED] = -100
    loss = module.fused_bias_loss(
        logits, target, entropy_weight=zero, heads=heads, reduction=reduction, **options
    )
    wanted = sum(
        F.cross_entropy(part, target.reshape(ROWS, heads)[:, i], reduction=reduction)
        for i, part in enumerate(logits.chunk(heads, 1))
    )
    torch.testing.assert_close(loss, wanted)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    (as_in_torch,) = torch.autograd.grad(wanted.sum(), logits)
    others = [i for i in range(ROWS) if i not in IGNORED]
    factor = -options.get("reversal", -1.0)
    torch.testing.assert_close(gradient[others], factor * as_in_torch[others])
    assert (gradient[IGNORED] == 0).all()


@MODULES
@pytest.mark.parametrize("mask_entropy", [False, True])
def test_second_derivatives(module, mask_entropy: bool):
    logits = torch.randn(ROWS, 4)
    logits[IGNORED] = math.nan
    logits.requires_grad_()
    target = torch.tensor([0, -100, 2, -100, 1])
    loss = module.fused_bias_loss(
        logits, target, entropy_weight=0.2 * mask_entropy, mask_entropy=mask_entropy
    )
    (gradient,) = torch.autograd.grad(loss.square(), logits, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), logits)
    assert second.isfinite().all()
    assert (second[IGNORED] == 0).all()


def linear_problem(dtype: torch.dtype, classes: int, heads: int) -> tuple[Tensor, ...]:
    """Return finite features, head and target, of which the ignored rows have infinite logits."""
    torch.manual_seed(0)
    features = torch.randn(ROWS, 6).to(dtype)
    features[IGNORED] = torch.finfo(dtype).max
    weight = (2 + torch.rand(heads * classes, 6)).to(dtype)
    target = torch.randint(classes, (ROWS, heads) if heads > 1 else (ROWS,))
    target[IGNORED] = -100
    return features.requires_grad_(), weight.requires_grad_(), target


@MODULES
@ZEROS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("classes", "heads"), [(5, 1), (5, 2), (100, 1)])
@pytest.mark.parametrize("reversal", [None, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fused_linear_bias_loss(module, zero, dtype, classes, heads, reversal, reduction):
    features, weight, target = linear_problem(dtype, classes, heads)
    loss = module.fused_linear_bias_loss(
        features,
        weight,
        target,
        entropy_weight=zero,
        reversal=reversal,
        heads=heads,
        reduction=reduction,
    )
    assert loss.isfinite().all()
    for_features, for_weight = torch.autograd.grad(loss.sum(), (features, weight))
    assert for_features.isfinite().all()
    assert (for_features[IGNORED] == 0).all()
    assert for_weight.isfinite().all()


HEADS = {
    "linear": lambda: nn.Linear(6, 5),
    "linear, in chunks": lambda: nn.Linear(6, 100),
    "linear at the end": lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)),
    "any": lambda: nn.Sequential(nn.Linear(6, 5), nn.Identity()),
}


@pytest.mark.parametrize("has_kernel", [True, False], ids=["kernel", "plain"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "given"])
@pytest.mark.parametrize(
    "options",
    [
        {"entropy_weight": 0.0},
        {"entropy_weight": torch.tensor(0.0), "confusion_weight": torch.tensor(0.0)},
        {"entropy_weight": 0.2, "confusion_weight": 0.1, "mask_entropy": True},
    ],
    ids=["numbers", "tensors", "mask"],
)
def test_adversary(monkeypatch, options, reduction: str, head: str, has_kernel: bool):
    features, _, target = linear_problem(torch.float32, 5, 1)
    module = HEADS[head]()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 2.0, 3.0)
    if not has_kernel:
        monkeypatch.setattr(ops, "has_kernel", lambda logits: False)
        module.append(nn.Identity()) if isinstance(module, nn.Sequential) else None
    adversary = lnl_ext.BiasAdversary(
        module, reduction="mean" if reduction == "given" else reduction, **options
    )
    given = torch.tensor([[3.0, 5.0]]) if reduction == "given" else None
    loss = adversary(features, target, denominators=given)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert features.grad.isfinite().all()
    assert (features.grad[IGNORED] == 0).all()
    if head != "linear at the end":  # whose last layer's input is infinite
        for parameter in module.parameters():
            assert parameter.grad.isfinite().all()
