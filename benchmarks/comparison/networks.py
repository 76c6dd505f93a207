"""The networks of all ways, cut at the feature layer."""

from __future__ import annotations

from torch import nn

from lnl_ext.models.small import small_network


def network(inputs: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Linear]:
    """Return f and g for inputs of this shape, ``(3, H, W)`` or ``(D,)``.

    f gives features ``(N, width)``, the classifier's input, in which the bias is measured and
    unlearned: of images the 128 pooled ones of the package's small network, of a table a layer of
    64. g gives logits ``(N, classes)`` from them.
    """
    if len(inputs) == 1:
        features = nn.Sequential(nn.Linear(inputs[0], 64), nn.ReLU())
        return features, nn.Linear(64, classes)
    *body, last = small_network(classes).children()
    assert isinstance(last, nn.Linear)
    return nn.Sequential(*body), last
