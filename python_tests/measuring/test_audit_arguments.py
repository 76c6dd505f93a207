"""What an audit accepts, what it refuses, and how it says so."""

import json
import math
import resource
import sys

import numpy as np
import pytest
import torch
from nested import nested
from torch import nn

import lnl_ext
from lnl_ext.measuring.audit import TooFewSamplesError
from lnl_ext.measuring.audit import _predicted_classes as predicted_classes
from lnl_ext.measuring.evaluation import as_tensor

QUICK = {"permutations": 9, "resamples": 20, "probes": "linear"}
SAMPLES = 200


def draw(classes=2):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(SAMPLES, 4, generator=generator)
    labels = torch.randint(2, (SAMPLES,), generator=generator)
    return features, labels, torch.randint(classes, (SAMPLES,), generator=generator)


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (torch.zeros(SAMPLES, 1, dtype=torch.long), r"shape \(200, 1\) and dtype torch.int64"),
        (torch.zeros(SAMPLES, 2, dtype=torch.long), r"shape \(200, 2\) and dtype torch.int64"),
        (torch.zeros(SAMPLES, 1), "K >= 2"),
        (torch.zeros(SAMPLES, 2, 1), "K >= 2"),
        (torch.zeros(SAMPLES - 1, dtype=torch.long), r"classes \(200,\)"),
        (torch.zeros(SAMPLES - 1, 2), r"logits \(200, K\)"),
        (torch.full((SAMPLES, 2), math.nan), "not finite"),
        (torch.full((SAMPLES, 2), math.inf), "not finite"),
    ],
)
def test_wrong_predictions(predictions, message):
    with pytest.raises(ValueError, match=rf"predictions has .*{message}"):
        predicted_classes(torch.zeros(SAMPLES, 4), None, predictions, 64)


def test_a_classifier_with_one_output_is_refused():
    with pytest.raises(ValueError, match="the output of classifier has shape"):
        predicted_classes(torch.zeros(SAMPLES, 4), nn.Linear(4, 1), None, 64)


def test_numpy_arrays_are_as_good_as_tensors():
    features, labels, bias = draw()
    options = {"predictions": labels, "aligned": labels == bias}
    one = lnl_ext.audit(features, labels, bias, **options, **QUICK)
    arrays = {name: values.numpy() for name, values in options.items()}
    two = lnl_ext.audit(features.numpy(), labels.numpy(), bias.numpy(), **arrays, **QUICK)
    three = lnl_ext.audit(
        nn.Identity(), labels, {"bias": bias.numpy()}, inputs=features.numpy(), **options, **QUICK
    )
    four = lnl_ext.audit(
        nn.Identity(), labels, bias, inputs=[(features.numpy(), None)], **options, **QUICK
    )
    assert one.to_dict() == two.to_dict() == three.to_dict() == four.to_dict()


def test_arrays_that_torch_cannot_share():
    array = np.arange(6.0)[::-1]
    array.flags.writeable = False
    assert as_tensor("array", array).tolist() == array.tolist()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"aligned": [True] * SAMPLES}, TypeError, "aligned is a list, expected a Tensor or"),
        ({"predictions": [0] * SAMPLES}, TypeError, "predictions is a list"),
        ({"aligned": np.zeros(3, bool)}, ValueError, r"shape \(3,\), expected torch.bool and"),
        (
            {"bias": np.array(["m", "f"] * (SAMPLES // 2))},
            TypeError,
            r"bias\['bias'\] has dtype <U1, expected numbers",
        ),
        ({"probes": "tree"}, ValueError, "probes is 'tree', expected some of"),
        ({"head": nn.Linear(4, 1)}, ValueError, r"head gives logits of shape .*at least 2 classes"),
        ({"model": nn.Identity(), "inputs": [{"x": 1}]}, TypeError, "a batch of inputs is a dict"),
        ({"model": nn.LSTM(4, 4), "inputs": torch.zeros(9, 4)}, TypeError, "model gives a tuple"),
    ],
)
def test_clear_messages(changes, error, message):
    features, labels, bias = draw()
    arguments = {"model": features, "labels": labels, "bias": bias} | QUICK | changes
    with pytest.raises(error, match=message):
        lnl_ext.audit(**arguments)


def test_a_head_of_more_classes_than_occur():
    features, labels, bias = draw()
    report = lnl_ext.audit(features, labels, 2 * bias, head=nn.Linear(4, 3), **QUICK)
    assert list(report.biases["bias"].probes) == ["linear", "head"]


def test_the_classes_that_occur_are_counted():
    features, labels, bias = draw()
    named = {"usual": bias, "five": bias * 0 + 5, "odd": torch.where(bias == 1, 2_000_000, 255)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = lnl_ext.audit(features, labels, named, predictions=labels, **QUICK)
    # Kilobytes; a column for each number up to the largest takes gigabytes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
    usual, five, odd = report.biases.values()
    assert (usual.class_names, five.class_names, odd.class_names) == ((0, 1), (5,), (255, 2000000))
    assert (five.classes, five.chance, five.majority, five.entropy) == (1, 1, 1, 0)
    assert (odd.chance, odd.majority, odd.entropy) == (usual.chance, usual.majority, usual.entropy)
    assert odd.probes == usual.probes
    assert {group for _, group in odd.groups.accuracy} == {255, 2000000}
    text = report.to_markdown()
    assert "\n2 classes, H(b)" in text
    assert "\n1 classes (5), H(b)" in text
    assert "\n2 classes (255, 2000000), H(b)" in text


def test_few_known_targets():
    features, labels, bias = draw()
    bias[20:] = -100
    report = lnl_ext.audit(features, labels, bias, **QUICK | {"resamples": 500})
    probe = report.biases["bias"].probes["linear"]
    for interval in (probe.accuracy_interval, probe.information_interval):
        assert all(map(math.isfinite, interval))
    json.dumps(report.to_dict(), allow_nan=False)
    bias[12:] = -100
    with pytest.raises(TooFewSamplesError, match="known of one test sample"):
        lnl_ext.audit(features, labels, bias, **QUICK)


def test_heads_with_few_known_targets():
    features, labels, _ = draw()
    bias = torch.full((SAMPLES, 2), -1)
    bias[:, 0], bias[:12, 1] = labels, labels[:12]
    report = lnl_ext.audit(features, labels, bias, heads=2, **QUICK | {"resamples": 500})
    json.dumps(report.to_dict(), allow_nan=False)
    assert all(map(math.isfinite, report.biases["bias"].probes["linear"].information_interval))


def test_logits_that_are_nan():
    class Broken(nn.Linear):
        def forward(self, features):
            return super().forward(features) * math.nan

    features, labels, bias = draw()
    with pytest.raises(ValueError, match="head gives logits that are NaN"):
        lnl_ext.audit(features, labels, bias, head=Broken(4, 2), **QUICK)


@pytest.mark.parametrize("library", ["scipy", "sklearn"])
def test_a_missing_library_is_named(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"needs {library}: pip install 'lnl_ext\[train\]'"):
        lnl_ext.audit(*draw(), **QUICK)


@pytest.mark.parametrize("samples", range(6))
def test_a_handful_of_samples(samples):
    features, labels, bias = (values[:samples] for values in draw())
    with pytest.raises(
        TooFewSamplesError,
        match=rf"^{samples} samples are too few \(train \d, validation \d, test \d\), expected two",
    ):
        lnl_ext.audit(features, labels, bias)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_features(layout):
    features, labels, bias = draw()
    with pytest.raises(TypeError, match="is a nested tensor, expected a dense Tensor"):
        lnl_ext.audit(nested(features, layout), labels, bias)
