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

from lnl_ext import BiasAdversary, independence_weights, logit_adjustment
from lnl_ext.training import batches as batches_module
from lnl_ext.training.balance import balanced_weights, draws, group_numbers
from lnl_ext.training.batches import ShardedBatchSampler, TensorBatches
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


def test_what_has_no_names_is_refused_by_all_that_take_biases() -> None:
    expected = "is a Tensor, expected a dictionary with a name for each bias"
    with pytest.raises(TypeError, match=f"bias {expected}"):
        draws(LABELS, BIAS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=f"bias {expected}"):
        TensorBatches(torch.zeros(8, 1), LABELS, BIAS, batch_size=2)  # type: ignore[arg-type]
    adversary = BiasAdversary(nn.Linear(1, 2))
    with pytest.raises(TypeError, match="adversaries is a BiasAdversary, expected a dictionary"):
        Trainer(nn.Identity(), nn.Linear(1, 2), adversary)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="balance is 2, expected a number from 0 to 1"):
        draws(LABELS, {"bias": BIAS}, balance=2)


def biased(samples: int = 2000) -> tuple[Tensor, Tensor]:
    """Labels, and a bias that is the label in 95 of 100."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (samples,), generator=generator)
    differs = torch.rand(samples, generator=generator) < 0.05
    return labels, torch.where(differs, 1 - labels, labels)


def shares_of(batches: Any) -> dict[tuple[int, int], float]:
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
        given = TensorBatches(data.tensors[0], labels, {"bias": bias}, batch_size=50)
        return batches_module.drawn(given, 1.0, adjust=False)
    if kind == "sharded":
        sampler = ShardedBatchSampler(len(labels), 50, weights=weights)
        return DataLoader(data, batch_sampler=sampler)
    sampler = WeightedRandomSampler(weights.tolist(), len(labels), generator=torch.Generator())
    return DataLoader(data, batch_size=50, sampler=sampler)


@pytest.mark.parametrize("kind", ["tensors", "sharded", "torch's sampler"])
def test_groups_are_as_frequent_in_balanced_batches(kind: str) -> None:
    source = batches(kind)
    assert batches_module.drawn(source, 1.0, adjust=False) is source
    assert len(source) == 40
    shares = shares_of(source)
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
    with pytest.raises(ValueError, match=r"need an integer bias target of shape \(100,\)"):
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


def test_drawing_and_adjusted_losses_share_the_work() -> None:
    """Half of the balance in the draws: the losses are told the other half."""
    labels, bias = biased()
    known = bias.clone()
    known[::10] = -100
    made = draws(labels, {"bias": bias, "b": known}, balance=0.5, adjust=True)
    assert made.weights is not None
    alone = draws(labels, {"bias": bias}, balance=0.5, adjust=True)
    torch.testing.assert_close(alone.weights, balanced_weights(labels, bias) ** 0.5)
    # As if there were as many samples of each kind as are drawn.
    assert alone.weights is not None
    repeats = (alone.weights / alone.weights.min() * 100).round().long()
    rows = torch.arange(len(labels)).repeat_interleave(repeats)
    adjustment = logit_adjustment(labels[rows], bias[rows])
    share, drawn = torch.bincount(labels) / len(labels), torch.bincount(labels[rows]) / len(rows)
    adjustment += (drawn / share).log()  # predictions are for labels as they come
    torch.testing.assert_close(
        alone.targets["logit_adjustment"][rows], adjustment, atol=0.05, rtol=0
    )
    assert adjustment.abs().max() < 0.7 * logit_adjustment(labels, bias).abs().max()
    weights = alone.targets["head_weight:bias"]
    sums = torch.zeros(2, 2).index_put_((labels[rows], bias[rows]), weights[rows], accumulate=True)
    sums /= sums.sum()
    torch.testing.assert_close(sums, sums.sum(1, keepdim=True) * sums.sum(0), atol=0.01, rtol=0)
    torch.testing.assert_close(
        alone.targets["head_weight:bias"],
        independence_weights(labels, bias, weights=alone.weights),
    )
    unknown = made.targets["head_weight:b"][::10]
    torch.testing.assert_close(unknown, torch.ones_like(unknown))
    whole = draws(labels, {"bias": bias}, balance=1.0, adjust=True)
    expected = (0.5 / share).log().expand(2000, 2)  # half of what is drawn has each label
    torch.testing.assert_close(whole.targets["logit_adjustment"], expected, atol=0.01, rtol=0)
    torch.testing.assert_close(whole.targets["head_weight:bias"], torch.ones(2000))
    assert draws(labels, {"bias": bias}) == (None, {})


def test_columns_of_the_adjustment_are_one_bias() -> None:
    """That of two columns with the same values, and of missing values, is that of one column."""
    labels = torch.tensor([0, 0, 0, 1, 1, 0, 1, 1]).repeat(50)
    column = torch.tensor([0, 0, 0, 0, 1, 1, 1, -100]).repeat(50)
    expected = logit_adjustment(labels, column.where(column >= 0, 2))
    for bias in ({"a": column}, {"a": column, "b": column}):
        found = draws(labels, bias, adjust=True).targets["logit_adjustment"]
        torch.testing.assert_close(found, expected)


def test_a_bias_of_several_columns_is_drawn_and_adjusted_by_all_of_them() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 0, 1, 1]).repeat(50)
    colour = torch.stack([labels.roll(1), (torch.arange(400) % 3 == 0).long()], 1)
    made = draws(labels, {"colour": colour}, balance=0.5, adjust=True)
    apart = draws(labels, {"a": colour[:, 0], "b": colour[:, 1]}, balance=0.5, adjust=True)
    torch.testing.assert_close(made.weights, apart.weights)
    added = [targets.pop("logit_adjustment") for targets in (made.targets, apart.targets)]
    torch.testing.assert_close(*added)
    expected = independence_weights(labels, colour, weights=made.weights)
    torch.testing.assert_close(made.targets, {"head_weight:colour": expected})
    batches = TensorBatches(torch.zeros(400, 1), labels, {"colour": colour}, batch_size=50)
    torch.testing.assert_close(
        batches.drawn(0.5, adjust=True).bias,
        {"colour": colour, "logit_adjustment": added[0], "head_weight:colour": expected},
    )


def test_the_trainer_adjusts_tensor_batches_and_asks_others_for_the_targets() -> None:
    labels, bias = biased(200)
    images = torch.stack([labels, bias], 1).float()

    def trainer(config: TrainerConfig) -> Trainer:
        torch.manual_seed(0)
        adversary = BiasAdversary(nn.Linear(2, 2))
        return Trainer(nn.Linear(2, 2), nn.Linear(2, 2), {"bias": adversary}, config)

    def weights(of: Trainer) -> list[Tensor]:
        parts = (of.features, of.classifier, of.adversaries["bias"])
        return [p.detach() for part in parts for p in part.parameters()]

    config = TrainerConfig(epochs=2, balance=0.5, adjust=True)
    short = trainer(config)
    short.fit(TensorBatches(images, labels, {"bias": bias}, batch_size=50), progress=False)
    # The same by hand.
    made = draws(labels, {"bias": bias}, balance=0.5, adjust=True)
    long = trainer(config)
    targets = {"bias": bias, **made.targets}
    given = TensorBatches(images, labels, targets, batch_size=50, weights=made.weights)
    long.fit(given, progress=False)
    torch.testing.assert_close(weights(short), weights(long))
    plain = trainer(TrainerConfig(epochs=2, balance=0.5))
    plain.fit(TensorBatches(images, labels, {"bias": bias}, batch_size=50), progress=False)
    assert not torch.equal(plain.classifier.weight, short.classifier.weight)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=r"no bias target for.*'logit_adjustment'"):
        trainer(TrainerConfig(adjust=True)).fit(list(tiny_batches()), progress=False)
