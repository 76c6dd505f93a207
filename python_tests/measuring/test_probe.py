"""The fresh probe finds what features hold, and nothing where they hold nothing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import lnl_ext
from lnl_ext.measuring.probe import fresh_copy

SAMPLES = 1200
QUICK = {"permutations": 9, "resamples": 100}


def draw(seed: int, heads: int = 2):
    """Make features that hold the class of each head as a one-hot vector, and these classes."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(4, (SAMPLES, heads), generator=generator)
    features = nn.functional.one_hot(target, 4).flatten(1).float()
    return features + 0.1 * torch.randn(features.shape, generator=generator), target


def probed(model, target, head, **options):
    """Train a head on one half of the samples and measure it on the other."""
    options = {"probes": (), "head": head, "heads": target.shape[1], **QUICK} | options
    half = torch.arange(SAMPLES) >= SAMPLES // 2
    labels = torch.zeros(SAMPLES, dtype=torch.long)
    return lnl_ext.audit(model, labels, target, test=half, **options).biases["bias"]


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
    images, target = draw(0)
    batches = ((part, None) for part in itertools.chain(images[:700].split(64), [images[700:]]))
    result = probed(features, target, nn.Linear(8, 8), inputs=batches)
    # 600 test samples of 2 heads: a standard error of at most 0.0125.
    assert result.leakage.accuracy == pytest.approx(accuracy, abs=0.05)
    assert result.majority == pytest.approx(0.25, abs=0.05)
    assert result.label_only == result.majority  # there is one label
    assert result.entropy == pytest.approx(math.log(4), abs=0.01)
    known = math.log(4) * (accuracy - 0.25) / 0.75
    assert result.leakage.information == pytest.approx(known, abs=0.05)
    assert result.leakage.information >= 0


def test_majority_is_that_of_the_samples_it_learned_from():
    features, target = draw(0, heads=1)
    target[: SAMPLES // 2] = 3
    result = probed(torch.zeros_like(features), target, nn.Linear(4, 4))
    assert result.majority == target[SAMPLES // 2 :].eq(3).double().mean().item()


def test_ignored_targets_do_not_count():
    features, target = draw(0, heads=1)
    hidden = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(2)) < 0.5
    features[hidden] = 0
    target[hidden] = -100
    assert probed(features, target, nn.Linear(4, 4)).leakage.accuracy > 0.97


def test_a_convolutional_probe_finds_what_is_in_some_place():
    generator = torch.Generator().manual_seed(3)
    bias = torch.randint(2, (400,), generator=generator)
    maps = 0.1 * torch.randn(400, 2, 12, 12, generator=generator)
    row, column = torch.randint(12, (2, 400), generator=generator)
    maps[torch.arange(400), bias, row, column] += 5
    report = lnl_ext.audit(maps, torch.zeros_like(bias), {"hidden": bias}, **QUICK)
    probes = report.biases["hidden"].probes
    assert list(probes) == ["linear", "mlp", "conv"]
    assert report.biases["hidden"].strongest == "conv"
    assert probes["conv"].accuracy > 0.97
    vectors = lnl_ext.audit(maps.flatten(1), torch.zeros_like(bias), bias, **QUICK)
    assert list(vectors.biases["bias"].probes) == ["linear", "mlp"]


def test_nothing_that_was_passed_in_changes():
    images, target = draw(0)
    features = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout())
    features[1].eval()
    head = nn.Linear(8, 8)
    modes = [module.training for module in features.modules()]
    before = [value.clone() for value in (*features.state_dict().values(), *head.parameters())]
    state = torch.get_rng_state()
    probed(features, target, head, inputs=images)
    after = [*features.state_dict().values(), *head.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert [module.training for module in features.modules()] == modes
    assert all(p.grad is None for p in (*features.parameters(), *head.parameters()))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_decides_the_result_and_not_what_the_head_has_learned():
    features, target = draw(0)
    features[:, 4:] = 0
    trained = nn.Linear(8, 8)
    with torch.no_grad():
        trained.weight.fill_(100.0)
    one = probed(features, target, nn.Linear(8, 8), seed=5)
    assert probed(features, target, trained, seed=5) == one
    assert probed(features, target, trained, seed=6) != one


def test_too_few_samples_are_named():
    features, target = draw(0)
    labels = torch.zeros(SAMPLES, dtype=torch.long)
    for rows, message in ((1, "1 samples"), (3, r"3 samples are too few \(train 1")):
        with pytest.raises(lnl_ext.measuring.TooFewSamplesError, match=message):
            lnl_ext.audit(features[:rows], labels[:rows], target[:rows, 0])
    none = torch.zeros(SAMPLES, dtype=torch.bool)
    with pytest.raises(lnl_ext.measuring.TooFewSamplesError, match="test 0"):
        lnl_ext.audit(features, labels, target[:, 0], test=none)
    target[SAMPLES // 2 :, 1] = -1
    with pytest.raises(lnl_ext.measuring.TooFewSamplesError, match="a head without any known"):
        probed(features, target, nn.Linear(8, 8))


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
