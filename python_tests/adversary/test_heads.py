"""BiasAdversary with heads of every kind: as two plain computations, whoever owns the weights."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from adversary_networks import CLASSES, separate_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lnl_ext.adversary.bias_adversary
from lnl_ext import BiasAdversary

N, D = 6, 4
COEFFICIENTS = {
    "lnl": (0.3, 0.2, 0.0),
    "grl": (0.3, 0.0, 0.0),
    "blindeye": (0.0, 0.0, 1.0),
    "everything": (0.3, 0.2, 0.5),
}
SHAPES = {
    "rows": (N, D),
    "tokens": (N, 3, D),
    "maps": (N, D, 5, 7),
    "lines": (N, D, 9),
    "volumes": (N, D, 3, 4, 5),
}


@pytest.fixture(params=COEFFICIENTS)
def coefficients(request):
    return COEFFICIENTS[request.param]


def adversary_of(head: nn.Module, coefficients, **options) -> BiasAdversary:
    names = ("reversal", "entropy_weight", "confusion_weight")
    return BiasAdversary(head, **dict(zip(names, coefficients, strict=True)), **options)


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-14)


class Function(nn.Module):
    """A head that is a function, with no parameters of its own."""

    def __init__(self, function) -> None:
        super().__init__()
        self.forward = function


class PlainList(nn.Module):
    """A head that keeps its layers in a list, where PyTorch does not find them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(D, 8), nn.Linear(8, CLASSES)]

    def leaves(self):
        return [p for layer in self.layers for p in layer.parameters()]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x).tanh())


def tied() -> tuple[nn.Module, list[Tensor]]:
    table = nn.Embedding(CLASSES, D).double()
    return Function(lambda x: x @ table.weight.T), [table.weight]


def plain_list() -> tuple[nn.Module, list[Tensor]]:
    head = PlainList()
    for layer in head.layers:
        layer.double()
    return head, head.leaves()


def conditional() -> tuple[nn.Module, list[Tensor]]:
    """A head that reads another tensor beside the features."""
    context = torch.randn(N, 3, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(D + 3, CLASSES).double()
    return Function(lambda x: layer(torch.cat([x, context * 2], 1))), [context, *layer.parameters()]


def shared_layer() -> nn.Module:
    layer = nn.Linear(D, D)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(D, CLASSES))


class OwnSequence(nn.Sequential):
    """What PixelColorHead is: a sequence with another name."""


def conv(kind: type[nn.Module], **options) -> nn.Module:
    first = kind(D, 6, 3, **options)
    rest = kind(6, CLASSES, 1), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(1)
    return OwnSequence(first, nn.ReLU(inplace=True), *rest)


def deep(*first: nn.Module) -> nn.Module:
    return nn.Sequential(*first, nn.Linear(D, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, CLASSES))


def hooked(head: nn.Module) -> nn.Module:
    head.register_forward_hook(lambda *_: None)
    return head


def compiled(head: nn.Module) -> nn.Module:
    head.compile(backend="eager")
    return head


ROWS = {
    "linear": lambda: nn.Linear(D, CLASSES),
    "deep": deep,
    "without biases": lambda: nn.Sequential(
        nn.Linear(D, 8, bias=False), nn.Tanh(), nn.Linear(8, CLASSES, bias=False)
    ),
    "batch norm first": lambda: deep(nn.BatchNorm1d(D)),
    "in-place ReLU first": lambda: deep(nn.ReLU(inplace=True)),
    "in-place Dropout first": lambda: deep(nn.Dropout(0.4, inplace=True)),
    "in-place ReLU and a linear layer": lambda: nn.Sequential(
        nn.ReLU(inplace=True), nn.Linear(D, CLASSES)
    ),
    "in-place ReLU after what returns its input": lambda: deep(
        nn.Identity(), nn.Dropout(0.0), nn.ReLU(inplace=True)
    ),
    "in-place ReLU in a sequence with a hook": lambda: hooked(deep(nn.ReLU(inplace=True))),
    "in-place ReLU in a part with a hook": lambda: nn.Sequential(
        hooked(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(D, 8))), nn.Linear(8, CLASSES)
    ),
    "in-place ReLU in a compiled sequence": lambda: compiled(deep(nn.ReLU(inplace=True))),
    "a function in place": lambda: deep(Function(lambda x: x.relu_())),
    "a layer used twice": shared_layer,
}
OTHERS = {"tied": tied, "plain list": plain_list, "conditional": conditional}


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


