import itertools
import json
import math

import pytest
import torch
from torch import nn

import lnl_ext
from lnl_ext.measuring.audit import _split
from lnl_ext.measuring.information import (
    Sampling,
    bootstrap_intervals,
    entropy_of_counts,
    permutation_test,
)

SAMPLES = 900
QUICK = {"permutations": 99, "resamples": 200}


def draw(seed: int, *sizes: int):
    generator = torch.Generator().manual_seed(seed)
    labels, bias = (torch.randint(size, (SAMPLES,), generator=generator) for size in sizes)
    return torch.randn(SAMPLES, 16, generator=generator), labels, bias


def show(features, bias, strength):
    return features + strength * nn.functional.one_hot(bias, features.shape[1])


def test_features_without_the_bias():
    features, labels, bias = draw(0, 3, 4)
    report = lnl_ext.audit(features, labels, bias, **QUICK).biases["bias"]
    assert report.chance == 0.25
    assert report.entropy == pytest.approx(math.log(4), abs=0.01)
    for probe in report.probes.values():
        assert probe.information_interval.low < 0.01
        assert probe.accuracy < 0.33
        assert probe.p_value > 0.05
        assert probe.converged


def test_features_that_show_the_bias():
    features, labels, bias = draw(1, 3, 4)
    report = lnl_ext.audit(show(features, bias, 20), labels, bias, **QUICK).biases["bias"]
    for probe in report.probes.values():
        assert probe.accuracy > 0.98
        # All of H(b) is in the features; a probe of finite training falls a little short.
        assert math.log(4) - 0.1 < probe.information <= report.entropy
        low, high = probe.information_interval
        assert low <= probe.information <= high
        assert probe.p_value == probe.p_value_within_labels == 0.01  # the smallest of 99


def test_information_that_is_known():
    """A bit that is right nine times in ten tells ln 2 - H(0.9) nats."""
    _, labels, bias = draw(2, 3, 2)
    wrong = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(3)) < 0.1
    shown = torch.where(wrong, 1 - bias, bias)[:, None].float()
    probe = lnl_ext.audit(shown, labels, bias, probes=["linear"], **QUICK).biases["bias"].probes
    known = math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1)
    low, high = probe["linear"].information_interval
    assert low < known < high


def test_only_a_nonlinear_probe_finds_a_parity():
    features, labels, _ = draw(4, 3, 2)
    bias = (features[:, 0] * features[:, 1] > 0).long()
    report = lnl_ext.audit(features[:, :2], labels, bias, **QUICK).biases["bias"]
    assert report.probes["linear"].accuracy < 0.65
    assert report.probes["mlp"].accuracy > 0.85
    assert report.strongest == "mlp"


def test_what_the_label_tells_is_not_beyond_the_label():
    _, labels, _ = draw(5, 3, 2)
    features = show(torch.zeros(SAMPLES, 3), labels, 5)
    bias = torch.where(
        torch.rand(SAMPLES, generator=torch.Generator().manual_seed(6)) < 0.8, labels, labels * 0
    )
    probe = lnl_ext.audit(features, labels, bias, **QUICK).biases["bias"].probes["linear"]
    assert probe.p_value == 0.01
    assert probe.p_value_within_labels > 0.05


def test_maps_heads_ignored_targets_and_the_benchmarks_own_head():
    generator = torch.Generator().manual_seed(7)
    bias = torch.randint(4, (120, 2, 5, 6), generator=generator)
    features = torch.randn(120, 8, 5, 6, generator=generator)
    features[:, :4] += 8 * nn.functional.one_hot(bias[:, 0], 4).movedim(-1, 1)
    hidden = torch.rand(bias.shape, generator=generator) < 0.3
    bias[hidden] = -100
    report = lnl_ext.audit(
        features,
        torch.zeros(120, dtype=torch.long),
        {"colour": bias},
        heads=2,
        head=nn.Conv2d(8, 8, 1),
        **QUICK,
    ).biases["colour"]
    assert list(report.probes) == ["linear", "mlp", "head"]
    assert report.groups is None
    for probe in report.probes.values():
        # One head reads its bias from the features, the other guesses: means over both.
        assert probe.accuracy == pytest.approx((1 + 0.25) / 2, abs=0.03)


