"""BiasAdversary on heads that end in a linear layer: as with logits, but these never exist."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lnl_ext.adversary.bias_adversary
from lnl_ext import BiasAdversary
from lnl_ext.adversary.linear_head import take_apart
from lnl_ext.ops import bias_loss as ops
from lnl_ext.training.denominators import count_sites

N, D, CLASSES, HEADS = 7, 6, 5, 3


def lazy() -> nn.Module:
    head = nn.LazyLinear(CLASSES)
    head(torch.zeros(1, D))
    return head


HEAD = {
    "linear": lambda: nn.Linear(D, CLASSES),
    "without bias": lambda: nn.Linear(D, CLASSES, bias=False),
    "lazy, resolved": lazy,
    "in a sequence": lambda: nn.Sequential(nn.Linear(D, CLASSES)),
    "behind layers that train": lambda: nn.Sequential(
        nn.Linear(D, 9), nn.BatchNorm1d(9), nn.ReLU(inplace=True), nn.Linear(9, CLASSES)
    ),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(D, 9), nn.Tanh()), nn.Sequential(nn.Dropout(0.4), nn.Linear(9, 5))
    ),
    "behind dropout": lambda: nn.Sequential(nn.Dropout(0.4), nn.Linear(D, CLASSES)),
    "behind identity": lambda: nn.Sequential(nn.Identity(), nn.Linear(D, CLASSES)),
}
FLATTENED = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, CLASSES))
COEFFICIENTS = [(0.3, 0.2, 0.0), (0.3, 0.0, 0.0), (0.3, 0.2, 0.4), (0.0, 0.0, 1.0)]


@pytest.fixture
def linear_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every call of the linear operator by an adversary."""
    calls: list[int] = []
    original = lnl_ext.adversary.bias_adversary.adversary_loss

    def counted(operands, *arguments):
        if operands.weight is not None:
            calls.append(1)
        return original(operands, *arguments)

    monkeypatch.setattr(lnl_ext.adversary.bias_adversary, "adversary_loss", counted)
    return calls


def results(adversary, features, target, monkeypatch, path, denominators=None):
    """Values, gradients of features and parameters, and buffers afterwards: one call's."""
    adversary = copy.deepcopy(adversary)
    features = features.detach().requires_grad_(features.requires_grad)
    torch.manual_seed(3)
    with monkeypatch.context() as patch:
        if path == "logits":
            patch.setattr(lnl_ext.adversary.bias_adversary, "take_apart", lambda head: None)
        found = adversary(features, target, return_terms=True, denominators=denominators)
    inputs = [t for t in (features, *adversary.parameters()) if t.requires_grad]
    assert found.loss.requires_grad == bool(inputs)
    gradients: tuple = ()
    if inputs:
        upstream = torch.linspace(0.5, 2.0, found.loss.numel()).reshape(found.loss.shape)
        gradients = torch.autograd.grad(
            found.loss, inputs, upstream.to(found.loss), allow_unused=True
        )
    return [*found], list(gradients), dict(adversary.named_buffers())


