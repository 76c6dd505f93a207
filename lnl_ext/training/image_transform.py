"""What is done to images before the network, in training and in use alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Grey", "Transformed"]


class Grey:
    """Replaces the three channels of normalised images by their luma.

    The luma (ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B) is that of the image before
    normalisation, and is normalised again per channel.

    Parameters
    ----------
    mean, std : tuple of float
        The normalisation of the images, one number or one per channel.
    """

    _LUMA = (0.299, 0.587, 0.114)

    def __init__(self, mean: tuple[float, ...] = (0.0,), std: tuple[float, ...] = (1.0,)) -> None:
        self.mean = torch.tensor(mean).reshape(-1, 1, 1)
        self.std = torch.tensor(std).reshape(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Return images (N, 3, H, W) of the same normalisation, all channels grey."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images has shape {tuple(images.shape)}, expected (N, 3, H, W)")
        mean, std = self.mean.to(images), self.std.to(images)
        luma = images.new_tensor(self._LUMA).reshape(3, 1, 1)
        grey = ((images * std + mean) * luma).sum(1, keepdim=True).expand_as(images)
        return (grey - mean) / std


class Transformed(nn.Module):
    """A network behind a function of its images, such as `Grey`.

    Parameters
    ----------
    transform : callable
    network : nn.Module
    """

    def __init__(self, transform: Callable[[Tensor], Tensor], network: nn.Module) -> None:
        super().__init__()
        self.transform = transform
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return what the network makes of the transformed images."""
        result: Tensor = self.network(self.transform(images))
        return result
