"""The networks of all ways, cut at the feature layer."""

from __future__ import annotations

from torch import nn

from lnl_ext.models.small import conv_block, small_network

# Of each strided convolution: output channels and stride.
_STRIDED = ((24, 2), (48, 2), (64, 1), (96, 2), (128, 2))


def network(
    inputs: tuple[int, ...], classes: int, name: str = "strided"
) -> tuple[nn.Module, nn.Linear]:
    """Return f and g for inputs of this shape, ``(3, H, W)`` or ``(D,)``.

    f gives features ``(N, width)``, the classifier's input, in which the bias is measured and
    unlearned: of images 128 pooled ones, of a table a layer of 64. g gives logits ``(N, classes)``
    from them. For images ``name`` is ``"strided"``, five convolutions of which four have stride 2,
    or ``"small"``, the package's small network.
    """
    if len(inputs) == 1:
        features = nn.Sequential(nn.Linear(inputs[0], 64), nn.ReLU())
        return features, nn.Linear(64, classes)
    if name == "small":
        *body, last = small_network(classes).children()
        assert isinstance(last, nn.Linear)
        return nn.Sequential(*body), last
    channels = [3, *(outputs for outputs, _ in _STRIDED)]
    layers: list[nn.Module] = [
        conv_block(before, outputs, stride)
        for before, (outputs, stride) in zip(channels, _STRIDED, strict=False)
    ]
    features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return features, nn.Linear(channels[-1], classes)