def test_accuracy_by_group():
    features, labels, bias = draw(8, 2, 3)
    predictions = torch.where(bias == 2, 1 - labels, labels)
    bias[:100] = -1
    report = lnl_ext.audit(
        features, labels, bias, predictions=predictions, aligned=bias != 2, **QUICK
    )
    groups = report.biases["bias"].groups
    assert groups.accuracy == {(y, b): float(b != 2) for y in range(2) for b in range(3)}
    assert sum(groups.samples.values()) == SAMPLES - 100
    assert (groups.worst, groups.aligned, groups.conflicting) == (0, 1, 0)
    assert report.accuracy == pytest.approx((predictions == labels).double().mean().item())


def test_a_module_and_its_classifier():
    inputs, labels, bias = draw(9, 3, 4)
    model, classifier = nn.Sequential(nn.Linear(16, 8), nn.Dropout()), nn.Linear(8, 3)
    state = torch.get_rng_state()
    one = lnl_ext.audit(model, labels, bias, inputs=inputs, classifier=classifier, **QUICK)
    batches = [(part, None) for part in inputs.split(100)]
    two = lnl_ext.audit(model, labels, bias, inputs=batches, classifier=classifier, **QUICK)
    with torch.no_grad():
        features = model.eval()(inputs)
        logits = classifier(features)
    three = lnl_ext.audit(features, labels, bias, predictions=logits, **QUICK)
    assert torch.equal(state, torch.get_rng_state())
    for other in (two, three):
        assert other.accuracy == one.accuracy
        for name, probe in one.biases["bias"].probes.items():
            same = other.biases["bias"].probes[name]
            assert same.cross_entropy == pytest.approx(probe.cross_entropy, rel=1e-3)


def test_the_seed_decides_everything():
    features, labels, bias = draw(10, 3, 4)
    one, two, other = (
        lnl_ext.audit(features, labels, bias, seed=seed, **QUICK).to_dict() for seed in (1, 1, 2)
    )
    assert one == two
    assert one["biases"] != other["biases"]


def test_report_as_data_text_and_figure(tmp_path):
    features, labels, bias = draw(11, 2, 3)
    report = lnl_ext.audit(
        features, labels, {"site": bias, "sex": labels}, predictions=labels, **QUICK
    )
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored["biases"]["site"]["probes"]["mlp"]["accuracy"] == (
        report.biases["site"].probes["mlp"].accuracy
    )
    assert len(stored["biases"]["site"]["groups"]["groups"]) == 6
    text = report.to_markdown()
    assert "## site" in text
    assert "## sex" in text
    assert f"| linear | {report.biases['site'].probes['linear'].accuracy:.3f} (" in text
    report.plot(tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probes": ["tree"]}, "probes is .*expected some of"),
        ({"probes": []}, "probes is"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"permutations": 0}, "permutations is 0"),
        ({"test": 0.9}, "validation=0.2 and test=0.9"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels has shape \(3,\), expected 900"),
        ({"bias": torch.zeros(SAMPLES, 2, dtype=torch.long)}, r"bias\['bias'\] has shape \(900, 2"),
        ({"bias": {}}, "bias is empty"),
        ({"bias": torch.full((SAMPLES,), -1)}, "without any known value"),
        ({"model": torch.full((SAMPLES, 4), math.nan)}, "not all finite"),
        ({"model": torch.zeros(SAMPLES)}, "features have shape"),
        ({"model": nn.Identity()}, "inputs is missing"),
        ({"inputs": torch.zeros(SAMPLES, 4)}, "inputs is given"),
        ({"predictions": torch.zeros(SAMPLES)}, "predictions has shape"),
        ({"aligned": torch.zeros(SAMPLES)}, "aligned has dtype"),
    ],
)
def test_wrong_arguments(changes, message):
    features, labels, bias = draw(12, 2, 3)
    arguments = {"model": features, "labels": labels, "bias": bias} | changes
    with pytest.raises(ValueError, match=message):
        lnl_ext.audit(**arguments)


