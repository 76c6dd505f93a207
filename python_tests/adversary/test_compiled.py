"""BiasAdversary under torch.compile: one graph without terms, two with them; compiled heads."""

from __future__ import annotations

import copy

import pytest
import torch
from adversary_networks import CLASSES, HEADS, batch, classifier, feature_network, map_head
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lnl_ext import BiasAdversary

N, D = 7, 6


def adversary_of(head: nn.Module, coefficients, **options) -> BiasAdversary:
    names = ("reversal", "entropy_weight", "confusion_weight")
    return BiasAdversary(head, **dict(zip(names, coefficients, strict=True)), **options)


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-14)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, CLASSES)

    def forward(self, x):
        return self.layer(x).tanh()


ONE_GRAPH = {
    "linear": lambda: nn.Linear(D, CLASSES),
    "deep": lambda: nn.Sequential(nn.Linear(D, 9), nn.ReLU(inplace=True), nn.Linear(9, CLASSES)),
    "in-place ReLU first": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(D, CLASSES)),
    "own module": Own,
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ONE_GRAPH)
def test_without_terms_a_step_is_one_graph(name: str, reduction: str):
    torch._dynamo.reset()
    f, head = nn.Linear(4, D).double(), ONE_GRAPH[name]().double()
    adversary = BiasAdversary(head, reversal="ramp", entropy_weight=0.0, reduction=reduction)
    x, target = torch.randn(N, 4, dtype=torch.float64), torch.randint(CLASSES, (N,))
    target[0] = -100

    def step(x, target):
        return adversary(f(x), target, return_terms=True)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for progress in (0.1, 0.4):
        adversary.set_progress(progress)
        found = []
        for run in (step, compiled):
            f.zero_grad()
            head.zero_grad()
            with torch._dynamo.config.patch(error_on_recompile=progress > 0.1):
                result = run(x, target)
            (result.loss.sum() * 2).backward()
            found.append([*(p.grad for p in (*f.parameters(), *head.parameters()))])
            found[-1] = [g.clone() for g in found[-1]] + [t.detach() for t in result]
        close(found[1], found[0])


def test_a_whole_step_on_maps_is_one_graph():
    torch._dynamo.reset()
    f, g, h = feature_network(), classifier(), map_head()
    h[3].p = 0.0  # compiled and eager steps draw different dropout
    adversary = BiasAdversary(h, entropy_weight=0.0, heads=HEADS)
    modules = nn.ModuleList([f, g, adversary])

    def step(images, labels, bias):
        features = f(images)
        return F.cross_entropy(g(features), labels) + adversary(features, bias)

    found = []
    data = batch()
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        modules.zero_grad()
        run(*data).backward()
        found.append([p.grad.clone() for p in modules.parameters()])
    close(found[1], found[0])


def test_with_terms_there_is_one_break():
    torch._dynamo.reset()
    f, head = nn.Linear(4, D), ONE_GRAPH["deep"]()
    adversary = BiasAdversary(head)

    def loss(x, target):
        return adversary(f(x), target) * 2

    explained = torch._dynamo.explain(loss)(torch.randn(N, 4), torch.randint(CLASSES, (N,)))
    assert explained.graph_break_count == 1


def test_a_compiled_step_is_right_and_never_recompiles():
    torch._dynamo.reset()
    f, g, h = (network.float() for network in (feature_network(), classifier(), map_head()))
    h[3].p = 0.0  # compiled and eager steps draw different dropout
    adversary = BiasAdversary(h, reversal="linear", entropy_weight="linear", heads=HEADS)

    def step(images, labels, bias):
        features = f(images)
        loss = F.cross_entropy(g(features), labels) + adversary(features, bias)
        loss.backward()
        return loss

    compiled = torch.compile(step, backend="aot_eager")
    modules = nn.ModuleList([f, g, h])
    for progress in (0.1, 0.4, 0.9):
        adversary.set_progress(progress)
        images, labels, bias = batch()
        results = []
        for run in (step, compiled):
            modules.zero_grad()
            with torch._dynamo.config.patch(error_on_recompile=progress > 0.1):
                loss = run(images.float(), labels, bias)
            results.append([loss.detach(), *(p.grad.clone() for p in modules.parameters())])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("coefficients", [(0.3, 0.0, 0.0), (0.3, 0.2, 0.0)], ids=str)
def test_a_compiled_head(coefficients):
    torch._dynamo.reset()
    head = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(CLASSES, (6,))
    results = []
    # Two backward passes through one graph need its buffers twice, as any retain_graph=True does.
    with torch._functorch.config.patch(donated_buffer=False):
        for each in (head, torch.compile(head)):
            loss = adversary_of(each, coefficients)(x, target)
            results.append(torch.autograd.grad(loss, [x, *head.parameters()]))
    close(results[1], results[0])


@pytest.mark.parametrize("coefficients", [(0.3, 0.0, 0.0), (0.3, 0.2, 0.0)], ids=str)
def test_a_head_compiled_with_the_defaults_of_torch(coefficients):
    torch._dynamo.reset()
    head = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    x, target = torch.randn(N, D, dtype=torch.float64), torch.randint(CLASSES, (N,))
    found = []
    for each in (head, torch.compile(copy.deepcopy(head))):
        features = x.clone().requires_grad_()
        loss = adversary_of(each, coefficients)(features, target)
        if each is not head and coefficients[1]:
            # Its buffers are needed for two gradients, as with any retain_graph=True.
            with pytest.raises(
                RuntimeError, match=r"set torch\._functorch\.config\.donated_buffer"
            ):
                loss.backward()
            return
        loss.backward()
        found.append([features.grad, *(p.grad for p in each.parameters())])
    close(found[1], found[0])
