"""What the probes find does not depend on outliers, or on the features' unit or precision."""

import pytest
import torch
from torch import nn

import lnl_ext
from lnl_ext.measuring.scaling import Scaled

QUICK = {"permutations": 99, "resamples": 100, "probes": ["linear"]}


def leak():
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(300, 4, generator=generator)
    labels, bias = torch.randint(2, (2, 300), generator=generator)
    features = 0.1 * features
    features[:, 0] += bias
    return features, labels, bias


def with_outliers(value):
    def change(features, _):
        features[:5, 0] = value
        return features

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(with_outliers(1e3), id="outliers"),
        pytest.param(with_outliers(1e37), id="huge outliers"),
        pytest.param(lambda features, _: features * 1e-13, id="small unit"),
        pytest.param(lambda features, _: features * 1e30, id="large unit"),
        pytest.param(lambda _, bias: 1e9 + bias[:, None].double(), id="double precision"),
        pytest.param(lambda features, _: features.half(), id="half precision"),
    ],
)
def test_the_leak_is_found(change):
    features, labels, bias = leak()
    report = lnl_ext.audit(change(features, bias), labels, bias, **QUICK)
    probe = report.biases["bias"].probes["linear"]
    assert probe.information > 0.2
    assert probe.accuracy > 0.95
    assert probe.p_value == 0.01  # the smallest of 99


def squeezed(values):
    probe = Scaled(nn.Identity(), values, per_channel=False)
    return probe(values)


def test_what_far_values_tell_is_kept():
    values = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)) * 1e-3
    values[:40], values[40:80] = 100, 200
    result = squeezed(values)
    assert (result[40] - result[0]).item() > 1


def test_sparse_features_count():
    values = torch.zeros(1000, 2)
    values[:30, 0] = 1
    values[:30, 1] = 1
    values[500, 1] = 1e4
    result = squeezed(values)
    assert (result[0] - result[-1]).min().item() > 1


def test_a_constant_with_rounding_is_no_feature():
    values = torch.zeros(4000, 2, dtype=torch.float64)
    values[:, 0] = 5 + 2 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    values[:, 1] = 1e9
    values[::2, 1] += 1.2e-7  # one step
    assert (values[0, 1] != values[1, 1]).item()
    normal, constant = squeezed(values).unbind(1)
    assert torch.allclose(normal, ((values[:, 0] - 5) / 2).float(), atol=0.1)
    assert not constant.any()


def test_positions_of_a_channel_share_a_scale():
    features = torch.randn(50, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    features[:, 1] *= 100
    each = Scaled(nn.Identity(), features, per_channel=True)(features)
    assert each.std((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1], abs=1e-5)


def test_a_classifier_of_another_precision():
    features, labels, bias = leak()
    report = lnl_ext.audit(
        features.double(), labels, bias, classifier=nn.Linear(4, 2), **QUICK | {"permutations": 9}
    )
    assert report.accuracy is not None
