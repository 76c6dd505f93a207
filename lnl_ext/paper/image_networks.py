"""Networks, split at the feature layer, and bias heads for photographs."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from torch import nn

from lnl_ext.models.backbones import build_network, feature_shape, split_network
from lnl_ext.models.small import conv_block
from lnl_ext.models.weights import load_weights

__all__ = [
    "ARCHITECTURES",
    "GlobalHead",
    "MapHead",
    "SplitNetwork",
    "photo_network",
]

#: Architectures with their default feature layer.
ARCHITECTURES = {"small": "block2", "resnet18": "layer3", "efficientnet_lite0": "_blocks.10"}
_WIDTH = 64  # channels inside a head
_SIDE = 64  # of an image by which the stride of the features is measured


class SplitNetwork(NamedTuple):
    """A network split at the feature layer: g(f(images)) are the label's logits."""

    features: nn.Module
    """f: images to features ``(N, channels, H / stride, W / stride)``."""
    classifier: nn.Module
    """g: features to logits."""
    channels: int
    stride: int
    """1 where the features have a single position."""


def photo_network(
    arch: str, classes: int, *, feature_layer: str | None = None, weights: str = "none"
) -> SplitNetwork:
    """Make a network and split it after a layer.

    Parameters
    ----------
    arch
        As :func:`lnl_ext.models.backbones.build_network` takes it.
    classes
        Of the label.
    feature_layer
        The layer after which the features are taken, by default that of `ARCHITECTURES`.
    weights
        As :func:`lnl_ext.models.weights.load_weights` takes them.

    Raises
    ------
    UserError
        The architecture or the layer is unknown, or the weights are missing or do not fit.
    """
    network = build_network(arch, classes)
    load_weights(network, arch, weights)
    parts = split_network(
        network, ARCHITECTURES.get(arch) if feature_layer is None else feature_layer
    )
    channels, *size = feature_shape(parts.features, _SIDE)
    # Features that are pooled to one position have no map whose cells an image must fill.
    stride = _SIDE // size[0] if size and size[0] > 1 else 1
    return SplitNetwork(parts.features, parts.classifier, channels, stride)


class MapHead(nn.Sequential):
    """Two convolutions: a prediction at every position, as the paper's colour heads make.

    ``(N, channels, H, W)`` to ``(N, heads * classes, H, W)``.
    """

    def __init__(self, channels: int, classes: int, heads: int) -> None:
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(channels, _WIDTH, 3, padding=1),
                bn=nn.BatchNorm2d(_WIDTH),
                relu=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(_WIDTH, heads * classes, 3, padding=1),
            )
        )


class GlobalHead(nn.Sequential):
    """Predictions of the whole image from pooled features.

    ``(N, channels, H, W)`` to ``(N, heads * classes)``: two convolutions that see what a
    classifier would, or with ``linear=True`` the paper's one linear layer on the average.
    """

    def __init__(self, channels: int, classes: int, heads: int = 1, linear: bool = False) -> None:
        layers: list[nn.Module] = []
        if not linear:
            layers = [conv_block(channels, _WIDTH, 2), conv_block(_WIDTH, _WIDTH, 2)]
        last = nn.Linear(channels if linear else _WIDTH, heads * classes)
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
