"""A small convolutional network, for images of about 48 pixels on a CPU."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

__all__ = ["conv_block", "small_network"]

_CHANNELS = (24, 48, 96, 128)  # of the blocks


def conv_block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Make a 3x3 convolution with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def small_network(classes: int) -> nn.Sequential:
    """Make four convolutions with max-pooling, ``block1`` to ``block4``, and a linear layer.

    Images ``(N, 3, H, W)`` to logits ``(N, classes)``; 160,000 parameters.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = 3
    for number, outputs in enumerate(_CHANNELS, 1):
        layers[f"block{number}"] = conv_block(inputs, outputs).append(nn.MaxPool2d(2))
        inputs = outputs
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(inputs, classes)
    return nn.Sequential(layers)
