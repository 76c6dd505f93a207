"""Groups of label and bias, and batches in which they are as frequent."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from processes import in_processes, needs_gloo
from tiny_run import tiny_batches, tiny_networks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from lnl_ext.training.balance import balanced_weights, group_numbers
from lnl_ext.training.batches import ShardedBatchSampler, TensorBatches, balanced
from lnl_ext.training.config import OptimizerConfig, TrainerConfig
from lnl_ext.training.trainer import Trainer

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
BIAS = torch.tensor([5, 5, 5, 7, 7, 7, 5, -100])


def test_groups_are_the_combinations_that_occur() -> None:
    assert group_numbers(LABELS, BIAS).tolist() == [0, 0, 0, 1, 3, 3, 2, -100]
    other = torch.tensor([0, 0, 1, 0, 0, -100, 0, 0])
    assert group_numbers(LABELS, [BIAS, other]).tolist() == [0, 0, 1, 2, 4, -100, 3, -100]
    assert group_numbers(LABELS, torch.full((8,), -100)).tolist() == [-100] * 8


def test_groups_weigh_the_same_and_unknown_ones_as_without_balance() -> None:
    weights = balanced_weights(LABELS, BIAS)
    each = 7 / 4  # of seven known samples, by group
    assert weights.tolist() == pytest.approx(
        [each / 3, each / 3, each / 3, each, each / 2, each / 2, each, 1.0]
    )
    assert weights.mean().item() == pytest.approx(1.0)
    assert balanced_weights(LABELS, torch.full((8,), -100)).tolist() == [1.0] * 8


def test_several_columns_are_balanced_each_by_itself() -> None:
    """Of two that depend on each other, and the second is not known for some samples."""
    generator = torch.Generator().manual_seed(0)
    labels, one = biased()
    two = torch.where(torch.rand(2000, generator=generator) < 0.9, one, 2)
    two[::7] = -100
    weights = balanced_weights(labels, [one, two])
    assert weights.mean().item() == pytest.approx(1.0)
    for column in (one, two):
        groups = group_numbers(labels, column)
        sums = torch.bincount(groups[groups >= 0], weights[groups >= 0])
        assert len(sums) >= 4
        torch.testing.assert_close(sums, sums.mean().expand_as(sums), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("labels", "bias", "error", "message"),
    [
        (LABELS, BIAS.float(), TypeError, "bias has dtype torch.float32, expected integers"),
        (LABELS, BIAS[:7], ValueError, r"bias has shape \(7,\), expected \(8,\)"),
        (LABELS, BIAS[:, None], ValueError, r"bias has shape \(8, 1\), expected \(8,\)"),
        (LABELS, [], ValueError, "bias has no column"),
    ],
)
def test_what_has_no_groups_is_refused(
    labels: Tensor, bias: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        balanced_weights(labels, bias)


def biased(samples: int = 2000) -> tuple[Tensor, Tensor]:
    """Labels, and a bias that is the label in 95 of 100."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (samples,), generator=generator)
    differs = torch.rand(samples, generator=generator) < 0.05
    return labels, torch.where(differs, 1 - labels, labels)


def drawn(batches: Any) -> dict[tuple[int, int], float]:
    """The share of every group in a pass."""
    found = Counter()
    for _, labels, bias in batches:
        found.update(zip(labels.tolist(), bias["bias"].tolist(), strict=True))
    return {group: count / found.total() for group, count in found.items()}


class Samples(TensorDataset):
    """As a DataLoader wants them."""

    def __getitem__(self, index: int) -> Any:
        image, label, bias = super().__getitem__(index)
        return image, label, {"bias": bias}


def batches(kind: str) -> Any:
    labels, bias = biased()
    weights = balanced_weights(labels, bias)
    data = Samples(torch.zeros(len(labels), 1), labels, bias)
    if kind == "tensors":
        return balanced(TensorBatches(data.tensors[0], labels, {"bias": bias}, batch_size=50))
    if kind == "sharded":
        sampler = ShardedBatchSampler(len(labels), 50, weights=weights)
        return DataLoader(data, batch_sampler=sampler)
    sampler = WeightedRandomSampler(weights.tolist(), len(labels), generator=torch.Generator())
    return DataLoader(data, batch_size=50, sampler=sampler)


