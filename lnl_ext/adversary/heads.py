"""Bias heads for features of any shape, for training and for probes."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

__all__ = ["PooledMapHead", "bias_head"]


class PooledMapHead(nn.Sequential):
    """Two convolutions, a mean over positions and a linear layer.

    ``(N, in_channels, H, W)`` to logits ``(N, classes)``. A head that pools over positions sees
    what a classifier that pools sees.

    Parameters
    ----------
    in_channels
        Channels of the features.
    classes
        Number of logits: classes, or the sum of those of all heads.
    width
        Channels of the convolutions.
    """

    def __init__(self, in_channels: int, classes: int, width: int = 64) -> None:
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, width, 3, stride=2, padding=1),
                bn1=nn.BatchNorm2d(width),
                relu1=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(width, width, 3, padding=1),
                bn2=nn.BatchNorm2d(width),
                relu2=nn.ReLU(inplace=True),
                avgpool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(width, classes),
            )
        )


class _TokenMean(nn.Module):
    """Mean over the tokens (N, L, D) of a transformer."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


def bias_head(
    shape: tuple[int, ...], classes: int, width: int = 128, sizes: tuple[int, ...] = (512, 512)
) -> nn.Module:
    """Make a head that predicts a bias from features.

    A perceptron on a vector (D,) or on the mean of tokens (L, D); a `PooledMapHead` on a map
    (C, H, W).

    Parameters
    ----------
    shape
        Of the features of one sample.
    classes
        Number of bias classes.
    width
        Channels of the convolutions.
    sizes
        Units of the perceptron's hidden layers.

    Raises
    ------
    ValueError
        ``shape`` has no dimension, or more than three.
    """
    if len(shape) == 3:
        return PooledMapHead(shape[0], classes, width)
    if len(shape) not in (1, 2):
        raise ValueError(f"shape is {shape}, expected (D,), (L, D) or (C, H, W)")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if len(shape) == 2:
        layers["mean"] = _TokenMean()
    before = shape[-1]
    for number, size in enumerate(sizes, 1):
        layers[f"fc{number}"] = nn.Linear(before, size)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
        before = size
    layers[f"fc{len(sizes) + 1}"] = nn.Linear(before, classes)
    return nn.Sequential(layers)
