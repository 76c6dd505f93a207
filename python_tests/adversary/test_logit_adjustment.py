"""The label loss whose logits are adjusted by what the bias tells about the label."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lnl_ext import OptimizerConfig, Trainer, TrainerConfig, independence_weights, logit_adjustment
from lnl_ext.training.batches import TensorBatches
from lnl_ext.training.checkpoint import CheckpointError
from lnl_ext.training.trainer import CHECKPOINT


def biased_set(samples: int = 20_000) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, a bias that agrees with nine in ten, and images: a weak sign of the label, the bias.

    The sign agrees with eight in ten whatever the bias, so that the bias is the better one.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (samples,), generator=generator)
    agree = torch.rand(2, samples, generator=generator)
    bias = torch.where(agree[0] < 0.9, labels, 1 - labels)
    sign = torch.where(agree[1] < 0.8, labels, 1 - labels)
    return labels, bias, 2.0 * torch.stack([sign, bias], 1) - 1


def test_it_is_how_much_likelier_the_bias_makes_each_label() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 0, 1, 1, 1, 1]).repeat(10_000)
    bias = torch.tensor([0, 0, 0, 0, 7, 7, 7, 7, 7, 7]).repeat(10_000)
    found = logit_adjustment(labels, bias)
    assert found.dtype == torch.float32
    share = {0: torch.tensor([3 / 4, 1 / 4]), 7: torch.tensor([1 / 6, 5 / 6])}
    for value, of_value in share.items():
        expected = (of_value / torch.tensor([0.4, 0.6])).expand(int((bias == value).sum()), 2)
        torch.testing.assert_close(found[bias == value].exp(), expected, rtol=2e-3, atol=0)


def test_columns_are_independent_given_the_label() -> None:
    torch.manual_seed(0)
    labels = torch.randint(3, (50_000,))
    noise = torch.randint(3, (50_000, 2))
    bias = torch.where(torch.rand(50_000, 2) < 0.5, labels[:, None], noise)
    prior = torch.bincount(labels) / 50_000
    found = logit_adjustment(labels, bias).exp() * prior
    torch.testing.assert_close(found.sum(1), torch.ones(50_000))
    for first, second in ((0, 0), (0, 1)):
        rows = (bias[:, 0] == first) & (bias[:, 1] == second)
        share = torch.bincount(labels[rows], minlength=3) / rows.sum()
        torch.testing.assert_close(found[rows][0], share, rtol=0, atol=0.02)


def test_a_bias_of_many_rare_values_tells_little() -> None:
    """It is noise: that each of its values has few samples must not name their labels."""
    torch.manual_seed(0)
    labels = torch.randint(2, (1000,))
    for bias in (torch.arange(1000), torch.randint(500, (1000,)), 2**40 + torch.arange(1000)):
        found = logit_adjustment(labels, bias)
        own = (
            found.gather(1, labels[:, None]).exp()
            * (torch.bincount(labels)[labels] / 1000)[:, None]
        )
        assert own.mean() < 0.6


def test_the_shares_of_the_labels_stay_with_the_logits() -> None:
    labels = (torch.arange(1000) % 10 == 0).long()
    bias = (torch.arange(1000) // 10 % 2).long()
    torch.testing.assert_close(logit_adjustment(labels, bias), torch.zeros(1000, 2))


def test_the_weights_of_independence_are_its_inverse() -> None:
    labels, bias, _ = biased_set(2000)
    own = logit_adjustment(labels, bias).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(independence_weights(labels, bias), (-own).exp())


def test_a_class_without_samples_is_not_adjusted() -> None:
    labels = torch.tensor([0, 2, 2, 0])
    found = logit_adjustment(labels, torch.tensor([0, 0, 1, 1]), classes=4)
    assert found.shape == (4, 4)
    assert (found[:, [1, 3]] == 0).all()
    assert found.isfinite().all()


def test_a_bias_that_is_not_known_tells_nothing() -> None:
    torch.manual_seed(0)
    labels, bias = torch.randint(3, (500,)), torch.randint(4, (500,))
    known = logit_adjustment(labels, bias)
    unknown = torch.full_like(bias, -100)
    torch.testing.assert_close(logit_adjustment(labels, torch.stack([bias, unknown], 1)), known)
    # Twice the samples, half of them without a bias: they count as labels only.
    twice = logit_adjustment(labels.repeat(2), torch.cat([bias, unknown]))
    torch.testing.assert_close(twice[:500], known)
    assert twice[500:].abs().max() < 1e-6
    other = torch.where(bias == 1, -1, bias)
    assert logit_adjustment(labels, other, ignore_index=-1)[bias == 1].abs().max() < 1e-6


def test_odd_sizes() -> None:
    none = torch.empty(0, dtype=torch.long)
    assert logit_adjustment(none, none, classes=3).shape == (0, 3)
    labels = torch.tensor([0, 1, 1])
    without = logit_adjustment(labels, torch.empty(3, 0, dtype=torch.long))
    torch.testing.assert_close(without, torch.zeros(3, 2))
    torch.testing.assert_close(
        logit_adjustment(labels.to(torch.uint8), labels.to(torch.int32)),
        logit_adjustment(labels, labels),
    )


def test_what_cannot_be_counted_is_refused() -> None:
    labels = torch.tensor([0, 1, 2])
    with pytest.raises(TypeError, match=r"labels has dtype torch\.float32, expected integers"):
        logit_adjustment(labels.float(), labels)
    with pytest.raises(ValueError, match=r"labels have shape \(3,\) and bias \(2,\)"):
        logit_adjustment(labels, labels[:2])
    for wrong in (labels - 1, labels - 100):
        with pytest.raises(ValueError, match="leave out samples without one"):
            logit_adjustment(wrong, labels)
    with pytest.raises(ValueError, match="leave out samples without one"):
        logit_adjustment(labels, labels - 1)
    with pytest.raises(ValueError, match="labels has class 2, expected less than 2"):
        logit_adjustment(labels, labels, classes=2)


@pytest.mark.parametrize("update", ["joint", "two_step"])
def test_a_classifier_that_is_told_the_bias_does_not_learn_it(update: str) -> None:
    """Its weights come to those of the log-odds of a sign that is right in eight of ten."""
    labels, bias, images = biased_set()

    def train(adjusted: bool) -> Tensor:
        torch.manual_seed(0)
        classifier = nn.Linear(2, 2)
        optimizer = OptimizerConfig(learning_rate=1e-2)
        config = TrainerConfig(epochs=4, update=update, optimizer=optimizer)
        trainer = Trainer(
            nn.Identity(),
            classifier,
            {},
            config,
            logit_adjustment="adjustment" if adjusted else None,
        )
        targets = {"adjustment": logit_adjustment(labels, bias)}
        trainer.fit(TensorBatches(images, labels, targets, batch_size=100), progress=False)
        weight = classifier.weight.detach()
        return weight[1] - weight[0]  # the log-odds of a sign of 1 against none

    sign = torch.tensor(4.0).log()  # 2 w = 2 log(.8 / .2)
    told, untold = train(True), train(False)
    torch.testing.assert_close(told, torch.stack([sign, torch.tensor(0.0)]), rtol=0, atol=0.15)
    torch.testing.assert_close(
        untold, torch.stack([sign, torch.tensor(9.0).log()]), rtol=0, atol=0.15
    )


def test_accuracy_is_that_of_the_logits_as_they_are() -> None:
    labels = torch.tensor([0, 1, 0, 1])
    images = torch.eye(2)[labels]
    classifier = nn.Linear(2, 2, bias=False)
    classifier.weight.data.copy_(torch.eye(2))
    trainer = Trainer(
        nn.Identity(),
        classifier,
        config=TrainerConfig(epochs=1),
        logit_adjustment="wrong",
        task_loss=lambda logits, labels: F.cross_entropy(logits, labels) * 0,
    )
    wrong = 9.0 * torch.eye(2)[1 - labels]
    history = trainer.fit(
        TensorBatches(images, labels, {"wrong": wrong}, batch_size=4), progress=False
    )
    assert history[0]["label_accuracy"] == 1


def test_an_adjustment_that_does_not_fit_is_refused() -> None:
    labels = torch.tensor([0, 1])
    trainer = Trainer(nn.Linear(3, 4), nn.Linear(4, 2), logit_adjustment="adjustment")
    images = torch.randn(2, 3)
    for wrong, told in (
        (torch.zeros(2, 1), r"\(2, 1\) torch.float32"),
        (labels.expand(2, 2), "int64"),
    ):
        batches = TensorBatches(images, labels, {"adjustment": wrong}, batch_size=2)
        with pytest.raises(ValueError, match=rf"'adjustment' is .*{told}, expected .* \(2, 2\)"):
            trainer.fit(batches, progress=False)
    with pytest.raises(KeyError, match="no bias target for 'adjustment'"):
        trainer.fit(TensorBatches(images, labels, {}, batch_size=2), progress=False)


def test_a_checkpoint_of_another_label_loss_is_refused(tmp_path: Path) -> None:
    def trainer(name: str | None) -> Trainer:
        torch.manual_seed(0)
        return Trainer(nn.Linear(3, 4), nn.Linear(4, 2), logit_adjustment=name)

    labels = torch.tensor([0, 1])
    targets = {"adjustment": torch.zeros(2, 2)}
    batches = TensorBatches(torch.randn(2, 3), labels, targets, batch_size=2)
    for name, other in (("adjustment", None), (None, "adjustment")):
        folder = tmp_path / str(name)
        trainer(name).fit(batches, output=folder, progress=False)
        trainer(name).load(folder / CHECKPOINT)
        with pytest.raises(CheckpointError, match=f"logit_adjustment: {name!r}, now {other!r}"):
            trainer(other).load(folder / CHECKPOINT)
