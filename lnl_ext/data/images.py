"""Image files of any kind as RGB images, and data sets of them that say which cannot be read."""

from __future__ import annotations

import dataclasses
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from lnl_ext.data.decoding import MAX_PIXELS, MAX_SIDE, UnreadableImageError, decode, load_image

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "MAX_SIDE",
    "MAX_UNREADABLE",
    "ImageDataset",
    "SquareTransform",
    "TooManyUnreadableError",
    "UnreadableImageError",
    "evaluation_transform",
    "find_unreadable",
    "load_image",
    "read_images",
    "readable",
    "training_transform",
    "typical_side",
]

#: Share of unreadable images above which a data set is refused instead of being used without them.
MAX_UNREADABLE = 0.01
#: What the name of a file in a folder of images ends with, in small letters.
IMAGE_SUFFIXES = (*IMG_EXTENSIONS, ".apng", ".avif", ".gif", ".jfif", ".jp2")
#: Normalisation of torchvision's pretrained networks, for values in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LONGEST = 4  # times the shorter side, what is kept of the longer one before scaling
_LISTED = 10  # unreadable files named in a message; more would hide what it says
_MEASURED = 100  # images whose size is typical of all

Sample = tuple[Tensor, Tensor, dict[str, Tensor]]
Transform = Callable[[Image.Image], Tensor]


class TooManyUnreadableError(ValueError):
    """More than `MAX_UNREADABLE` of the images cannot be read."""


# ------------------------------------------------------------------ many files


