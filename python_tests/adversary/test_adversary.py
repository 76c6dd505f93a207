"""BiasAdversary gives f, g and h the gradients of the table, from one forward of the head."""

from __future__ import annotations

import copy

import pytest
import torch
from adversary_networks import (
    CLASSES,
    HEADS,
    batch,
    classifier,
    expected_gradients,
    feature_network,
    map_head,
    terms,
)
from nested import nested
from torch import nn
from torch.nn import functional as F  # noqa: N812

import lnl_ext.adversary.bias_adversary
from lnl_ext import BiasAdversary
from lnl_ext.adversary.heads import bias_head
from lnl_ext.ops import bias_loss as ops

COEFFICIENTS = {  # reversal, entropy_weight, confusion_weight
    "lnl": (0.3, 0.2, 0.0),
    "grl": (0.3, 0.0, 0.0),
    "entropy": (0.0, 0.2, 0.0),
    "blindeye": (0.0, 0.0, 1.0),
    "everything": (0.3, 0.2, 0.5),
    "nothing": (0.0, 0.0, 0.0),
}


@pytest.fixture(params=["kernel", "logits", "plain"])
def path(request, monkeypatch):
    """The fused operators; these on logits only; the plain PyTorch of devices without them."""
    if request.param == "plain":
        monkeypatch.setattr(ops, "has_kernel", lambda logits: False)
    if request.param == "logits":
        monkeypatch.setattr(lnl_ext.adversary.bias_adversary, "take_apart", lambda head: None)
    return request.param


def adversary_of(head: nn.Module, coefficients, **options) -> BiasAdversary:
    names = ("reversal", "entropy_weight", "confusion_weight")
    return BiasAdversary(head, **dict(zip(names, coefficients, strict=True)), **options)


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_every_network_gets_its_gradient(path, name: str):
    coefficients = COEFFICIENTS[name]
    f, g, h = feature_network(), classifier(), map_head()
    images, labels, bias = batch()
    expected = expected_gradients(f, g, h, images, labels, bias, coefficients, seed=1)
    reference_head = copy.deepcopy(h)
    adversary = adversary_of(h, coefficients, heads=HEADS)

    torch.manual_seed(1)
    features = f(images)
    before = features.detach().clone()
    loss = F.cross_entropy(g(features), labels) + adversary(features, bias)
    loss.backward()
    close([[p.grad for p in network.parameters()] for network in (f, g, h)], list(expected))
    assert torch.equal(features, before)

    torch.manual_seed(1)
    cross_entropy, entropy, confusion = terms(reference_head(before), bias)
    value = loss - F.cross_entropy(g(features), labels)
    close(value, cross_entropy - coefficients[1] * entropy + coefficients[2] * confusion)
    # one forward of the head: the running statistics moved once
    close(dict(h.named_buffers()), dict(reference_head.named_buffers()))


def test_the_head_runs_once(path):
    calls = []
    head = nn.Linear(3, 4)
    head.register_forward_hook(lambda *_: calls.append(1))
    adversary = BiasAdversary(head)
    adversary(torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1])).backward()
    assert len(calls) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.2])
def test_options_and_upstream_factors(path, reduction, kind, entropy_weight):
    head = nn.Linear(6, CLASSES).double()
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(CLASSES, dtype=torch.float64)
    target = torch.randint(CLASSES, (7,))
    ignore_index = 2
    if kind == "probabilities":
        target, ignore_index = torch.rand(7, CLASSES, dtype=torch.float64).softmax(1), -100
    options = {"ignore_index": ignore_index, "label_smoothing": 0.1, "reduction": reduction}
    adversary = adversary_of(
        head, (0.3, entropy_weight, 0.0), weight=weight, mask_entropy=True, **options
    )
    loss = adversary(x, target)
    upstream = torch.rand_like(loss)
    loss.backward(upstream)

    logits = head(x)
    cross_entropy = F.cross_entropy(logits, target, weight, **options)
    counted = torch.ones(7, dtype=torch.float64)
    if kind == "index":
        counted = (target != ignore_index).double()
    log_p = F.log_softmax(logits, 1)
    entropy = -(log_p.exp() * log_p).sum(1) * counted
    if reduction != "none":
        entropy = entropy.sum() / (counted.sum() if reduction == "mean" else 1)
    close(loss, cross_entropy - entropy_weight * entropy)
    parameters = list(head.parameters())
    close(
        [p.grad for p in parameters],
        list(torch.autograd.grad(cross_entropy, parameters, upstream, retain_graph=True)),
    )
    unlearn = -0.3 * cross_entropy - entropy_weight * entropy
    close([x.grad], list(torch.autograd.grad(unlearn, x, upstream)))