def same(adversary, features, target, monkeypatch, denominators=None, **tolerance) -> None:
    both = [
        results(adversary, features, target, monkeypatch, path, denominators)
        for path in ("linear", "logits")
    ]
    for a, b in zip(both[0][1], both[1][1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert a.shape == b.shape
    tolerance = tolerance or {"rtol": 1e-10, "atol": 1e-14}
    torch.testing.assert_close(both[0], both[1], equal_nan=True, **tolerance)


def indices(shape=(N,), classes=CLASSES) -> torch.Tensor:
    target = torch.randint(classes, shape)
    target[torch.rand(shape) < 0.3] = -100
    return target


def adversary_of(head, coefficients=(0.3, 0.2, 0.0), **options) -> BiasAdversary:
    names = ("reversal", "entropy_weight", "confusion_weight")
    return BiasAdversary(head, **dict(zip(names, coefficients, strict=True)), **options)


@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=str)
@pytest.mark.parametrize("name", HEAD)
def test_as_with_logits(name, coefficients, monkeypatch, linear_calls):
    head = HEAD[name]().double()
    for features_learn, mode in itertools.product((True, False), (True, False)):
        x = torch.randn(N, D, dtype=torch.float64, requires_grad=features_learn)
        same(adversary_of(head, coefficients).train(mode), x, indices(), monkeypatch)
    assert len(linear_calls) == 4


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["linear", "behind layers that train"])
def test_every_option(name, reduction, monkeypatch, linear_calls):
    head = HEAD[name]().double()
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(CLASSES, dtype=torch.float64)
    probabilities = torch.rand(N, CLASSES, dtype=torch.float64).softmax(1)
    cases = itertools.product((indices(), probabilities), (weight, None), (0.0, 0.1), (True, False))
    for target, class_weight, smoothing, mask in cases:
        adversary = adversary_of(
            head,
            (0.3, 0.2, 0.1),
            weight=class_weight,
            label_smoothing=smoothing,
            reduction=reduction,
            mask_entropy=mask,
        )
        same(adversary, x, target, monkeypatch)
    assert len(linear_calls) == 16


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("hidden", [False, True])
def test_several_heads_side_by_side(hidden, reduction, monkeypatch, linear_calls):
    last = nn.Linear(D, HEADS * CLASSES)
    head = (nn.Sequential(nn.Linear(D, D), nn.Tanh(), last) if hidden else last).double()
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    adversary = adversary_of(head, heads=HEADS, reduction=reduction, mask_entropy=True)
    same(adversary, x, indices((N, HEADS)), monkeypatch)
    probabilities = torch.rand(N, HEADS, CLASSES, dtype=torch.float64).softmax(2).flatten(1)
    same(adversary, x, probabilities, monkeypatch)
    assert len(linear_calls) == 2


MAPS = {
    1: (nn.Conv1d, (4,)),
    2: (nn.Conv2d, (4, 3)),
    3: (nn.Conv3d, (2, 3, 2)),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("dimensions", MAPS)
def test_a_convolution_of_one_position(dimensions, hidden, reduction, monkeypatch, linear_calls):
    kind, sites = MAPS[dimensions]
    last = kind(D, HEADS * CLASSES, 1)
    head = (nn.Sequential(kind(D, D, 1), nn.Tanh(), last) if hidden else last).double()
    x = torch.randn(N, *sites, D, dtype=torch.float64).movedim(-1, 1).requires_grad_()
    adversary = adversary_of(head, (0.3, 0.2, 0.4), heads=HEADS, reduction=reduction)
    same(adversary, x, indices((N, HEADS, *sites)), monkeypatch)
    drawn = torch.rand(N, HEADS, CLASSES, *sites, dtype=torch.float64)
    probabilities = drawn.softmax(2).flatten(1, 2)
    same(adversary, x, probabilities, monkeypatch)
    # Layers before the last decide whether its input is channels_last: torch's own in 2-D.
    if not hidden or dimensions == 2:
        assert len(linear_calls) == 2
    last_alone = kind(D, CLASSES, 1, bias=False).double()
    same(adversary_of(last_alone, reduction=reduction), x, indices((N, *sites)), monkeypatch)


def test_behind_pooling_and_flattening(monkeypatch, linear_calls):
    x = torch.randn(N, D, 4, 3, dtype=torch.float64, requires_grad=True)
    same(adversary_of(copy.deepcopy(FLATTENED).double()), x, indices(), monkeypatch)
    assert linear_calls


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 1, 2, 3)], ids=str)
def test_frozen_parameters(frozen, monkeypatch, linear_calls):
    head = nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Linear(9, CLASSES)).double()
    for i in frozen:
        list(head.parameters())[i].requires_grad_(False)
    for coefficients, features_learn in itertools.product(COEFFICIENTS, (True, False)):
        x = torch.randn(N, D, dtype=torch.float64, requires_grad=features_learn)
        same(adversary_of(head, coefficients), x, indices(), monkeypatch)
    assert linear_calls