class _Files(Dataset[tuple[Tensor, str]]):
    """Decoded images, and why where there is none; the work of a DataLoader's workers."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]], size: int | None) -> None:
        self.paths, self.size = [os.fspath(path) for path in paths], size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        image, reason = decode(self.paths[index])
        if self.size is None:
            return torch.empty(0), reason
        if image is None:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), reason
        return _square(image, self.size), reason


def _square(image: Image.Image, size: int) -> Tensor:
    """Scale the shorter side to ``size`` and cut out the centre: ``(3, size, size)`` uint8."""
    if image.size != (size, size):
        # Else the ends of a strip, which are cut off anyway, would be scaled up with the rest.
        longest = _LONGEST * min(image.size)
        if max(image.size) > longest:
            image = transforms.center_crop(image, [min(n, longest) for n in image.size[::-1]])
        scaled = transforms.resize(image, [size], antialias=True)
        image = transforms.center_crop(scaled, [size, size])
    tensor: Tensor = transforms.pil_to_tensor(image)
    return tensor


def _decode_all(
    paths: Sequence[str | os.PathLike[str]], size: int | None, workers: int
) -> Iterator[tuple[Tensor, list[str]]]:
    loader = DataLoader(
        _Files(paths, size),
        batch_size=64,
        num_workers=min(workers, -(-len(paths) // 64)),
        # Of its own, so that reading images leaves the random numbers of the training alone.
        generator=torch.Generator(),
    )
    for images, reasons in loader:
        yield images, list(reasons)


def find_unreadable(paths: Sequence[str | os.PathLike[str]], *, workers: int = 0) -> dict[int, str]:
    """Decode every file once and return what is wrong with those that cannot be read.

    Headers alone would not do: a JPEG cut off in the middle has a sound one, and would end the
    training run that comes upon it.

    Parameters
    ----------
    paths
        The files.
    workers
        Processes that decode; 0: this one.

    Returns
    -------
    dict of int to str
        Position in ``paths`` and the reason.
    """
    reasons = [reason for _, batch in _decode_all(paths, None, workers) for reason in batch]
    return {position: reason for position, reason in enumerate(reasons) if reason}


def readable(paths: Sequence[str | os.PathLike[str]], *, workers: int = 0) -> list[int]:
    """Return the positions of the files that can be read, and warn of the others.

    Parameters
    ----------
    paths, workers
        As in `find_unreadable`.

    Raises
    ------
    TooManyUnreadableError
        More than `MAX_UNREADABLE` of the files cannot be read.
    """
    bad = find_unreadable(paths, workers=workers)
    _report(paths, bad)
    return [position for position in range(len(paths)) if position not in bad]


def read_images(
    paths: Sequence[str | os.PathLike[str]], size: int, *, workers: int = 0
) -> tuple[Tensor, list[int]]:
    """Decode every file once and keep all images in memory, for data that fits there.

    Parameters
    ----------
    paths, workers
        As in `find_unreadable`.
    size
        The shorter side is scaled to so many pixels and the centre cut out.

    Returns
    -------
    images : Tensor
        ``(N, 3, size, size)`` uint8, those that can be read.
    kept : list of int
        Their positions in ``paths``.

    Raises
    ------
    TooManyUnreadableError
        More than `MAX_UNREADABLE` of the files cannot be read; up to that, a warning names them.
    """
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    bad: dict[int, str] = {}
    start = 0
    for batch, reasons in _decode_all(paths, size, workers):
        images[start : start + len(batch)] = batch
        bad |= {start + offset: reason for offset, reason in enumerate(reasons) if reason}
        start += len(batch)
    _report(paths, bad)
    kept = [position for position in range(len(paths)) if position not in bad]
    return (images if not bad else images[kept]), kept


def typical_side(paths: Sequence[str | os.PathLike[str]]) -> int:
    """Return the median of the images' shorter sides in pixels, of up to 100 spread over ``paths``.

    Raises
    ------
    UnreadableImageError
        One of them cannot be read.
    """
    some = paths[:: -(-len(paths) // _MEASURED)]
    return statistics.median_low(min(load_image(path).size) for path in some)


def _report(paths: Sequence[str | os.PathLike[str]], bad: Mapping[int, str]) -> None:
    """Warn of unreadable files, or raise where there are too many."""
    if not bad:
        return
    lines = [f"{os.fspath(paths[position])}: {reason}" for position, reason in bad.items()]
    listed = "\n  ".join(lines[:_LISTED])
    if len(lines) > _LISTED:
        listed += (
            f"\n  and {len(lines) - _LISTED} more (lnl_ext.data.images.find_unreadable lists all)"
        )
    counted = f"{len(bad)} of {len(paths)} images cannot be read"
    if len(bad) > MAX_UNREADABLE * len(paths):
        raise TooManyUnreadableError(
            f"{counted}, expected at most {MAX_UNREADABLE:.0%}:\n  {listed}"
        )
    warnings.warn(f"{counted} and are left out:\n  {listed}", stacklevel=3)


# ------------------------------------------------------------------ a data set for a DataLoader


class ImageDataset(Dataset[Sample]):
    """Image files with labels and bias targets, decoded when they are asked for, or kept decoded.

    For a `torch.utils.data.DataLoader`, whose worker processes then decode; its batches are what
    `lnl_ext.Trainer.fit` takes. Use `readable` on the paths first.

    Parameters
    ----------
    paths
        N files.
    labels
        ``(N,)`` class indices.
    bias
        Bias targets ``(N, ...)`` by name: class indices, or floating-point probabilities.
    transform
        Turns the RGB image into the tensor that the network takes.

    Attributes
    ----------
    paths : list of str
    labels : Tensor
        int64.
    bias : dict of str to Tensor
        int64 or floating point.

    Raises
    ------
    ValueError
        ``labels`` or a bias target has another length than ``paths``.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        labels: Any,
        bias: Mapping[str, Any] | None = None,
        transform: Transform = transforms.pil_to_tensor,
    ) -> None:
        self.paths = [os.fspath(path) for path in paths]
        self.labels = torch.as_tensor(labels).long()
        self.bias = {name: _target(values) for name, values in (bias or {}).items()}
        self.transform = transform
        self._squares: Tensor | None = None
        named = {"labels": self.labels, **{f"bias[{n!r}]": b for n, b in self.bias.items()}}
        for name, tensor in named.items():
            if tensor.dim() == 0 or len(tensor) != len(self.paths):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {len(self.paths)} rows, "
                    "one a path"
                )

    def __len__(self) -> int:
        """Give the number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        """Give transformed image, label () and bias targets of one image.

        Raises
        ------
        UnreadableImageError
            The file cannot be read (any more).
        """
        if self._squares is None:
            image = self.transform(load_image(self.paths[index]))
        else:
            assert isinstance(self.transform, SquareTransform)
            image = self.transform.vary(self._squares[index])
        return image, self.labels[index], {name: b[index] for name, b in self.bias.items()}

    def keep_decoded(self, *, workers: int = 0) -> None:
        """Decode every file now and keep ``(N, 3, side, side)`` uint8 in memory.

        The samples are the same as before. Workers of a DataLoader read the memory of this process.

        Parameters
        ----------
        workers
            Processes that decode; 0: this one.

        Raises
        ------
        TypeError
            ``transform`` is not a `SquareTransform`.
        UnreadableImageError
            A file cannot be read (any more).
        """
        if not isinstance(self.transform, SquareTransform):
            raise TypeError(
                f"transform is {self.transform!r}, expected a SquareTransform: of others it is not "
                "known what is the same every time"
            )
        side = self.transform.side
        squares = torch.empty(len(self), 3, side, side, dtype=torch.uint8)
        start = 0
        for batch, reasons in _decode_all(self.paths, side, workers):
            for offset, reason in enumerate(reasons):
                if reason:
                    raise UnreadableImageError(f"{self.paths[start + offset]}: {reason}")
            squares[start : start + len(batch)] = batch
            start += len(batch)
        self._squares = squares


def _target(values: Any) -> Tensor:
    tensor = torch.as_tensor(values)
    return tensor if tensor.is_floating_point() else tensor.long()


# ------------------------------------------------------------------ transforms


@dataclasses.dataclass(frozen=True)
class SquareTransform:
    """From an RGB image to the network's input by way of a square, the same every time.

    Attributes
    ----------
    side
        The shorter side is scaled to so many pixels and the centre cut out.
    vary
        From that square, ``(3, side, side)`` uint8, to the input; it may be random.
    """

    side: int
    vary: Callable[[Tensor], Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform an image."""
        return self.vary(_square(image, self.side))