@pytest.mark.parametrize("kind", ["tensors", "sharded", "torch's sampler"])
def test_groups_are_as_frequent_in_balanced_batches(kind: str) -> None:
    source = batches(kind)
    assert balanced(source) is source
    assert len(source) == 40
    shares = drawn(source)
    # Of 2,000 draws with probability 1/4: four standard deviations.
    assert shares == pytest.approx(dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 1)], 0.25), abs=0.039)


def test_the_trainer_balances_tensor_batches_and_leaves_them_as_they_are() -> None:
    """It resamples anew in every epoch, and names the run's order by its seed."""
    labels, bias = biased(200)
    images = torch.stack([labels, bias], 1).float()
    seen: list[Tensor] = []
    features = nn.Linear(2, 2)
    features.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    given = TensorBatches(images, labels, {"bias": bias}, batch_size=50)
    trainer = Trainer(features, nn.Linear(2, 2), None, TrainerConfig(epochs=10, balance=True))
    trainer.fit(given, progress=False)
    rows = torch.cat(seen)
    same = (rows[:, 0] == rows[:, 1]).float().mean().item()
    assert same == pytest.approx(0.5, abs=0.045)  # four standard deviations of 2,000 draws
    assert not torch.equal(rows[:200], rows[200:400])
    assert given.weights is None
    assert torch.cat([y for _, y, _ in given]).sum() == labels.sum()  # each sample once


def test_batches_without_weights_are_refused() -> None:
    trainer = Trainer(*tiny_networks(), None, TrainerConfig(balance=True))
    with pytest.raises(ValueError, match=r"balance: list has no sampler with weights.*weights="):
        trainer.fit(list(tiny_batches()), progress=False)
    labels, bias = biased(100)
    loader = DataLoader(Samples(torch.zeros(100, 1), labels, bias), batch_size=50, shuffle=True)
    with pytest.raises(ValueError, match="balance: DataLoader has no sampler with weights"):
        trainer.fit(loader, progress=False)
    without = TensorBatches(torch.zeros(100, 1), labels, batch_size=50)
    with pytest.raises(ValueError, match=r"needs an integer bias target of shape \(100,\)"):
        trainer.fit(without, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": torch.ones(3)}, r"weights has shape \(3,\), expected \(4,\)"),
        ({"weights": torch.ones(4), "shuffle": False}, "shuffle=False has an order"),
    ],
)
def test_weights_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardedBatchSampler(4, 2, **options)


def orders(seed: int) -> list[list[int]]:
    sampler = ShardedBatchSampler(20, 6, weights=torch.arange(20.0))
    sampler.generator.manual_seed(seed)
    return list(sampler)


@needs_gloo
def test_processes_share_out_what_was_drawn() -> None:
    whole = orders(3)
    shares = in_processes(orders, 3)
    for number, batch in enumerate(whole):
        assert [share[number] for share in shares] == [batch[0::2], batch[1::2]]


def test_balance_alone_is_resampling_and_helps_the_worst_group() -> None:
    """Of a label that is hard to see and a bias that is easy and wrong for 5 in 100."""
    labels, bias = biased()
    noise = torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(1))
    images = torch.stack([labels - 0.5, 4 * (bias - 0.5)], 1) * 2 + noise
    worst = []
    for balance in (False, True):
        torch.manual_seed(0)
        f, g = nn.Linear(2, 2), nn.Linear(2, 2)
        adam = OptimizerConfig(learning_rate=0.01)
        config = TrainerConfig(epochs=3, optimizer=adam, balance=balance)
        source = TensorBatches(images, labels, {"bias": bias}, batch_size=50)
        Trainer(f, g, None, config).fit(source, progress=False)
        right = g(f(images)).argmax(1) == labels
        worst.append(right[labels != bias].float().mean().item())
    assert worst[1] > worst[0] + 0.1
