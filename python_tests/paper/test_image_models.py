"""A network split at a layer is the network."""

from __future__ import annotations

import pytest
import torch
import torchvision

from lnl_ext.errors import UserError
from lnl_ext.paper.image_networks import GlobalHead, MapHead, photo_network


@pytest.mark.parametrize("feature_layer", ["layer1", "layer2", "layer3", "layer4", "avgpool"])
def test_both_parts_are_torchvisions_network(tmp_path, feature_layer):
    torch.manual_seed(0)
    whole = torchvision.models.resnet18(num_classes=2).eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pt")
    split = photo_network(
        "resnet18", 2, feature_layer=feature_layer, weights=str(tmp_path / "weights.pt")
    )
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        seen = split.features.eval()(images)
        torch.testing.assert_close(split.classifier.eval()(seen), whole(images))
    assert seen.shape[1] == split.channels
    assert split.stride == (1 if feature_layer == "avgpool" else 64 // seen.shape[2])
    shared = {id(p) for p in split.features.parameters()} & {
        id(p) for p in split.classifier.parameters()
    }
    assert not shared


def test_a_last_layer_of_other_classes_is_left_new(tmp_path):
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), tmp_path / "five.pt")
    split = photo_network("resnet18", 2, weights=str(tmp_path / "five.pt"))
    assert split.classifier.get_submodule("fc").out_features == 2


@pytest.mark.parametrize("feature_layer", [f"block{n}" for n in range(1, 5)])
def test_the_small_network_and_its_heads(feature_layer):
    split = photo_network("small", 2, feature_layer=feature_layer)
    seen = split.features(torch.randn(2, 3, 80, 80))
    assert seen.shape == (2, split.channels, 80 // split.stride, 80 // split.stride)
    assert split.classifier(seen).shape == (2, 2)
    assert MapHead(split.channels, 8, 3)(seen).shape == (2, 24, *seen.shape[2:])
    for linear in (True, False):
        assert GlobalHead(split.channels, 12, 2, linear=linear)(seen).shape == (2, 24)


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"arch is 'vgg', expected small, .* or .*vgg11"):
        photo_network("vgg", 2)
    with pytest.raises(UserError, match=r"layer 'layer9': no such layer. Near it: .*layer1"):
        photo_network("resnet18", 2, feature_layer="layer9")
    with pytest.raises(UserError, match="weights is 'imagenet', which arch 'small' lacks"):
        photo_network("small", 2, weights="imagenet")
    with pytest.raises(UserError, match=r"no weights at .*nothing\.pt"):
        photo_network("small", 2, weights=str(tmp_path / "nothing.pt"))
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt do not fit the network: the file lacks block1"):
        photo_network("small", 2, weights=str(tmp_path / "other.pt"))
