"""Bias heads for features of any shape, for training and for probes."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from lnl_ext.paper.networks import GlobalColorHead

__all__ = ["bias_head"]


class _TokenMean(nn.Module):
    """Mean over the tokens (N, L, D) of a transformer."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


def bias_head(shape: tuple[int, ...], classes: int, width: int = 128) -> nn.Module:
    """Make a head that predicts a bias from features.

    Two layers on a vector (D,) or on the mean of tokens (L, D); two convolutions and a mean over
    positions on a map (C, H, W), as a head that pools sees what a classifier that pools sees.

    Parameters
    ----------
    shape
        Of the features of one sample.
    classes
        Number of bias classes.
    width
        Units of the hidden layer.

    Raises
    ------
    ValueError
        ``shape`` has no dimension, or more than three.
    """
    if len(shape) == 3:
        return GlobalColorHead(shape[0], bins=classes, heads=1, width=width)
    if len(shape) not in (1, 2):
        raise ValueError(f"shape is {shape}, expected (D,), (L, D) or (C, H, W)")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if len(shape) == 2:
        layers["mean"] = _TokenMean()
    layers["fc1"] = nn.Linear(shape[-1], width)
    layers["bn1"] = nn.BatchNorm1d(width)  # the scale of the features is not known
    layers["relu1"] = nn.ReLU(inplace=True)
    layers["fc2"] = nn.Linear(width, classes)
    return nn.Sequential(layers)
