"""Coloured MNIST (Kim et al., section 4.1): digits whose colour determines them in training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lnl_ext.adversary.reweighting import logit_adjustment
from lnl_ext.ops.types import IGNORE_INDEX
from lnl_ext.paper.idx import read_mnist_split
from lnl_ext.paper.networks import COLOR_BINS
from lnl_ext.paper.safe_npy import load_npy

__all__ = [
    "IMAGE_MEAN",
    "IMAGE_STD",
    "MEAN_COLORS",
    "VARIANCES",
    "ColoredMNIST",
]

#: Mean colour (red, green, blue; 0 to 255) of the digits 0 to 9 in the training set.
MEAN_COLORS: tuple[tuple[int, int, int], ...] = (
    (220, 20, 60),
    (0, 128, 128),
    (253, 233, 16),
    (0, 149, 182),
    (237, 145, 33),
    (145, 30, 188),
    (70, 240, 240),
    (250, 197, 187),
    (210, 245, 60),
    (128, 0, 0),
)
#: The variances of the paper's table.
VARIANCES = (0.020, 0.025, 0.030, 0.035, 0.040, 0.045, 0.050)
IMAGE_MEAN = (0.4914, 0.4822, 0.4465)
IMAGE_STD = (0.2023, 0.1994, 0.2010)

Batch = tuple[Tensor, Tensor, dict[str, Tensor]]


class ColoredMNIST(Dataset[Batch]):
    """MNIST with a colour per digit, its label and its bias labels.

    Training colours are drawn from ``N(mean of the digit, variance * I)``; test colours from the
    mean of a digit drawn uniformly, so that the colour is random. Both are clipped to [0, 1] and
    multiplied with the grey value. A sample is fixed once and for all by ``seed``.

    Parameters
    ----------
    root
        One of: a folder with MNIST's IDX files (gzipped or raw), a folder in torchvision's layout
        (``MNIST/raw/``), the authors' ``mnist_10color_jitter_var_0.020.npy``, or a folder that
        holds it. Where a folder has the authors' file for this variance, that is taken.
    split
        ``"train"`` or ``"test"``.
    variance
        Variance of the colour per channel (the paper's sigma^2), with colours in [0, 1].
    seed
        Seed of the colours; not used with the authors' files, which are coloured already.
    biased
        Whether the colour follows the digit. The default is True for training, False for testing.
        False on training digits makes the unbiased set on which to fit probes and choose settings.
    indices
        Positions of the digits to keep, all by default. A digit keeps its colour.

    Attributes
    ----------
    colored : Tensor
        ``(N, 3, 28, 28)`` uint8: the coloured digits.
    labels : Tensor
        ``(N,)`` int64: the digits.
    mean_color : Tensor
        ``(N,)`` int64: the digit whose mean colour was taken; -1 where the authors' file does not
        say.
    bias : dict of str to Tensor
        ``"pixel_color"``: ``(N, 3, 14, 14)`` int8, the odd pixels' value // 32 per channel,
        ``IGNORE_INDEX`` where the value is 0. ``"color"``: ``(N, 3)`` uint8, per channel the
        maximum over the image // 32. ``"color_and_digit"``: ``(N, 3 + 30)`` int8, ``"color"``
        for heads of all digits, and once more for three heads of every digit,
        ``IGNORE_INDEX`` for those of the other digits. ``"color_adjustment"``: ``(N, 10)`` float32,
        what ``"color"`` says about the digit (`lnl_ext.logit_adjustment`).
    source : pathlib.Path
        The file or folder that was read.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    ValueError
        A file is truncated or corrupt, or an argument out of range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str = "train",
        variance: float = 0.02,
        seed: int = 0,
        biased: bool | None = None,
        indices: Sequence[int] | npt.NDArray[np.integer[Any]] | Tensor | None = None,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split is {split!r}, expected 'train' or 'test'")
        if not 0 <= variance < float("inf"):
            raise ValueError(f"variance is {variance}, expected a finite number >= 0")
        self.split = split
        self.variance = variance
        self.biased = split == "train" if biased is None else biased
        root = Path(root)
        authors = root / f"mnist_10color_jitter_var_{variance:.3f}.npy"
        rows: slice | npt.NDArray[np.int64] = slice(None)
        if indices is not None:
            rows = np.asarray(indices, dtype=np.int64)
        if root.suffix == ".npy" or authors.is_file():
            self.source = root if root.suffix == ".npy" else authors
            if biased is not None and biased != (split == "train"):
                raise ValueError(
                    f"{self.source} is coloured already: its split {split!r} cannot "
                    f"be read with biased={biased}"
                )
            images, labels = _read_authors_file(self.source, split)
            colored, labels = images[rows], labels[rows]
            mean_color = np.full(len(labels), -1, dtype=np.int64)
        else:
            self.source = root
            grey, digits = read_mnist_split(root, split)
            drawn, chosen = _draw_colors(digits, variance, seed, split, self.biased)
            colored, labels = _paint(grey[rows], drawn[rows]), digits[rows].astype(np.int64)
            mean_color = chosen[rows].astype(np.int64)
        self.colored = torch.from_numpy(np.ascontiguousarray(colored))
        self.labels = torch.from_numpy(np.ascontiguousarray(labels))
        self.mean_color = torch.from_numpy(mean_color)
        color = torch.div(self.colored.amax((2, 3)), 256 // COLOR_BINS, rounding_mode="floor")
        self.bias = {
            "pixel_color": pixel_color_target(self.colored),
            "color": color,
            "color_and_digit": color_and_digit_target(color, self.labels),
            "color_adjustment": logit_adjustment(self.labels, color, classes=len(MEAN_COLORS)),
        }

    def __len__(self) -> int:
        """Give the number of digits."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """Give image (3, 28, 28), label () and bias targets of one digit, without a batch axis."""
        images, labels, targets = self.batch([range(len(self))[index]])
        return images[0], labels[0], {name: target[0] for name, target in targets.items()}

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """Make the batch of the given positions.

        Returns
        -------
        images : Tensor
            ``(n, 3, 28, 28)`` float32, normalised, channels_last.
        labels : Tensor
            ``(n,)`` int64.
        bias_targets : dict of str to Tensor
            The rows of :attr:`bias`, the integers as int64.
        """
        rows = torch.as_tensor(indices, dtype=torch.int64)
        targets = {
            name: target[rows] if target.is_floating_point() else target[rows].long()
            for name, target in self.bias.items()
        }
        return normalize(self.colored[rows]), self.labels[rows], targets

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Iterate over the whole set in order, in batches of at most ``batch_size``."""
        for start in range(0, len(self), batch_size):
            yield self.batch(range(start, min(start + batch_size, len(self))))


def pixel_color_target(colored: Tensor) -> Tensor:
    """Bias label of every odd pixel.

    Odd pixels are what PIL's nearest-neighbour resize to 14 x 14 takes, as in the authors' code;
    ``torch.nn.functional.interpolate`` would take the even ones.

    Parameters
    ----------
    colored
        ``(N, 3, 28, 28)`` uint8.

    Returns
    -------
    Tensor
        ``(N, 3, 14, 14)`` int8 in 0..7, or ``IGNORE_INDEX`` where the channel's value is 0.
    """
    value = colored[:, :, 1::2, 1::2]
    bins = torch.div(value, 256 // COLOR_BINS, rounding_mode="floor").to(torch.int8)
    return bins.masked_fill_(value == 0, IGNORE_INDEX)


def color_and_digit_target(color: Tensor, labels: Tensor) -> Tensor:
    """Repeat the colour's bins for heads of which each sees the samples of one digit only.

    Parameters
    ----------
    color
        ``(N, 3)`` bins.
    labels
        ``(N,)`` digits.

    Returns
    -------
    Tensor
        ``(N, 33)`` int8: the bins, then three columns a digit.
    """
    own = torch.arange(10) == labels[:, None]
    given = color.to(torch.int8)[:, None, :].expand(-1, 10, -1)
    given = given.masked_fill(~own[:, :, None], IGNORE_INDEX)
    return torch.cat([color.to(torch.int8), given.flatten(1)], dim=1)


def normalize(colored: Tensor) -> Tensor:
    """Turn ``(N, 3, 28, 28)`` uint8 into normalised float32, channels_last."""
    images = colored.contiguous(memory_format=torch.channels_last).float().div_(255)
    mean = torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(IMAGE_STD).view(1, 3, 1, 1)
    return images.sub_(mean).div_(std)


def _draw_colors(
    digits: npt.NDArray[np.uint8], variance: float, seed: int, split: str, biased: bool
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.integer[Any]]]:
    """Draw the colours ``(N, 3)``, in [0, 1], of digits ``(N,)``, and whose mean each took."""
    # The split is part of the seed: test colours must not repeat the training noise.
    generator = np.random.default_rng([seed, ("train", "test").index(split), int(biased)])
    means = np.asarray(MEAN_COLORS, dtype=np.float64) / 255
    chosen = digits if biased else generator.integers(0, len(means), len(digits))
    noise = generator.standard_normal((len(digits), 3)) * np.sqrt(variance)
    colors: npt.NDArray[np.float32] = np.clip(means[chosen] + noise, 0, 1).astype(np.float32)
    return colors, chosen


def _paint(grey: npt.NDArray[np.uint8], color: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Multiply grey ``(N, 28, 28)`` with colours ``(N, 3)`` into ``(N, 3, 28, 28)``."""
    # One channel at a time keeps the float copy a third as large.
    colored = np.empty((len(grey), 3, *grey.shape[1:]), np.uint8)
    for channel in range(3):
        colored[:, channel] = np.rint(grey * color[:, channel, None, None])
    return colored


def _read_authors_file(
    path: Path, split: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read one split of the authors' pickled dictionary."""
    content = load_npy(path)
    keys = (f"{split}_image", f"{split}_label")
    if not isinstance(content, dict) or any(key not in content for key in keys):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: holds {found}, expected a dictionary with {' and '.join(keys)}")
    images, labels = (np.asarray(content[key]) for key in keys)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (28, 28, 3):
        raise ValueError(
            f"{path}: {keys[0]} is {images.dtype} of shape {images.shape}, "
            "expected uint8 of shape (N, 28, 28, 3)"
        )
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: {keys[1]} is {labels.dtype} of shape {labels.shape}, expected "
            f"{len(images)} integers"
        )
    if len(labels) and (labels.min() < 0 or labels.max() > 9):
        raise ValueError(
            f"{path}: {keys[1]} goes from {labels.min()} to {labels.max()}, expected 0 to 9"
        )
    return images.transpose(0, 3, 1, 2), labels.astype(np.int64)