def test_a_frozen_head_stays_and_the_features_still_unlearn(path):
    f, g, h = feature_network(), classifier(), map_head()
    images, labels, bias = batch()
    expected, *_ = expected_gradients(f, g, h, images, labels, bias, (0.3, 0.0, 0.0), seed=1)
    h.requires_grad_(False)
    torch.manual_seed(1)
    features = f(images)
    adversary = adversary_of(h, (0.3, 0.0, 0.0), heads=HEADS)
    (F.cross_entropy(g(features), labels) + adversary(features, bias)).backward()
    close([p.grad for p in f.parameters()], expected)
    assert all(p.grad is None for p in h.parameters())


def test_a_partly_frozen_head(path):
    head = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, CLASSES)).double()
    head[0].requires_grad_(False)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(CLASSES, (6,))
    adversary_of(head, (0.3, 0.2, 0.0))(x, target).backward()
    cross_entropy, entropy, _ = terms(head(x), target, heads=1)
    close(
        [p.grad for p in head[1].parameters()],
        list(torch.autograd.grad(cross_entropy, list(head[1].parameters()), retain_graph=True)),
    )
    close([x.grad], list(torch.autograd.grad(-0.3 * cross_entropy - 0.2 * entropy, x)))


@pytest.mark.parametrize("coefficients", [(0.3, 0.0, 0.0), (0.3, 0.2, 0.0)], ids=str)
def test_features_that_need_no_gradient_train_the_head_alone(path, coefficients):
    head = nn.Linear(3, CLASSES).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    target = torch.randint(CLASSES, (6,))
    adversary_of(head, coefficients)(x, target).backward()
    expected = torch.autograd.grad(terms(head(x), target, 1)[0], list(head.parameters()))
    close([p.grad for p in head.parameters()], list(expected))
    assert x.grad is None


def test_nothing_that_needs_a_gradient(path):
    head = nn.Linear(3, 2).requires_grad_(False)
    adversary = BiasAdversary(head)
    x, target = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    assert not adversary(x, target).requires_grad
    head.requires_grad_(True)
    with torch.no_grad():
        assert not adversary(x.requires_grad_(), target).requires_grad


def test_a_parameter_the_output_does_not_depend_on_gets_none(path):
    head = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    head.forward = lambda x: head["used"](x)
    adversary = BiasAdversary(head)
    adversary(torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1])).backward()
    assert head["used"].weight.grad is not None
    assert head["unused"].weight.grad is None