MAPS = {
    "tokens": (
        "tokens",
        lambda: nn.Sequential(nn.Linear(D, 8), nn.ReLU(True), Mean(), nn.Linear(8, CLASSES)),
    ),
    "1-d": ("lines", lambda: conv(nn.Conv1d, stride=2)),
    "2-d": ("maps", lambda: conv(nn.Conv2d, padding=1)),
    "2-d, everything": (
        "maps",
        lambda: conv(nn.Conv2d, padding=(2, 1), stride=(1, 2), dilation=(2, 1), groups=2),
    ),
    "2-d, no bias": ("maps", lambda: conv(nn.Conv2d, bias=False)),
    "2-d, same": ("maps", lambda: conv(nn.Conv2d, padding="same")),
    "2-d, reflected": ("maps", lambda: conv(nn.Conv2d, padding=1, padding_mode="reflect")),
    "3-d": ("volumes", lambda: conv(nn.Conv3d, padding=1)),
}


def check(head: nn.Module, leaves: list[Tensor], shape: str, coefficients, run=None) -> None:
    """Compare an adversary with the two computations; the features must stay as they are."""
    x = torch.randn(SHAPES[shape], dtype=torch.float64)
    target = torch.randint(CLASSES, (N,))
    expected, of_leaves = separate_gradients(head, x, target, leaves, coefficients)
    features = x.clone().requires_grad_()
    adversary = adversary_of(head, coefficients)
    torch.manual_seed(0)
    seen = features * 1
    loss = (adversary if run is None else lambda *a: run(adversary, *a))(seen, target)
    loss.backward()
    close(features.grad, expected)
    close([leaf.grad for leaf in leaves], list(of_leaves))
    assert torch.equal(seen, x)


@pytest.mark.parametrize("name", ROWS)
def test_heads_of_rows(name: str, coefficients):
    head = ROWS[name]().double()
    check(head, list(head.parameters()), "rows", coefficients)


@pytest.mark.parametrize("name", OTHERS)
def test_weights_that_are_not_the_heads_own(name: str, coefficients):
    head, leaves = OTHERS[name]()
    check(head, leaves, "rows", coefficients)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", MAPS)
def test_heads_of_maps(name: str, layout: str, coefficients):
    shape, make = MAPS[name]
    head = make().double()
    if layout == "channels_last" and shape == "maps":
        head.to(memory_format=torch.channels_last)
    check(head, list(head.parameters()), shape, coefficients)


@pytest.mark.parametrize("name", [name for name in ROWS if name == "deep" or "in-place" in name])
def test_features_without_gradient_are_not_written_to(name: str):
    head = ROWS[name]().double()
    x, target = torch.randn(N, D, dtype=torch.float64), torch.randint(CLASSES, (N,))
    before = x.clone()
    _, expected = separate_gradients(head, x, target, list(head.parameters()), (0.3, 0.2, 0.0))
    torch.manual_seed(0)
    BiasAdversary(head)(x, target).backward()
    assert torch.equal(x, before)
    close([p.grad for p in head.parameters()], list(expected))


def test_an_error_of_the_head_stays_what_it_is():
    def fail(*_):
        raise RuntimeError("out of paper")

    head = deep()
    head.register_forward_hook(fail)
    encoder = nn.TransformerEncoderLayer(D, 1, 4, batch_first=True)
    encoder.linear1.register_forward_hook(fail)
    activation = nn.ReLU()
    activation.register_forward_pre_hook(fail)
    rows, target = torch.randn(SHAPES["rows"]), torch.randint(CLASSES, (N,))
    tokens = torch.randn(SHAPES["tokens"])
    for broken, features in (
        (head, rows),
        (deep(activation), rows),
        (nn.Sequential(encoder, Mean(), nn.Linear(D, CLASSES)), tokens),
    ):
        with pytest.raises(RuntimeError, match=r"^out of paper$"):
            BiasAdversary(broken)(features, target)


@pytest.mark.parametrize("name", ["deep", "in-place ReLU first"])
def test_a_frozen_head(name: str, coefficients):
    head = ROWS[name]().double().eval()
    x, target = torch.randn(N, D, dtype=torch.float64), torch.randint(CLASSES, (N,))
    expected, _ = separate_gradients(head, x, target, list(head.parameters()), coefficients)
    head.requires_grad_(False)
    x.requires_grad_()
    adversary_of(head, coefficients)(x, target).backward()
    close(x.grad, expected)


def test_autograd_may_be_asked_for_one_side_only(coefficients):
    head = ROWS["deep"]().double().eval()
    x, target = torch.randn(N, D, dtype=torch.float64), torch.randint(CLASSES, (N,))
    parameters = list(head.parameters())
    expected, of_head = separate_gradients(head, x, target, parameters, coefficients)
    x.requires_grad_()
    loss = adversary_of(head, coefficients)(x, target)
    close(list(torch.autograd.grad(loss, parameters, retain_graph=True)), list(of_head))
    close(torch.autograd.grad(loss, x, retain_graph=True)[0], expected)
    close(torch.autograd.grad(loss, [x, *parameters]), (expected, *of_head))


