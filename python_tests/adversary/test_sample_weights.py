"""Weights of the samples in a bias head's loss, and those that make bias and label independent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lnl_ext import BiasAdversary, BiasLoss, Trainer, TrainerConfig, independence_weights
from lnl_ext.training.batches import TensorBatches


def gradients(head: nn.Module, features: Tensor, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [features, *head.parameters()]))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("layers", ["linear", "map"])
def test_a_weight_of_two_is_the_sample_twice(reduction: str, heads: int, layers: str) -> None:
    torch.manual_seed(0)
    head: nn.Module = nn.Linear(6, 4 * heads)
    features = torch.randn(5, 6, dtype=torch.float64)
    target = torch.randint(4, (5, heads))
    if layers == "map":
        head = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4 * heads, 1))
        features = torch.randn(5, 6, 3, 3, dtype=torch.float64)
        target = torch.randint(4, (5, heads, 3, 3))
    target[0, 0] = -100
    target = target if heads > 1 else target[:, 0]
    head.double()
    features.requires_grad_()
    adversary = BiasAdversary(
        head, heads=heads, reduction=reduction, reversal=0.7, entropy_weight=0.2, mask_entropy=True
    )
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    repeated = torch.tensor([0, 1, 1, 3, 4, 4])
    weighed = adversary(features, target, True, sample_weight=weight)
    whole = adversary(features[repeated], target[repeated], True)
    for ours, theirs in zip(weighed, whole, strict=True):
        torch.testing.assert_close(ours.sum(), theirs.sum())
    torch.testing.assert_close(
        gradients(head, features, weighed.loss.sum()), gradients(head, features, whole.loss.sum())
    )


def test_weights_that_do_not_fit_are_refused() -> None:
    features, target = torch.randn(5, 6), torch.randint(4, (5,))
    adversary = BiasAdversary(nn.Linear(6, 4), reduction="sum")
    with pytest.raises(ValueError, match=r"sample_weight has shape \(4,\), expected \(5,\)"):
        adversary(features, target, sample_weight=torch.ones(4))
    with pytest.raises(TypeError, match=r"expected a floating-point Tensor, got torch\.int64"):
        adversary(features, target, sample_weight=torch.ones(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="sample_weight and denominators exclude each other"):
        adversary(features, target, sample_weight=torch.ones(5), denominators=torch.ones(1, 2))


def test_a_weighted_mean_is_over_the_samples() -> None:
    features, target = torch.randn(5, 6), torch.tensor([0, 1, -100, 2, 3])
    weight = torch.tensor([0.5, 2.0, 3.0, 0.0, 1.0])
    head = nn.Linear(6, 4)
    mean = BiasAdversary(head, entropy_weight=0.1, mask_entropy=True)
    each = BiasAdversary(head, entropy_weight=0.1, mask_entropy=True, reduction="none")
    found = mean(features, target, True, sample_weight=weight)
    for ours, theirs in zip(found, each(features, target, True), strict=True):
        torch.testing.assert_close(ours, (weight * theirs).sum() / 5)


def test_under_the_weights_bias_and_label_are_independent() -> None:
    torch.manual_seed(0)
    labels = torch.randint(5, (40_000,))
    noise = torch.randint(5, (40_000, 2))
    bias = torch.where(torch.rand(40_000, 2) < 0.6, labels[:, None], noise)
    weight = independence_weights(labels, bias, maximum=1e9).double()
    assert weight.mean() == pytest.approx(1, abs=0.02)
    joint = torch.zeros(5, 5, 5, dtype=torch.float64)
    joint.index_put_((labels, bias[:, 0], bias[:, 1]), weight, accumulate=True)
    joint /= joint.sum()
    independent = joint.sum((1, 2))[:, None, None] * joint.sum(0)
    information = (joint * (joint / independent).log()).sum()
    plain = torch.zeros_like(joint)
    plain.index_put_((labels, *bias.unbind(1)), torch.ones_like(weight), accumulate=True)
    plain /= plain.sum()
    before = (plain * (plain / (plain.sum((1, 2))[:, None, None] * plain.sum(0))).log()).sum()
    # What is left is the noise of counts of cells with few samples.
    assert information < 0.01 < 0.5 < before
    assert independence_weights(labels, bias, maximum=3.0).max() == 3.0


def test_a_bias_without_exceptions_weighs_all_alike() -> None:
    labels = torch.arange(4).repeat(1000)
    weight = independence_weights(labels, labels)
    torch.testing.assert_close(weight, torch.full((4000,), 0.25), rtol=0.01, atol=0)


def test_labels_and_bias_that_cannot_be_counted_are_refused() -> None:
    labels = torch.tensor([0, 1, 2])
    with pytest.raises(TypeError, match=r"bias has dtype torch\.float32, expected integers"):
        independence_weights(labels, torch.rand(3))
    with pytest.raises(ValueError, match=r"labels have shape \(3,\) and bias \(2,\)"):
        independence_weights(labels, labels[:2])
    with pytest.raises(ValueError, match="leave out samples without one"):
        independence_weights(labels, torch.tensor([0, -1, 1]))
    with pytest.raises(ValueError, match=r"weights: expected \(3,\) numbers of at least 0"):
        independence_weights(labels, labels, weights=torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match="maximum is 0, expected a number above 0"):
        independence_weights(labels, labels, maximum=0)
    assert independence_weights(labels[:0], labels[:0]).shape == (0,)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("update", ["joint", "two_step"])
def test_training_takes_the_weights_from_the_batches(update: str, reduction: str) -> None:
    def train(rows: Tensor, weights: Tensor | None) -> list[Tensor]:
        torch.manual_seed(0)
        f, g = nn.Linear(6, 8).double(), nn.Linear(8, 3).double()
        adversary = BiasAdversary(
            nn.Linear(8, 4).double(), reversal=0.5, entropy_weight=0.1, reduction=reduction
        )
        config = TrainerConfig(epochs=1, update=update)
        # A task that is the same with and without the repeated rows: nothing to learn.
        trainer = Trainer(
            f,
            g,
            {"color": adversary},
            config,
            task_loss=lambda logits, labels: logits.sum() * 0,
            sample_weights=None if weights is None else {"color": "weight"},
        )
        bias = {"color": colors[rows]} | ({} if weights is None else {"weight": weights})
        trainer.fit(
            TensorBatches(images[rows], labels[rows], bias, batch_size=len(rows), shuffle=False),
            progress=False,
        )
        return [p.detach() for part in (f, g, adversary) for p in part.parameters()]

    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (6,), generator=generator)
    colors = torch.randint(4, (6,), generator=generator)
    weights = torch.tensor([1.0, 3.0, 1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    if reduction == "mean":  # over the samples: of six and of eight
        weights = weights * 6 / 8
    weighed = train(torch.arange(6), weights)
    repeated = train(torch.tensor([0, 1, 1, 1, 2, 4, 5, 5]), None)
    torch.testing.assert_close(weighed, repeated, rtol=1e-9, atol=1e-12)


def test_a_trainer_refuses_weights_it_cannot_use() -> None:
    f, g = nn.Linear(6, 8), nn.Linear(8, 3)
    with pytest.raises(ValueError, match="there is no adversary 'b'"):
        Trainer(f, g, {}, sample_weights={"b": "w"})
    trainer = Trainer(
        f, g, {"a": BiasAdversary(nn.Linear(8, 4), reduction="sum")}, sample_weights={"a": "w"}
    )
    batches = TensorBatches(
        torch.randn(4, 6), torch.zeros(4).long(), {"a": torch.zeros(4).long()}, batch_size=2
    )
    with pytest.raises(KeyError, match="no bias target for 'w'"):
        trainer.fit(batches, progress=False)


def test_terms_are_returned_weighed() -> None:
    features, target = torch.randn(3, 6), torch.randint(4, (3,))
    adversary = BiasAdversary(nn.Linear(6, 4), reduction="none", return_terms=True)
    weight = torch.tensor([0.5, 1.0, 4.0])
    plain = adversary(features, target)
    weighed = adversary(features, target, sample_weight=weight)
    assert isinstance(weighed, BiasLoss)
    for ours, theirs in zip(weighed, plain, strict=True):
        torch.testing.assert_close(ours, theirs * weight)