@pytest.mark.parametrize("coefficients", [(0.3, 0.0, 0.0), (0.3, 0.2, 0.1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_retain_graph_gives_the_same_gradients_again(path, coefficients, dtype):
    head = nn.Linear(3, CLASSES).to(dtype)
    adversary = adversary_of(head, coefficients)
    x = torch.randn(6, 3, dtype=dtype, requires_grad=True)
    loss = adversary(x, torch.randint(CLASSES, (6,)))
    inputs = [x, *head.parameters()]
    first = torch.autograd.grad(loss * 3, inputs, retain_graph=True)
    second = torch.autograd.grad(loss * 3, inputs, retain_graph=True)
    third = torch.autograd.grad(loss * 3, inputs)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, inputs)


def test_gradients_accumulate_over_batches(path):
    head = nn.Linear(3, CLASSES).double()
    adversary = adversary_of(head, (0.3, 0.2, 0.0))
    x = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(CLASSES, (12,))
    for part, each in zip(x.split(4), target.split(4), strict=True):
        (adversary(part, each) / 3).backward()
    accumulated = [x.grad.clone(), *(p.grad.clone() for p in head.parameters())]
    x.grad = None
    head.zero_grad()
    adversary(x, target).backward()
    close(accumulated, [x.grad, *(p.grad for p in head.parameters())])


def test_two_adversaries_on_the_same_features(path):
    heads = [nn.Linear(3, CLASSES).double() for _ in range(2)]
    adversaries = [adversary_of(head, (0.3, 0.2, 0.0)) for head in heads]
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(CLASSES, (6,))
    sum(adversary(x, target) for adversary in adversaries).backward()
    both = x.grad.clone()
    x.grad = None
    for adversary in adversaries:
        adversary(x, target).backward()
    close(both, x.grad)


def test_set_progress_between_forward_and_backward_changes_nothing(path):
    head = nn.Linear(3, CLASSES)
    adversary = BiasAdversary(head, reversal="linear", entropy_weight="linear")
    x = torch.randn(6, 3, requires_grad=True)
    target = torch.randint(CLASSES, (6,))
    adversary.set_progress(0.25)
    (expected,) = torch.autograd.grad(adversary(x, target), x)
    loss = adversary(x, target)
    adversary.set_progress(0.75)
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.equal(gradient, expected)


def test_return_terms(path):
    head = nn.Linear(3, CLASSES).double()
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(CLASSES, (6,))
    result = BiasAdversary(head, entropy_weight=0.2)(x, target, return_terms=True)
    cross_entropy, entropy, _ = terms(head(x), target, heads=1)
    close(result.cross_entropy, cross_entropy.detach())
    close(result.entropy, entropy.detach())
    close(result.loss, cross_entropy - 0.2 * entropy)
    assert not result.cross_entropy.requires_grad
    assert not result.entropy.requires_grad
    by_default = BiasAdversary(head, return_terms=True)
    assert by_default(x, target)._fields == ("loss", "cross_entropy", "entropy")
    assert isinstance(by_default(x, target, return_terms=False), torch.Tensor)


def test_autocast(path):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, CLASSES))
    adversary = adversary_of(head, (0.3, 0.2, 0.0))
    x = torch.randn(64, 16, requires_grad=True)
    target = torch.randint(CLASSES, (64,))
    inputs = [x, *head.parameters()]
    exact = torch.autograd.grad(adversary(x, target), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = adversary(x, target)
    assert loss.dtype == torch.float32
    for gradient, expected in zip(torch.autograd.grad(loss, inputs), exact, strict=True):
        assert gradient.dtype == expected.dtype
        # three matrix products each way in bfloat16, 2^-8 per rounding
        assert (gradient - expected).norm() <= 0.05 * expected.norm()


def test_float16_gradients_survive_the_mean_of_many_sites(path):
    # A mean's gradient per site is some 5e-6 here, of which float16 keeps six bits: it must meet
    # the loss scaler's factor in float32.
    head = nn.Conv2d(2, CLASSES, 1).half()
    adversary = adversary_of(head, (1.0, 0.0, 0.5))
    x = torch.randn(16, 2, 100, 100, dtype=torch.float16, requires_grad=True)
    target = torch.randint(CLASSES, (16, 100, 100))
    (adversary(x, target) * 2.0**16).backward()
    exact = copy.deepcopy(head).float()
    y = x.detach().float().requires_grad_()
    (adversary_of(exact, (1.0, 0.0, 0.5))(y, target) * 2.0**16).backward()
    assert (x.grad.float() - y.grad).norm() <= 2e-3 * y.grad.norm()


def test_double_backward_is_a_clear_error(path):
    head = nn.Linear(3, 2)
    x = torch.randn(4, 3, requires_grad=True)
    loss = BiasAdversary(head)(x, torch.tensor([0, 1, 0, 1]))
    inputs = [x, *head.parameters()]
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    for gradient in gradients:
        for wanted in inputs:
            with pytest.raises(RuntimeError, match="BiasAdversary has no second derivative"):
                torch.autograd.grad(gradient.sum(), wanted, retain_graph=True)


def test_functional_transforms_are_a_clear_error():
    adversary = BiasAdversary(nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match=r"does not work under torch.func transforms"):
        torch.func.grad(lambda x: adversary(x, torch.tensor([0])))(torch.randn(1, 3))


class Returns(nn.Module):
    """A head that returns what it was made with."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


X, TARGET = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
MAPS = torch.randn(4, 3, 5, 5)
BAD_CALLS = {
    "head": (lambda: BiasAdversary(torch.relu), TypeError, "head: expected a torch.nn.Module"),
    "heads": (
        lambda: BiasAdversary(nn.Linear(3, 2), heads=0),
        ValueError,
        "heads is 0, expected an int of at least 1",
    ),
    "reduction": (
        lambda: BiasAdversary(nn.Linear(3, 2), reduction="avg"),
        ValueError,
        "reduction is 'avg'",
    ),
    "reversal": (
        lambda: BiasAdversary(nn.Linear(3, 2), reversal=-0.1),
        ValueError,
        "reversal is -0.1, expected a finite number >= 0",
    ),
    "confusion_weight": (
        lambda: BiasAdversary(nn.Linear(3, 2), confusion_weight=float("nan")),
        ValueError,
        "confusion_weight is nan",
    ),
    "features": (
        lambda: BiasAdversary(nn.Linear(3, 2))([1.0], TARGET),
        TypeError,
        "features: expected a Tensor, got list",
    ),
    "device": (
        lambda: BiasAdversary(nn.Linear(3, 2))(X.to("meta"), TARGET),
        RuntimeError,
        "features are on meta, but the head is on cpu: move one of them",
    ),
    "output type": (
        lambda: BiasAdversary(Returns([X]))(X, TARGET),
        TypeError,
        "the head's output: expected a Tensor, got list",
    ),
    "output rank": (
        lambda: BiasAdversary(Returns(X[0]))(X, TARGET),
        ValueError,
        r"the head's output has shape \(3,\), expected \(N, C\) or \(N, C, \*S\)",
    ),
    "output channels": (
        lambda: BiasAdversary(Returns(X), heads=2)(X, TARGET),
        ValueError,
        "heads is 2, which does not divide the 3 channels of the head's output",
    ),
    "target": (
        lambda: BiasAdversary(nn.Linear(3, 2))(X, TARGET[:3]),
        ValueError,
        r"target has shape \(3,\), expected \(4,\) for the head's output of shape \(4, 2\)",
    ),
    "weight": (
        lambda: BiasAdversary(nn.Linear(3, 2), weight=torch.ones(3))(X, TARGET),
        ValueError,
        r"weight has shape \(3,\), expected \(2,\)",
    ),
    "one class": (
        lambda: BiasAdversary(nn.Linear(3, 1))(X, torch.rand(4, 1)),
        ValueError,
        r"the head's output has shape \(4, 1\), a single class: its cross-entropy is 0",
    ),
    "one class, heads": (
        lambda: BiasAdversary(nn.Conv2d(3, 2, 1), heads=2)(MAPS, torch.zeros(4, 2, 5, 5).long()),
        ValueError,
        r"has shape \(4, 2, 5, 5\), a single class for each of 2 heads",
    ),
    "negative probability": (
        lambda: BiasAdversary(nn.Linear(3, 2))(X, torch.tensor([[1.5, -0.5]] * 4)),
        ValueError,
        "target of probabilities has the value -0.5, expected none below 0",
    ),
    "NaN for a probability": (
        lambda: BiasAdversary(nn.Linear(3, 2))(X, torch.full((4, 2), torch.nan)),
        ValueError,
        "target of probabilities has the value nan",
    ),
    "probabilities": (
        lambda: BiasAdversary(nn.Linear(3, 2))(X, torch.tensor([[0.5, 0.5]] * 3 + [[0.5, 0.498]])),
        ValueError,
        "target of probabilities sums to 0.998 at a site, expected 1 within 0.001",
    ),
    "probabilities of a head": (
        lambda: BiasAdversary(nn.Linear(3, 4), heads=2)(X, torch.tensor([[1.0, 1.0, 0, 0]] * 4)),
        ValueError,
        "target of probabilities sums to 0 at a site",
    ),
    "linear head": (
        lambda: BiasAdversary(nn.Linear(5, 2))(X, TARGET),
        ValueError,
        r"features have shape \(4, 3\), but the head's first layer is Linear\(in_features=5.* with "
        r"a weight of shape \(2, 5\)",
    ),
    "linear head of maps": (
        lambda: BiasAdversary(nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)))(
            MAPS, TARGET
        ),
        ValueError,
        r"features have shape \(4, 3, 5, 5\), which reach the layer as \(4, 75\), but the head's "
        r"first layer is Linear.* with a weight of shape \(2, 12\)",
    ),
    "convolution": (
        lambda: BiasAdversary(bias_head((8, 5, 5), 2))(MAPS, TARGET),
        ValueError,
        r"features have shape \(4, 3, 5, 5\), .* first layer is Conv2d.* shape \(128, 8, 3, 3\)",
    ),
    "convolution of rows": (
        lambda: BiasAdversary(bias_head((8, 5, 5), 2))(X, TARGET),
        ValueError,
        r"features have shape \(4, 3\), .* first layer is Conv2d",
    ),
    "ignore_index": (
        lambda: BiasAdversary(nn.Linear(3, 2), ignore_index=2**63)(X, TARGET),
        ValueError,
        "ignore_index is 9223372036854775808, expected an int of 64 bits",
    ),
    "nested features": (
        lambda: BiasAdversary(nn.Linear(3, 2))(nested(X, torch.strided), TARGET),
        TypeError,
        "features is a nested tensor",
    ),
    "nested output": (
        lambda: BiasAdversary(nn.Linear(3, 2))(nested(X, torch.jagged), TARGET),
        TypeError,
        "the head's output is a nested tensor, expected a dense tensor",
    ),
    "class": (
        lambda: BiasAdversary(nn.Linear(3, 2))(X, TARGET + 1),
        IndexError,
        r"target\[1\] is 2, expected a class in \[0, 2\)",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_what_goes_wrong_is_named(name: str):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_probabilities_may_be_rounded(dtype):
    target = torch.rand(4, 3, 7).softmax(1).to(dtype)
    target[0, :, 0] = torch.tensor([1.0005, 0, 0])
    adversary = BiasAdversary(nn.Conv1d(3, 3, 1).to(dtype))
    assert adversary(torch.randn(4, 3, 7, dtype=dtype), target).isfinite()


def test_an_error_of_the_head_itself_stays():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match=r"^no memory$"):
        BiasAdversary(nn.Sequential(Broken(), nn.Linear(9, 2)))(X, TARGET)