# ---------------------------------------------------------------------- replicas and swaps


def replica_of(module: nn.Module) -> nn.Module:
    """A copy as DataParallel makes it: its parameters are tensors with a graph to the original."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(replica, name, replica_of(child))
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter * 1)
    for name, buffer in module._buffers.items():
        setattr(replica, name, None if buffer is None else buffer.clone())
    return replica


@pytest.mark.parametrize("name", ["linear", "deep", "in-place ReLU first"])
def test_replicas_of_data_parallel(name: str, coefficients):
    head = ROWS[name]().double().eval()
    adversary = adversary_of(head, coefficients, reduction="sum")
    halves = [torch.randn(N, D, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    targets = [torch.randint(CLASSES, (N,)) for _ in range(2)]
    parameters = list(head.parameters())
    total = 0
    for x, target in zip(halves, targets, strict=True):
        replica = replica_of(adversary)
        assert not list(replica.parameters())
        total = total + replica(x, target)
    total.backward()
    found = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    for x, target in zip(halves, targets, strict=True):
        expected, of_head = separate_gradients(head, x, target, parameters, coefficients)
        close(x.grad, expected * N)
        for p, gradient in zip(parameters, of_head, strict=True):
            p.grad = gradient * N if p.grad is None else p.grad + gradient * N
    close(found, [p.grad for p in parameters])


@pytest.mark.parametrize("name", ["linear", "deep"])
def test_functional_call(name: str, coefficients):
    head = ROWS[name]().double().eval()
    x, target = torch.randn(N, D, dtype=torch.float64), torch.randint(CLASSES, (N,))
    given = {n: torch.randn_like(p).requires_grad_() for n, p in head.named_parameters()}
    expected, of_head = separate_gradients(
        lambda x: torch.func.functional_call(head, given, x),
        x,
        target,
        list(given.values()),
        coefficients,
    )
    x.requires_grad_()
    swapped = {f"head.{n}": p * 1 for n, p in given.items()}
    adversary = adversary_of(head, coefficients)
    torch.func.functional_call(adversary, swapped, (x, target)).backward()
    close(x.grad, expected)
    close([p.grad for p in given.values()], list(of_head))
    assert all(p.grad is None for p in head.parameters())


# ---------------------------------------------------------------------- checkpointing, hooks


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["linear", "deep"])
def test_checkpointing_around_the_adversary(name: str, reentrant: bool, coefficients):
    head = ROWS[name]().double()

    def run(adversary, x, target):
        return checkpoint(adversary, x, target, use_reentrant=reentrant)

    check(head, list(head.parameters()), "rows", coefficients, run)


@pytest.mark.parametrize("which", ["first", "last", "whole"])
def test_checkpointing_inside_of_the_head(which: str, coefficients):
    first, last = nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.3), nn.Tanh()), nn.Linear(8, CLASSES)
    parts = nn.ModuleList([first, last]).double()

    def forward(x: Tensor) -> Tensor:
        if which == "whole":
            return checkpoint(lambda x: last(first(x)), x, use_reentrant=False)
        hidden = checkpoint(first, x, use_reentrant=False) if which == "first" else first(x)
        return checkpoint(last, hidden, use_reentrant=False) if which == "last" else last(hidden)

    check(Function(forward), list(parts.parameters()), "rows", coefficients)


def test_hooks_of_modules_and_parameters(coefficients):
    head = ROWS["deep"]().double().eval()
    parameters = list(head.parameters())
    x, target = torch.randn(N, D, dtype=torch.float64), torch.randint(CLASSES, (N,))
    expected, of_head = separate_gradients(head, x, target, parameters, coefficients)
    of_modules, of_parameters, accumulated = [], {}, []
    for module in (head, head[0], head[-1]):
        module.register_full_backward_hook(lambda module, *_: of_modules.append(module))
    for i, p in enumerate(parameters):
        p.register_hook(lambda gradient, i=i: of_parameters.setdefault(i, []).append(gradient))
        p.register_post_accumulate_grad_hook(accumulated.append)
    x.requires_grad_()
    adversary_of(head, coefficients)(x, target).backward()
    passes = 1 if coefficients[1:] == (0.0, 0.0) else 2
    assert [of_modules.count(module) for module in (head, head[0], head[-1])] == [passes] * 3
    close([of_parameters[i] for i in range(len(parameters))], [[g] for g in of_head])
    assert len(accumulated) == len(parameters)
    close(x.grad, expected)


@pytest.mark.parametrize("path", ["whole", "logits"])
def test_what_a_saved_tensor_hook_holds_stays_as_it_was(path, coefficients, monkeypatch):
    if path == "logits":
        monkeypatch.setattr(lnl_ext.adversary.bias_adversary, "take_apart", lambda head: None)
    held = []

    def pack(tensor: Tensor) -> Tensor:
        held.append((tensor, tensor.detach().clone()))
        return tensor

    head = ROWS["deep"]().eval()
    x, target = torch.randn(N, D, requires_grad=True), torch.randint(CLASSES, (N,))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = adversary_of(head, coefficients)(x, target)
    (loss * 3).backward()
    assert held
    for tensor, before in held:
        assert torch.equal(tensor, before)


# ---------------------------------------------------------------------- training loops


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_amp_with_a_scaler(dtype, coefficients):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, CLASSES))
    x, target = torch.randn(512, 16), torch.randint(CLASSES, (512,))
    parameters = list(head.parameters())
    expected, of_head = separate_gradients(head, x, target, parameters, coefficients)
    adversary = adversary_of(head, coefficients)
    x.requires_grad_()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    optimizer = torch.optim.SGD([x, *parameters], lr=1.0)
    with torch.autocast("cpu", dtype):
        loss = adversary(x, target)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for found, exact in zip(
        [x.grad, *(p.grad for p in parameters)], [expected, *of_head], strict=True
    ):
        assert found.dtype == torch.float32
        # three matrix products each way, 2^-8 per rounding of bfloat16
        assert (found - exact).norm() <= 0.05 * exact.norm()
    before = [p.detach().clone() for p in parameters]
    scaler.step(optimizer)
    assert all(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_accumulated_batches_and_several_adversaries(coefficients):
    heads = [ROWS[name]().double().eval() for name in ("linear", "deep", "in-place ReLU first")]
    adversaries = [adversary_of(head, coefficients) for head in heads]
    parameters = [p for head in heads for p in head.parameters()]
    batches = [
        (torch.randn(N, D, dtype=torch.float64), torch.randint(CLASSES, (N,))) for _ in range(3)
    ]
    of_heads = [torch.zeros_like(p) for p in parameters]
    for x, target in batches:
        gradients = [
            separate_gradients(head, x, target, list(head.parameters()), coefficients)
            for head in heads
        ]
        features = x.clone().requires_grad_()
        sum(adversary(features, target) for adversary in adversaries).backward()
        close(features.grad, sum(of_x for of_x, _ in gradients))
        for total, new in zip(of_heads, (g for _, own in gradients for g in own), strict=True):
            total += new
    close([p.grad for p in parameters], of_heads)


# ---------------------------------------------------------------------- memory


class Token:
    """Something that a graph holds."""


class HoldsToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token):
        ctx.token = token
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize("backward", ["none", "one", "retained", "create_graph"])
@pytest.mark.parametrize("name", ["linear", "deep", "in-place ReLU first", "batch norm first"])
def test_graphs_are_freed_without_the_garbage_collector(name, backward, coefficients):
    token = Token()
    alive = weakref.ref(token)
    head = ROWS[name]().double()

    gc.collect()
    gc.disable()
    try:
        x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
        features = HoldsToken.apply(x, token)
        del token
        loss = adversary_of(head, coefficients)(features, torch.randint(CLASSES, (N,)))
        if backward == "create_graph":
            del features
            found = torch.autograd.grad(loss, x, create_graph=True)
            del found
        elif backward != "none":
            loss.backward(retain_graph=backward == "retained")
        features = None
        assert alive() is not None
        del loss
        assert alive() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------------- inference mode


def test_made_copied_and_loaded_under_inference_mode():
    head = ROWS["deep"]()
    x, target = torch.randn(N, D), torch.randint(CLASSES, (N,))
    with torch.inference_mode():
        adversary = BiasAdversary(head, reversal="ramp", entropy_weight=0.2, confusion_weight=0.0)
        copied = copy.deepcopy(adversary)
        copied.load_state_dict(adversary.state_dict(), assign=True)
        averaged = torch.optim.swa_utils.AveragedModel(adversary)
        averaged.update_parameters(adversary)
        averaged.update_parameters(adversary)
        for module in (adversary, copied, averaged):
            assert module(x, target).isfinite()
        copied.eval()
        assert torch.equal(copied(x, target), adversary.eval()(x, target))
    # What was made under inference mode of a head that was not can be trained.
    x.requires_grad_()
    adversary.set_progress(0.5)
    adversary.train()(x, target).backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in head.parameters())


def test_an_average_of_weights_keeps_absent_terms_absent():
    adversary = BiasAdversary(nn.Linear(D, CLASSES), entropy_weight=0.0)
    averaged = torch.optim.swa_utils.AveragedModel(adversary, use_buffers=True)
    for _ in range(2):
        averaged.update_parameters(adversary)
    averaged(torch.randn(N, D), torch.randint(CLASSES, (N,)))
    assert averaged.module.known_zero("entropy_weight")
