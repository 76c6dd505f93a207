"""Networks cut in two are the networks they were cut from."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from lnl_ext.adversary.heads import bias_head
from lnl_ext.errors import UserError
from lnl_ext.models.backbones import (
    build_network,
    default_feature_layer,
    feature_shape,
    output_layer,
    split_network,
)

SIZES = {
    "resnet18": 32,
    "shufflenet_v2_x0_5": 32,
    "mobilenet_v3_small": 32,
    "squeezenet1_1": 64,
    "regnet_y_400mf": 32,
    "googlenet": 64,
}
FEATURES = {  # what goes into the last layer, before dropout
    "resnet18": ("flatten", (512,)),
    "shufflenet_v2_x0_5": ("mean", (1024,)),
    "mobilenet_v3_small": ("classifier.1", (1024,)),
    "squeezenet1_1": ("features.12.cat", (512, 3, 3)),
    "regnet_y_400mf": ("flatten", (440,)),
    "googlenet": ("flatten", (1024,)),
}


@pytest.mark.parametrize("arch", SIZES)
def test_the_parts_are_the_network_with_its_parameters(arch: str) -> None:
    torch.manual_seed(0)
    network = build_network(arch, 7).eval()
    parts = split_network(network)
    images = torch.randn(3, 3, SIZES[arch], SIZES[arch])
    with torch.no_grad():
        assert torch.equal(parts.classifier(parts.features(images)), network(images))
    assert (parts.feature_layer, feature_shape(parts.features, SIZES[arch])) == FEATURES[arch]
    own = dict(network.named_parameters())
    for part in (parts.features, parts.classifier):
        for name, parameter in part.named_parameters():
            assert parameter is own[name]
    # In training mode too: batch norm learns its statistics, dropout drops.
    parts.features.train()
    parts.classifier.train()
    assert parts.classifier(parts.features(images)).shape == (3, 7)
    assert network.state_dict()[f"{output_layer(network)}.weight"].shape[0] == 7


@pytest.mark.parametrize("feature_layer", ["layer1", "layer2.0.relu_1", "bn1", "avgpool"])
def test_any_layer_that_everything_goes_through_can_be_chosen(
    feature_layer: str,
) -> None:
    network = build_network("resnet18", 3).eval()
    parts = split_network(network, feature_layer)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        seen = parts.features(images)
        before = seen.clone()
        assert torch.equal(parts.classifier(seen), network(images))
        assert torch.equal(seen, before)  # the ReLU after bn1 works in place


def test_a_wrong_feature_layer_lists_the_possible_ones() -> None:
    network = build_network("resnet18", 3)
    with pytest.raises(
        UserError, match=r"feature layer 'layer5': no such layer. Near it: .*layer4.*Possible"
    ):
        split_network(network, "layer5")
    with pytest.raises(UserError, match=r"feature layer 'layer2.0.conv1': something goes past it"):
        split_network(network, "layer2.0.conv1")
    assert default_feature_layer(network) == "flatten"


def test_wrong_architecture_and_size_are_named() -> None:
    with pytest.raises(UserError, match=r"arch is 'resnet19', expected .* such as resnet18"):
        build_network("resnet19", 3)
    features = split_network(build_network("alexnet", 3)).features
    with pytest.raises(UserError, match="does not take images of 16 x 16 pixels"):
        feature_shape(features, 16)


def test_a_wrong_size_is_said_without_the_trace_of_torch_fx(
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 8)
    with pytest.raises(UserError, match="does not take images of 64 x 64 pixels"):
        feature_shape(split_network(network).features, 64)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shape", [(16,), (5, 16), (16, 6, 6)])
def test_heads_fit_features_of_every_shape(shape: tuple[int, ...]) -> None:
    assert bias_head(shape, 4)(torch.randn(3, *shape)).shape == (3, 4)
    with pytest.raises(ValueError, match="expected"):
        bias_head((1, 2, 3, 4), 4)


def test_a_network_without_a_layer_to_cut_at_says_so() -> None:
    with pytest.raises(UserError, match="no linear or convolutional layer"):
        split_network(nn.Sequential(nn.ReLU()))
