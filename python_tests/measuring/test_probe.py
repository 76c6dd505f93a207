"""The fresh probe finds what features hold, and nothing where they hold nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lnl_ext.measuring.probe import fresh_copy, fresh_probe


def batches(count: int, seed: int, heads: int = 2, size: int = 100):
    """Make batches whose image holds the class of each head as a one-hot vector."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        target = torch.randint(0, 4, (size, heads), generator=generator)
        images = nn.functional.one_hot(target, 4).flatten(1).float()
        images = images + 0.1 * torch.randn(images.shape, generator=generator)
        made.append((images, torch.zeros(size), {"bias": target}))
    return made


class KeepFirst(nn.Module):
    """Features that hold the class of the first head only."""

    def forward(self, images):
        """Blank everything after the first four columns."""
        return torch.cat([images[:, :4], torch.zeros_like(images[:, 4:])], 1)


@pytest.mark.parametrize(
    ("features", "accuracy"),
    [(nn.Identity(), 1.0), (KeepFirst(), 0.625), (nn.Threshold(1e9, 0.0), 0.25)],
)
def test_accuracy_is_what_the_features_hold(features, accuracy):
    result = fresh_probe(
        features,
        nn.Linear(8, 8),
        batches(20, 0),
        batches(20, 1),
        "bias",
        heads=2,
        epochs=4,
        learning_rate=0.1,
    )
    # 2,000 test samples of 2 heads: a standard error of at most 0.008.
    assert result.accuracy == pytest.approx(accuracy, abs=0.035)
    assert result.majority == pytest.approx(0.25, abs=0.035)
    assert result.entropy == pytest.approx(math.log(4), abs=0.01)
    # Nothing to tell: 0 bits up to the probe's overfitting.
    assert result.information == pytest.approx(math.log(4) * (accuracy - 0.25) / 0.75, abs=0.12)


def test_majority_is_that_of_the_samples_it_learned_from():
    train, test = batches(2, 0, heads=1), batches(2, 1, heads=1)
    for images, _, bias in train:
        bias["bias"].fill_(3)
        images.zero_()
    result = fresh_probe(nn.Identity(), nn.Linear(4, 4), train, test, "bias", epochs=1)
    share = torch.cat([bias["bias"] for _, _, bias in test]).eq(3).float().mean().item()
    assert result.majority == pytest.approx(share)


def test_ignored_targets_do_not_count():
    train, test = batches(10, 0, heads=1), batches(10, 1, heads=1)
    for images, _, bias in (*train, *test):
        # Where the class is hidden, the target is ignored.
        hidden = torch.rand(len(images), generator=torch.Generator().manual_seed(2)) < 0.5
        images[hidden] = 0
        bias["bias"][hidden] = -100
    result = fresh_probe(
        nn.Identity(), nn.Linear(4, 4), train, test, "bias", epochs=4, learning_rate=0.1
    )
    assert result.accuracy > 0.97


def test_targets_may_have_positions():
    train, test = batches(4, 0, heads=2), batches(4, 1, heads=2)

    def spread(made):
        return [
            (x[:, :, None, None].expand(-1, -1, 2, 3), y, {"bias": b["bias"][:, :, None, None]})
            for x, y, b in made
        ]

    def full(made):
        return [(x, y, {"bias": b["bias"].expand(-1, -1, 2, 3)}) for x, y, b in spread(made)]

    result = fresh_probe(
        nn.Identity(),
        nn.Conv2d(8, 8, 1),
        full(train),
        full(test),
        "bias",
        heads=2,
        learning_rate=0.1,
    )
    assert result.accuracy > 0.97


def test_nothing_that_was_passed_in_changes():
    features = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout())
    features[1].eval()
    head = nn.Linear(8, 8)
    modes = [module.training for module in features.modules()]
    before = [value.clone() for value in (*features.state_dict().values(), *head.parameters())]
    state = torch.get_rng_state()
    fresh_probe(features, head, batches(2, 0), batches(2, 1), "bias", heads=2, epochs=1)
    after = [*features.state_dict().values(), *head.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert [module.training for module in features.modules()] == modes
    assert all(p.grad is None for p in (*features.parameters(), *head.parameters()))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_decides_the_result():
    def run(seed: int):
        return fresh_probe(
            KeepFirst(), nn.Linear(8, 8), batches(3, 0), batches(3, 1), "bias", heads=2, seed=seed
        )

    assert run(5) == run(5)
    assert run(5) != run(6)


def test_the_head_starts_afresh():
    head = nn.Linear(8, 8)
    trained = nn.Linear(8, 8)
    with torch.no_grad():
        trained.weight.fill_(100.0)
    results = [
        fresh_probe(nn.Identity(), h, batches(2, 0), batches(2, 1), "bias", heads=2, epochs=1)
        for h in (head, trained)
    ]
    assert results[0] == results[1]


def test_empty_sets_are_refused():
    some = batches(1, 0)
    with pytest.raises(ValueError, match="train has no batch"):
        fresh_probe(nn.Identity(), nn.Linear(8, 8), [], some, "bias", heads=2)
    with pytest.raises(ValueError, match="test has no batch"):
        fresh_probe(nn.Identity(), nn.Linear(8, 8), some, [], "bias", heads=2)
    ignored = [(x, y, {"bias": torch.full_like(b["bias"], -100)}) for x, y, b in some]
    with pytest.raises(ValueError, match="train has a head without a single target"):
        fresh_probe(nn.Identity(), nn.Linear(8, 8), ignored, some, "bias", heads=2)
    with pytest.raises(ValueError, match="test has a head without a single target"):
        fresh_probe(nn.Identity(), nn.Linear(8, 8), some, ignored, "bias", heads=2)


class BareParameter(nn.Module):
    """A head whose only parameter belongs to no module that can be reset."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 2))
        self.register_buffer("centre", torch.zeros(4))
        self.register_buffer("positions", torch.zeros(4), persistent=False)


def test_what_cannot_be_drawn_anew_is_named():
    with pytest.raises(
        ValueError, match=r"head has 1\.weight, 1\.centre, which no reset_parameters"
    ):
        fresh_copy(nn.Sequential(nn.Linear(4, 4), BareParameter()))


def test_a_parametrized_weight_is_not_fresh():
    head = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"parametrizations\.weight\.original0"):
        fresh_copy(head)


def test_every_parameter_of_usual_heads_is_drawn_anew():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
            self.layers = nn.Sequential(
                nn.Linear(8, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.PReLU(), nn.GRU(8, 8)
            )

    head = Attention()
    with torch.no_grad():
        for value in head.state_dict().values():
            value.fill_(7)
    probe = fresh_copy(head)
    for name, value in probe.state_dict().items():
        assert not (value == 7).any(), name