def training_transform(size: int, augment: str = "shift") -> SquareTransform:
    """Return the transform for training.

    Parameters
    ----------
    size
        Height and width of the result.
    augment
        ``"shift"``: mirrored half the time and moved by up to a sixteenth of ``size``, the edge
        repeated. ``"crop"``: a random part of 35% to 100% of the area, mirrored half the time.
        ``"flip"``: mirrored half the time. ``"none"``: `evaluation_transform`.

    Returns
    -------
    SquareTransform
        RGB image to ``(3, size, size)`` float32 with ImageNet's normalisation.
    """
    if augment == "none":
        return evaluation_transform(size)
    side, more = size, []
    if augment == "shift":
        more = [v2.RandomCrop(size, padding=-(-size // 16), padding_mode="edge")]
    elif augment == "crop":
        # The parts are cut from more pixels than they are to have, so that they stay sharp.
        side = 2 * size
        more = [v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True)]
    return SquareTransform(side, v2.Compose([*more, v2.RandomHorizontalFlip(), *_to_input()]))


def evaluation_transform(size: int) -> SquareTransform:
    """Return the transform for evaluation: the shorter side scaled to ``size``, the centre cut out.

    Parameters
    ----------
    size
        Height and width of the result.

    Returns
    -------
    SquareTransform
        RGB image to ``(3, size, size)`` float32 with ImageNet's normalisation.
    """
    return SquareTransform(size, v2.Compose(_to_input()))


def _to_input() -> list[Any]:
    return [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD)),
    ]
