"""The networks of the coloured-MNIST benchmark: feature network, classifier and colour heads."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from lnl_ext.adversary.heads import PooledMapHead

__all__ = [
    "COLOR_BINS",
    "TAP_CHANNELS",
    "DigitNetwork",
    "GlobalColorHead",
    "PixelColorHead",
    "SeparatePixelColorHeads",
]

#: Bins per colour channel: ``value // 32``.
COLOR_BINS = 8
#: Channels of the features (N, 32, 14, 14), the input of the bias heads.
TAP_CHANNELS = 32


class DigitNetwork(nn.Module):
    """The network of the paper's authors, split at the feature layer.

    Parameters
    ----------
    num_classes
        Number of label classes.

    Attributes
    ----------
    features : nn.Sequential
        f: ``(N, 3, 28, 28)`` normalised images to features ``(N, 32, 14, 14)``.
    classifier : nn.Sequential
        g: features to label logits ``(N, num_classes)``.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                bn0=nn.BatchNorm2d(3),
                conv1=nn.Conv2d(3, 32, 5, padding=2),
                relu1=nn.ReLU(inplace=True),
                maxpool=nn.MaxPool2d(3, stride=2, padding=1),
                conv2=nn.Conv2d(32, TAP_CHANNELS, 3, padding=1),
                relu2=nn.ReLU(inplace=True),
            )
        )
        self.classifier = nn.Sequential(
            OrderedDict(
                conv3=nn.Conv2d(TAP_CHANNELS, 64, 3, stride=2, padding=1),
                relu3=nn.ReLU(inplace=True),
                conv4=nn.Conv2d(64, 64, 3, padding=1),
                relu4=nn.ReLU(inplace=True),
                avgpool=nn.AvgPool2d(7),
                flatten=nn.Flatten(),
                fc=nn.Linear(64, num_classes),
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))

    def forward(self, images: Tensor) -> Tensor:
        """Give label logits ``(N, num_classes)`` for images ``(N, 3, 28, 28)``."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


class PixelColorHead(nn.Sequential):
    """The paper's three per-pixel colour heads as one module: one wide and one grouped convolution.

    ``(N, 32, 14, 14)`` to ``(N, 3 * bins, 14, 14)``, channel after channel: use it with
    ``heads=3``. The same function as :class:`SeparatePixelColorHeads`, about twice as fast.
    """

    def __init__(self, in_channels: int = TAP_CHANNELS, bins: int = COLOR_BINS) -> None:
        width = 3 * in_channels
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, width, 3, padding=1),
                bn=nn.BatchNorm2d(width),
                relu=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(width, 3 * bins, 3, padding=1, groups=3),
            )
        )


class SeparatePixelColorHeads(nn.Module):
    """Three per-pixel colour heads, one a channel, as the paper's authors run them.

    ``(N, 32, 14, 14)`` to ``(N, 3 * bins, 14, 14)``: use it with ``heads=3``.
    """

    def __init__(self, in_channels: int = TAP_CHANNELS, bins: int = COLOR_BINS) -> None:
        super().__init__()
        self.channels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(in_channels, in_channels, 3, padding=1),
                nn.BatchNorm2d(in_channels),
                nn.ReLU(inplace=True),
                nn.Conv2d(in_channels, bins, 3, padding=1),
            )
            for _ in range(3)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Give logits ``(N, 3 * bins, 14, 14)`` for features ``(N, in_channels, 14, 14)``."""
        return torch.cat([head(features) for head in self.channels], dim=1)


class GlobalColorHead(PooledMapHead):
    """A head that pools over positions as the classifier does, and so sees what it sees.

    ``(N, 32, 14, 14)`` to ``(N, heads * bins)``: ``heads`` colour predictions per image.
    """

    def __init__(
        self,
        in_channels: int = TAP_CHANNELS,
        bins: int = COLOR_BINS,
        heads: int = 3,
        width: int = 64,
    ) -> None:
        super().__init__(in_channels, heads * bins, width)
