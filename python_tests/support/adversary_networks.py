"""Small networks, and plain PyTorch's version of every gradient that BiasAdversary promises."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

CLASSES, HEADS, LABELS = 5, 3, 4


def feature_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()).double()


def classifier() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, LABELS)).double()


def map_head() -> nn.Module:
    """A head with what goes wrong when it runs twice: batch statistics and dropout."""
    return nn.Sequential(
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Conv2d(8, HEADS * CLASSES, 1),
    ).double()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, and the bias of every position for three heads, a third of it ignored."""
    images = torch.randn(4, 3, 6, 5, dtype=torch.float64)
    bias = torch.randint(CLASSES, (4, HEADS, 6, 5))
    bias[torch.rand(bias.shape) < 0.3] = -100
    return images, torch.randint(LABELS, (4,)), bias


def terms(logits: Tensor, bias: Tensor, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """CE, H and CE(uniform, p), textbook formulas in PyTorch, means summed over heads."""
    logits = logits.unflatten(1, (heads, -1))
    bias = bias.reshape(bias.shape[0], heads, *logits.shape[3:])
    log_p = F.log_softmax(logits, 2)
    cross_entropy = sum(F.cross_entropy(logits[:, k], bias[:, k]) for k in range(heads))
    entropy = heads * -(log_p.exp() * log_p).sum(2).mean()
    confusion = heads * -log_p.mean(2).mean()
    return cross_entropy, entropy, confusion


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters())))


def expected_gradients(f, g, h, images, labels, bias, coefficients, seed, heads=HEADS):
    """Three computations, each with its own forward of fresh copies and the same dropout.

    Returns the gradients of f, g and h for ``Lc + adversary``.
    """
    reversal, entropy_weight, confusion_weight = coefficients

    def networks():
        torch.manual_seed(seed)
        return copy.deepcopy(f), copy.deepcopy(g), copy.deepcopy(h)

    # 1. the task loss: g and its part of f
    f1, g1, _ = networks()
    task = F.cross_entropy(g1(f1(images)), labels)
    for_f = torch.autograd.grad(task, [*f1.parameters(), *g1.parameters()])
    for_f, for_g = for_f[: len(list(f1.parameters()))], for_f[len(list(f1.parameters())) :]
    # 2. the head alone, on detached features
    f2, _, h2 = networks()
    for_h = gradients(terms(h2(f2(images).detach()), bias, heads)[0], h2)
    # 3. the features alone
    f3, _, h3 = networks()
    cross_entropy, entropy, confusion = terms(h3(f3(images)), bias, heads)
    unlearn = -reversal * cross_entropy - entropy_weight * entropy + confusion_weight * confusion
    against = gradients(unlearn, f3)
    return [a + b for a, b in zip(for_f, against, strict=True)], list(for_g), for_h


def separate_gradients(head, x, bias, leaves, coefficients, heads: int = 1, seed: int = 0):
    """Two plain computations: the gradient of `x` that fools the head, and dCE of `leaves`.

    `head` is any function of the features, with the same random draws in both.
    """
    reversal, entropy_weight, confusion_weight = coefficients
    torch.manual_seed(seed)
    cross_entropy, _, _ = terms(head(x.detach().clone()), bias, heads)
    for_leaves = torch.autograd.grad(cross_entropy, leaves, allow_unused=True)
    features = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    cross_entropy, entropy, confusion = terms(head(features * 1), bias, heads)
    unlearn = -reversal * cross_entropy - entropy_weight * entropy + confusion_weight * confusion
    return torch.autograd.grad(unlearn, features)[0], for_leaves
