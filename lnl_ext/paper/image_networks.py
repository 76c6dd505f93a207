"""Networks and bias heads for photographs, and torchvision's networks split at a tap."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

__all__ = [
    "ARCHITECTURES",
    "GlobalHead",
    "MapHead",
    "SplitNetwork",
    "build_network",
]

#: Architectures with their default tap.
ARCHITECTURES = {"small": "block2", "resnet18": "layer3"}
_SMALL_CHANNELS = (24, 48, 64, 96, 128)
_RESNET_LAYERS = ("layer1", "layer2", "layer3", "layer4", "avgpool")


class SplitNetwork(NamedTuple):
    """A network split at the tap: g(f(images)) are the label's logits."""

    features: nn.Module
    """f: images to the tap ``(N, channels, H / stride, W / stride)``."""
    classifier: nn.Module
    """g: the tap to logits."""
    channels: int
    stride: int
    """1 where the tap has a single position."""


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _small(classes: int) -> nn.Sequential:
    """Five convolutions for images of about 96 pixels on a CPU; 290,000 parameters."""
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = 3
    for number, (outputs, stride) in enumerate(
        zip(_SMALL_CHANNELS, (2, 2, 1, 2, 2), strict=True), 1
    ):
        blocks[f"block{number}"] = _block(inputs, outputs, stride)
        inputs = outputs
    blocks["avgpool"] = nn.AdaptiveAvgPool2d(1)
    blocks["flatten"] = nn.Flatten()
    blocks["fc"] = nn.Linear(inputs, classes)
    return nn.Sequential(blocks)


def build_network(
    architecture: str, classes: int, *, tap: str | None = None, weights: str = "none"
) -> SplitNetwork:
    """Make a network and split it after a layer.

    Parameters
    ----------
    architecture
        One of `ARCHITECTURES`: ``"small"``, or torchvision's ``"resnet18"``.
    classes
        Of the label.
    tap
        The layer after which the features are taken: ``"block1"`` to ``"block5"``, or
        ``"layer1"`` to ``"layer4"`` or ``"avgpool"``.
    weights
        ``"none"``, ``"imagenet"`` (torchvision downloads them), or the path of a state_dict of the
        whole network; a last layer of another number of classes is left as it is.

    Raises
    ------
    ValueError
        The architecture or tap is unknown, or the weights do not fit.
    FileNotFoundError
        There is no file of weights.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture is {architecture!r}, expected {' or '.join(ARCHITECTURES)}")
    tap = ARCHITECTURES[architecture] if tap is None else tap
    if architecture == "small":
        network: nn.Module = _small(classes)
        taps: tuple[str, ...] = tuple(f"block{n + 1}" for n in range(len(_SMALL_CHANNELS)))
    else:
        network = torchvision.models.resnet18(num_classes=classes)
        taps = _RESNET_LAYERS
    if tap not in taps:
        raise ValueError(f"tap is {tap!r}, expected one of {', '.join(taps)}")
    if weights != "none":
        _load_weights(network, architecture, weights)
    features = nn.Sequential(
        OrderedDict(until=create_feature_extractor(network, {tap: "tap"}), only=_Only("tap"))
    )
    children = list(network.named_children())
    after = [name for name, _ in children].index(tap) + 1
    rest = OrderedDict(children[after:])
    if architecture == "resnet18":  # its forward flattens without a module
        last = rest.pop("fc")
        rest |= {"flatten": nn.Flatten(), "fc": last}
    with torch.no_grad():
        training = features.training
        shape = features.eval()(torch.zeros(1, 3, 64, 64)).shape
        features.train(training)
    # Features that are pooled to one position have no map whose cells an image must fill.
    stride = 64 // shape[2] if shape[2] > 1 else 1
    return SplitNetwork(features, nn.Sequential(rest), shape[1], stride)


class _Only(nn.Module):
    """The one output of a feature extractor."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, outputs: dict[str, Tensor]) -> Tensor:
        return outputs[self.name]


def _load_weights(network: nn.Module, architecture: str, weights: str) -> None:
    if weights == "imagenet":
        if architecture != "resnet18":
            raise ValueError(f"weights is 'imagenet', which architecture {architecture!r} lacks")
        chosen = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
        state = chosen.get_state_dict(progress=True, check_hash=True)
    else:
        if not os.path.isfile(weights):
            raise FileNotFoundError(f"weights: {weights}: no such file")
        state = torch.load(weights, map_location="cpu", weights_only=True)
    own = network.state_dict()
    for name in ("fc.weight", "fc.bias"):
        if name in state and state[name].shape != own[name].shape:
            state[name] = own[name]
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"weights {weights} do not fit {architecture}: {error}") from error


class MapHead(nn.Sequential):
    """Two convolutions: a prediction at every position, as the paper's colour heads make.

    ``(N, channels, H, W)`` to ``(N, heads * classes, H, W)``.
    """

    def __init__(self, channels: int, classes: int, heads: int, width: int = 64) -> None:
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(channels, width, 3, padding=1),
                bn=nn.BatchNorm2d(width),
                relu=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(width, heads * classes, 3, padding=1),
            )
        )


class GlobalHead(nn.Sequential):
    """Predictions of the whole image from pooled features.

    ``(N, channels, H, W)`` to ``(N, heads * classes)``: two convolutions that see what a
    classifier would, or with ``linear=True`` the paper's one linear layer on the average.
    """

    def __init__(
        self, channels: int, classes: int, heads: int = 1, width: int = 64, linear: bool = False
    ) -> None:
        layers: list[nn.Module] = []
        if not linear:
            layers = [_block(channels, width, 2), _block(width, width, 2)]
        last = nn.Linear(channels if linear else width, heads * classes)
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
