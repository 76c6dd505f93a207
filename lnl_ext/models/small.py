"""A small convolutional network, for images of about 96 pixels on a CPU."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

__all__ = ["conv_block", "small_network"]

# Of each block: output channels and stride.
_BLOCKS = ((24, 2), (48, 2), (64, 1), (96, 2), (128, 2))


def conv_block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Make a 3x3 convolution with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def small_network(classes: int) -> nn.Sequential:
    """Make five convolutions, ``block1`` to ``block5``, and a linear layer; 290,000 parameters.

    Images ``(N, 3, H, W)`` to logits ``(N, classes)``.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = 3
    for number, (outputs, stride) in enumerate(_BLOCKS, 1):
        layers[f"block{number}"] = conv_block(inputs, outputs, stride)
        inputs = outputs
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(inputs, classes)
    return nn.Sequential(layers)