@pytest.mark.parametrize("target", ["all ignored", "none"])
def test_no_target_and_no_rows(target, monkeypatch, linear_calls):
    rows = 0 if target == "none" else N
    x = torch.randn(rows, D, dtype=torch.float64, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        adversary = adversary_of(nn.Linear(D, CLASSES).double(), reduction=reduction)
        same(adversary, x, torch.full((rows,), -100), monkeypatch)
        several = adversary_of(
            nn.Linear(D, HEADS * CLASSES).double(), heads=HEADS, reduction=reduction
        )
        same(several, x, torch.full((rows, HEADS), -100), monkeypatch)
    maps = torch.randn(rows, 3, D, dtype=torch.float64).movedim(-1, 1).requires_grad_()
    several = adversary_of(nn.Conv1d(D, HEADS * CLASSES, 1).double(), heads=HEADS)
    same(several, maps, torch.full((rows, HEADS, 3), -100), monkeypatch)
    assert len(linear_calls) == 7


@pytest.mark.parametrize("name", ["linear", "behind layers that train"])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_given_denominators(name, heads, monkeypatch, linear_calls):
    head = HEAD[name]().double() if heads == 1 else nn.Linear(D, HEADS * CLASSES).double()
    adversary = adversary_of(head, (0.3, 0.2, 0.4), heads=heads, mask_entropy=True)
    target = indices((N,) if heads == 1 else (N, heads))
    given = count_sites(adversary, target, torch.float64) * 2.5
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    same(adversary, x, target, monkeypatch, denominators=given)
    assert len(linear_calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["linear", "behind dropout"])
def test_halves_and_autocast(name, dtype, monkeypatch, linear_calls):
    torch.manual_seed(0)
    head = HEAD[name]()
    x = torch.randn(N, D, requires_grad=True)
    # The general path rounds its logits once more.
    close = {"rtol": 2**-6, "atol": 2**-8}
    halves = copy.deepcopy(head).to(dtype)
    same(
        adversary_of(halves), x.detach().to(dtype).requires_grad_(), indices(), monkeypatch, **close
    )
    with torch.autocast("cpu", dtype):
        same(adversary_of(head), x, indices(), monkeypatch, **close)
        same(
            adversary_of(copy.deepcopy(head).double()), x.double(), indices(), monkeypatch, **close
        )
    assert len(linear_calls) == 3


def test_no_gradients_wanted(monkeypatch, linear_calls):
    adversary = adversary_of(nn.Linear(D, CLASSES))
    x = torch.randn(N, D, requires_grad=True)
    with torch.no_grad():
        assert not adversary(x, indices()).requires_grad
    same(adversary.requires_grad_(False), x.detach(), indices(), monkeypatch, rtol=1e-5, atol=1e-6)
    assert len(linear_calls) == 2


class LargestTensor(TorchDispatchMode):
    """Sees what operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.add(func.__name__)
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):  # a stand-in of one element is not memory
                self.elements = max(self.elements, each.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("path", ["linear", "logits"])
@pytest.mark.parametrize("name", ["linear", "behind layers that train"])
def test_the_logits_never_exist(name, path, monkeypatch):
    classes = 400
    head = HEAD[name]()
    last = head if isinstance(head, nn.Linear) else head[-1]
    wide = nn.Linear(last.in_features, classes)
    head = wide if head is last else nn.Sequential(*head[:-1], wide)
    if path == "logits":
        monkeypatch.setattr(lnl_ext.adversary.bias_adversary, "take_apart", lambda head: None)
    x = torch.randn(1000, D, requires_grad=True)
    with LargestTensor() as seen:
        adversary_of(head)(x, torch.randint(classes, (1000,))).backward()
    assert (seen.elements < 1000 * classes) == (path == "linear")
    assert ("linear_bias_loss.default" in seen.operations) == (path == "linear")


class OwnLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(register: str) -> nn.Module:
    head = nn.Sequential(nn.Tanh(), nn.Linear(D, CLASSES))
    getattr(head[1], register)(lambda *_: None)
    return head


def shared() -> nn.Module:
    layer = nn.Linear(D, D)
    return nn.Sequential(layer, nn.Tanh(), layer)


def replaced() -> nn.Module:
    layer = nn.Linear(D, CLASSES)
    layer.forward = lambda x: torch.zeros(N, CLASSES) + x.sum()
    return layer


def compiled() -> nn.Module:
    layer = nn.Linear(D, CLASSES)
    layer.compile(backend="eager")
    return layer


def watched_sequence() -> nn.Module:
    head = nn.Sequential(nn.Linear(D, CLASSES))
    head.register_forward_hook(lambda module, args, output: 2 * output)
    return head


GENERAL = {
    "subclass": lambda: OwnLinear(D, CLASSES),
    "forward hook": lambda: hooked("register_forward_hook"),
    "forward pre-hook": lambda: hooked("register_forward_pre_hook"),
    "backward hook": lambda: hooked("register_full_backward_hook"),
    "backward pre-hook": lambda: hooked("register_full_backward_pre_hook"),
    "hook of the sequence": watched_sequence,
    "shared": shared,
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, CLASSES)),
    "spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(D, CLASSES)),
    "pruned": lambda: nn.utils.prune.random_unstructured(nn.Linear(D, CLASSES), "weight", 0.5),
    "replaced forward": replaced,
    "compiled": compiled,
    "not the last": lambda: nn.Sequential(nn.Linear(D, CLASSES), nn.Tanh()),
    "empty": lambda: nn.Sequential(),
    "own module": lambda: nn.ModuleDict({"head": nn.Linear(D, CLASSES)}),
    "wide convolution": lambda: nn.Conv2d(D, CLASSES, 3),
    "padded convolution": lambda: nn.Conv2d(D, CLASSES, 1, padding=1),
    "strided convolution": lambda: nn.Conv2d(D, CLASSES, 1, stride=2),
    "grouped convolution": lambda: nn.Conv2d(D, 2 * D, 1, groups=2),
}


@pytest.mark.parametrize("name", GENERAL)
def test_what_a_layer_does_beside_its_product_still_happens(name, linear_calls):
    head = GENERAL[name]()
    assert take_apart(head) is None
    if name in ("own module", "empty", "not the last") or "convolution" in name:
        return
    x, target = torch.randn(N, D, requires_grad=True), torch.zeros(N, dtype=torch.long)
    if name == "spectral norm":
        head.eval()  # in training every forward changes the weight
    found = adversary_of(head)(x, target, return_terms=True)
    found.loss.backward()
    assert x.grad is not None
    expected = nn.functional.cross_entropy(head(x), target)
    torch.testing.assert_close(found.cross_entropy, expected.detach())
    assert not linear_calls


def test_a_global_hook_is_called(linear_calls):
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        adversary_of(nn.Linear(D, CLASSES))(torch.randn(N, D), indices())
    finally:
        handle.remove()
    assert calls
    assert not linear_calls


def test_inputs_that_are_no_rows_take_the_general_path(monkeypatch, linear_calls):
    sites = nn.Linear(D, 4).double()  # of (N, C, D): the classes are in the middle
    x = torch.randn(N, CLASSES, D, dtype=torch.float64, requires_grad=True)
    same(adversary_of(sites), x, indices((N, 4)), monkeypatch)
    contiguous = torch.randn(N, D, 4, 3, dtype=torch.float64, requires_grad=True)
    maps = nn.Conv2d(D, CLASSES, 1).double()
    same(adversary_of(maps), contiguous, indices((N, 4, 3)), monkeypatch)
    assert not linear_calls
    with pytest.raises(RuntimeError, match="same dtype"):
        adversary_of(nn.Linear(D, CLASSES))(x.detach()[:, 0], indices())


def test_parameters_swapped_by_functional_call(linear_calls):
    adversary = adversary_of(nn.Linear(D, CLASSES).double())
    x = torch.randn(N, D, dtype=torch.float64)
    twice = {name: 2 * p.detach() for name, p in adversary.named_parameters()}
    target = torch.zeros(N, dtype=torch.long)
    found = torch.func.functional_call(adversary, twice, (x, target, True))
    expected = nn.functional.cross_entropy(2 * adversary.head(x), target)
    assert not linear_calls
    torch.testing.assert_close(found.cross_entropy, expected.detach())


def test_retain_graph_and_writing_between_forward_and_backward():
    adversary = adversary_of(nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Linear(9, CLASSES)))
    x = torch.randn(N, D, requires_grad=True)
    inputs = [x, *adversary.parameters()]
    loss = adversary(x, indices())
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), first, rtol=0, atol=0)
    # Gradients that the forward has made need no old value; others notice that it is gone.
    layer = nn.Linear(D, CLASSES)
    for reduction, message in (("mean", None), ("none", "modified by an inplace operation")):
        loss = adversary_of(layer, reduction=reduction)(x, torch.zeros(N, dtype=torch.long)).sum()
        with torch.no_grad():
            layer.weight.mul_(2)
        if message is None:
            loss.backward()
        else:
            with pytest.raises(RuntimeError, match=message):
                loss.backward()


def test_copies_and_checkpoints_know_nothing_of_it():
    adversary = adversary_of(nn.Sequential(nn.Linear(D, 9), nn.ReLU(), nn.Linear(9, CLASSES)))
    x, target = torch.randn(N, D, requires_grad=True), indices()
    loss = adversary(x, target)
    loss.backward()
    names = ["head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"]
    assert [name for name, _ in adversary.named_parameters()] == names
    for other in (copy.deepcopy(adversary), pickle.loads(pickle.dumps(adversary))):
        assert list(other.state_dict()) == list(adversary.state_dict())
        assert torch.equal(other(x, target), loss)


def test_compiled_steps(monkeypatch):
    torch._dynamo.reset()
    head = nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Linear(9, CLASSES)).double()
    adversary = adversary_of(head)
    f = nn.Linear(4, D).double()
    inputs, target = torch.randn(N, 4, dtype=torch.float64), indices()

    def step(inputs, target):
        return adversary(f(inputs), target)

    found = []
    for run in (torch.compile(step, backend="aot_eager"), step):
        f.zero_grad()
        head.zero_grad()
        loss = run(inputs, target)
        loss.backward()
        found.append(
            [loss.detach(), *(p.grad.clone() for p in (*f.parameters(), *head.parameters()))]
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-14)


def exchange(counted, bucket):
    """Count the gradients of a bucket, and leave them, as the only process may."""
    counted.append(len(bucket.gradients()))
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_distributed_data_parallel_hears_of_every_gradient(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for head in (HEAD["linear"](), HEAD["behind layers that train"]()):
            adversary = adversary_of(head.double())
            x, target = torch.randn(N, D, dtype=torch.float64, requires_grad=True), indices()
            copied = copy.deepcopy(adversary)
            copied(x, target).backward()
            wrapped = nn.parallel.DistributedDataParallel(adversary)
            counted = []
            wrapped.register_comm_hook(counted, exchange)
            wrapped(x, target).backward()
            assert sum(counted) == len(list(adversary.parameters()))
            for p, q in zip(adversary.parameters(), copied.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_devices_without_kernels_take_the_general_path(monkeypatch, linear_calls):
    monkeypatch.setattr(ops, "has_kernel", lambda tensor: False)
    x = torch.randn(N, D, requires_grad=True)
    adversary_of(nn.Linear(D, CLASSES))(x, indices()).backward()
    assert not linear_calls
