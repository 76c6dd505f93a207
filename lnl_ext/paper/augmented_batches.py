"""Batches of images in memory: cut, mirrored, and with bias targets of what was cut out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lnl_ext.data.images import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["AugmentedBatches", "normalize_imagenet"]

Batch = tuple[Tensor, Tensor, dict[str, Tensor]]
ImageTarget = Callable[[Tensor, Tensor], Tensor]
"""``(images (N, 3, H, W) uint8, labels (N,))`` to a bias target."""


_STRETCH = 0.4  # logarithm of the largest ratio of the sides of a part, to that of the smallest


class AugmentedBatches:
    """Batches for training or evaluation from uint8 images in memory.

    In training the samples come in a new order, of each a random part scaled to one size and
    mirrored half the time; in evaluation in their own order, the centre cut out. As
    `lnl_ext.training.batches.TensorBatches`, whose bias targets cannot follow a cut.

    Parameters
    ----------
    images
        ``(N, 3, H, W)`` uint8.
    labels
        ``(N,)`` integer.
    bias
        Bias targets ``(N, ...)`` that hold whatever is cut.
    image_bias
        Bias targets made from the images cut out, by name.
    batch_size
        Samples per batch; in training an incomplete last batch is left out.
    crop
        Height and width of what the network sees.
    smallest_part
        In training, the smallest share of an image's area that is cut out, in (0, 1]; the largest
        is all of it. Its sides are stretched against each other by up to a fifth.
    training
        As above.

    Attributes
    ----------
    generator : torch.Generator
        The only source of order and augmentation. The trainer seeds it and keeps its state in the
        checkpoint.

    Raises
    ------
    ValueError
        The images are smaller than ``crop``, or too few for a batch, or ``smallest_part`` is out
        of its range.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        bias: Mapping[str, Tensor] | None = None,
        *,
        batch_size: int,
        crop: int,
        image_bias: Mapping[str, ImageTarget] | None = None,
        smallest_part: float = 0.35,
        training: bool = False,
    ) -> None:
        if not 0 < smallest_part <= 1:
            raise ValueError(f"smallest_part is {smallest_part}, expected one in (0, 1]")
        if min(images.shape[2:]) < crop:
            raise ValueError(f"crop is {crop}, the images are {tuple(images.shape[2:])}")
        if training and len(images) < batch_size:
            raise ValueError(f"batch_size is {batch_size}, there are {len(images)} images")
        self.images, self.labels, self.bias = images, labels, dict(bias or {})
        self.image_bias = dict(image_bias or {})
        self.batch_size, self.crop, self.training = batch_size, crop, training
        self.smallest_part = smallest_part
        self.generator = torch.Generator()

    def __len__(self) -> int:
        """Return the number of batches in a pass."""
        full, rest = divmod(len(self.images), self.batch_size)
        return full + (1 if rest and not self.training else 0)

    def __iter__(self) -> Iterator[Batch]:
        """One pass."""
        samples = len(self.images)
        order = torch.arange(samples)
        if self.training:
            order = torch.randperm(samples, generator=self.generator)
        for rows in torch.split(order[: len(self) * self.batch_size], self.batch_size):
            images = self._augmented(rows) if self.training else self._centres(rows)
            labels = self.labels[rows].long()
            bias = {name: target[rows].long() for name, target in self.bias.items()}
            bias |= {name: make(images, labels) for name, make in self.image_bias.items()}
            yield normalize_imagenet(images), labels, bias

    def _centres(self, rows: Tensor) -> Tensor:
        top, left = ((side - self.crop) // 2 for side in self.images.shape[2:])
        return self.images[rows][:, :, top : top + self.crop, left : left + self.crop]

    def _augmented(self, rows: Tensor) -> Tensor:
        count = len(rows)

        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(count, generator=self.generator) * (high - low) + low

        side = uniform(self.smallest_part, 1).sqrt()
        stretch = uniform(-_STRETCH / 2, _STRETCH / 2).exp()
        width, height = ((side * s).clamp(max=1) for s in (stretch, 1 / stretch))
        direction = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
        # In grid_sample's coordinates an image reaches from -1 to 1.
        view = torch.zeros(count, 2, 3)
        view[:, 0, 0], view[:, 0, 2] = width * direction, uniform(-1, 1) * (1 - width)
        view[:, 1, 1], view[:, 1, 2] = height, uniform(-1, 1) * (1 - height)
        grid = F.affine_grid(view, [count, 3, self.crop, self.crop], align_corners=False)
        seen = F.grid_sample(
            self.images[rows].float(),
            grid,
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )
        return seen.round_().to(torch.uint8)


def normalize_imagenet(images: Tensor) -> Tensor:
    """Turn ``(N, 3, H, W)`` uint8 into float32 with ImageNet's normalisation, channels_last."""
    values = images.contiguous(memory_format=torch.channels_last).float().div_(255)
    mean, std = (values.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return values.sub_(mean).div_(std)
