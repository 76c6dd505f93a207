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
    default_tap,
    output_layer,
    split_network,
    tap_shape,
)

SIZES = {
    "resnet18": 32,
    "shufflenet_v2_x0_5": 32,
    "mobilenet_v3_small": 32,
    "squeezenet1_1": 64,
    "regnet_y_400mf": 32,
    "googlenet": 64,
}
TAPS = {  # what goes into the last layer, before dropout
    "resnet18": ("flatten", (512,)),
    "shufflenet_v2_x0_5": ("mean", (1024,)),
    "mobilenet_v3_small": ("classifier.1", (1024,)),
    "squeezenet1_1": ("features.12.cat", (512, 3, 3)),
    "regnet_y_400mf": ("flatten", (440,)),
    "googlenet": ("flatten", (1024,)),
}


@pytest.mark.parametrize("arch", SIZES)
def test_halves_are_the_network_with_its_parameters(arch: str) -> None:
    torch.manual_seed(0)
    network = build_network(arch, 7).eval()
    halves = split_network(network)
    images = torch.randn(3, 3, SIZES[arch], SIZES[arch])
    with torch.no_grad():
        assert torch.equal(halves.classifier(halves.features(images)), network(images))
    assert (halves.tap, tap_shape(halves.features, SIZES[arch])) == TAPS[arch]
    own = dict(network.named_parameters())
    for half in (halves.features, halves.classifier):
        for name, parameter in half.named_parameters():
            assert parameter is own[name]
    # In training mode too: batch norm learns its statistics, dropout drops.
    halves.features.train()
    halves.classifier.train()
    assert halves.classifier(halves.features(images)).shape == (3, 7)
    assert network.state_dict()[f"{output_layer(network)}.weight"].shape[0] == 7


@pytest.mark.parametrize("tap", ["layer1", "layer2.0.relu_1", "bn1", "avgpool"])
def test_any_layer_that_everything_goes_through_can_be_the_tap(tap: str) -> None:
    network = build_network("resnet18", 3).eval()
    halves = split_network(network, tap)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        seen = halves.features(images)
        before = seen.clone()
        assert torch.equal(halves.classifier(seen), network(images))
        assert torch.equal(seen, before)  # the ReLU after bn1 works in place


def test_a_wrong_tap_lists_the_possible_ones() -> None:
    network = build_network("resnet18", 3)
    with pytest.raises(
        UserError, match=r"tap 'layer5': no such layer. Near it: .*layer4.*Possible"
    ):
        split_network(network, "layer5")
    with pytest.raises(UserError, match=r"tap 'layer2.0.conv1': something goes past it"):
        split_network(network, "layer2.0.conv1")
    assert default_tap(network) == "flatten"


def test_wrong_architecture_and_size_are_named() -> None:
    with pytest.raises(UserError, match=r"arch is 'resnet19', expected .* such as resnet18"):
        build_network("resnet19", 3)
    features = split_network(build_network("alexnet", 3)).features
    with pytest.raises(UserError, match="does not take images of 16 x 16 pixels"):
        tap_shape(features, 16)


def test_a_wrong_size_is_said_without_the_trace_of_torch_fx(
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 8)
    with pytest.raises(UserError, match="does not take images of 64 x 64 pixels"):
        tap_shape(split_network(network).features, 64)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shape", [(16,), (5, 16), (16, 6, 6)])
def test_heads_fit_features_of_every_shape(shape: tuple[int, ...]) -> None:
    assert bias_head(shape, 4)(torch.randn(3, *shape)).shape == (3, 4)
    with pytest.raises(ValueError, match="expected"):
        bias_head((1, 2, 3, 4), 4)


def test_a_network_without_a_layer_to_cut_at_says_so() -> None:
    with pytest.raises(UserError, match="no linear or convolutional layer"):
        split_network(nn.Sequential(nn.ReLU()))