def test_float_bias_is_refused():
    features, labels, bias = draw(12, 2, 3)
    with pytest.raises(TypeError, match=r"bias\['bias'\] has dtype torch.float32"):
        lnl_ext.audit(features, labels, bias.float())


def test_every_label_is_divided_alike():
    labels = torch.randint(7, (1003,), generator=torch.Generator().manual_seed(0))
    split = _split(labels, 0.2, 0.3, 0)
    assert torch.cat(split).sort().values.tolist() == list(range(1003))
    for label in range(7):
        size = (labels == label).sum().item()
        shares = [(labels[part] == label).sum().item() / size for part in split]
        assert shares == pytest.approx([0.5, 0.2, 0.3], abs=2.1 / size)


def test_bootstrap_intervals_of_means():
    values = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = values.mean(0).tolist()
    intervals = bootstrap_intervals(
        lambda times: (times @ values / times.sum(1, keepdim=True)).T,
        400,
        tuple(means),
        Sampling(1, 4000, 0.9, 0),
    )
    for mean, deviation, (low, high) in zip(means, values.std(0).tolist(), intervals, strict=True):
        half = 1.645 * deviation / 20  # of the normal distribution
        assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.1)


def test_entropy_is_corrected_for_the_number_of_samples():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(8, (3000, 50), generator=generator)
    counts = nn.functional.one_hot(drawn, 8).sum(1).double()
    assert entropy_of_counts(counts).mean().item() == pytest.approx(math.log(8), abs=0.01)
    assert entropy_of_counts(torch.tensor([5.0, 0.0])).item() == 0


@pytest.mark.parametrize("labels", [None, torch.arange(40) % 3])
def test_permutation_test_is_uniform_when_nothing_is_there(labels):
    generator = torch.Generator().manual_seed(0)
    p_values = []
    for seed in range(200):
        guess = torch.randn(40, 3, 1, 1, generator=generator)
        target = torch.randint(3, (40, 1, 1), generator=generator)
        if labels is not None:  # both follow the label, and nothing else
            guess = guess + 3 * nn.functional.one_hot(labels, 3)[:, :, None, None]
            target = torch.where(target == 0, labels[:, None, None], target)
        p_values.append(
            permutation_test(guess.log_softmax(1), target, labels, Sampling(39, 1, 0.9, seed))
        )
    # Kolmogorov-Smirnov distance of 200 uniform values: above 0.096 once in twenty.
    ordered = torch.tensor(p_values).sort().values
    distance = (ordered - torch.arange(1, 201) / 200).abs().max().item()
    assert distance < 0.096 + 1 / 40


def test_p_values_are_those_of_the_definition():
    """Every exchange of the samples is counted, where there are few."""
    generator = torch.Generator().manual_seed(2)
    guess = torch.randn(6, 3, 2, 4, generator=generator).log_softmax(1)
    target = torch.randint(3, (6, 2, 4), generator=generator)
    target[0, 0, 1] = target[3, 1] = -100
    labels = torch.tensor([0, 1, 0, 1, 1, 1])

    def cross_entropy(rows):
        return nn.functional.nll_loss(guess, target[list(rows)], reduction="sum").item()

    for strata in (None, labels):
        allowed = [
            rows
            for rows in itertools.permutations(range(6))
            if strata is None or torch.equal(strata[list(rows)], strata)
        ]
        as_low = sum(cross_entropy(rows) <= cross_entropy(range(6)) + 1e-6 for rows in allowed)
        found = permutation_test(guess, target, strata, Sampling(1000, 1, 0.9, 0))
        assert found == pytest.approx(as_low / len(allowed))
