"""Dogs and cats (Kim et al., section 4.1): species whose coat is dark or bright in training.

The images are those of Kaggle's "Dogs vs. Cats", ``train/cat.0.jpg`` to ``train/dog.12499.jpg``;
which of them are bright or dark is in the authors' ``list_bright.txt`` and ``list_dark.txt``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lnl_ext.ops.types import IGNORE_INDEX

__all__ = [
    "BRIGHT",
    "CAT",
    "COLOR_BINS",
    "DARK",
    "DOG",
    "SPLITS",
    "SUBSAMPLING",
    "PetFiles",
    "color_map",
    "list_pets",
]

CAT, DOG = 0, 1
DARK, BRIGHT = 0, 1
#: Biased training sets, and the unbiased test set of images in neither list.
SPLITS = ("TB1", "TB2", "test")
#: Bins per colour channel: ``value // 32``.
COLOR_BINS = 8
#: The colours to be unlearned are those of every fourth pixel in both directions.
SUBSAMPLING = 4

_NAME = re.compile(r"(cat|dog)\.\d+\.jpe?g", re.IGNORECASE)


class PetFiles(NamedTuple):
    """One split, in the order of the file names."""

    paths: list[Path]
    labels: Tensor
    """(N,) int64: `CAT` or `DOG`."""
    tone: Tensor
    """(N,) int64, the cheap bias target: `DARK`, `BRIGHT`, else `IGNORE_INDEX` (unbiased)."""


def list_pets(root: str | os.PathLike[str], split: str) -> PetFiles:
    """Return the images of a split.

    Parameters
    ----------
    root
        The folder with ``train/``, and ``list_bright.txt`` and ``list_dark.txt`` beside or inside
        it. Listed images that are not there are left out: any part of Kaggle's 25,000 will do.
    split
        ``"TB1"``: dark cats and bright dogs; ``"TB2"``: bright cats and dark dogs; ``"test"``:
        the images in neither list.

    Raises
    ------
    FileNotFoundError
        The folder or a list is missing.
    ValueError
        The split is unknown or empty, a list is malformed, or a name stands in both lists.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    root = Path(root)
    folder = root / "train"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected Kaggle's train/cat.0.jpg ...")
    bright, dark = (_read_list(root, name) for name in ("list_bright.txt", "list_dark.txt"))
    both = sorted(bright & dark)
    if both:
        raise ValueError(f"{root}: {len(both)} names are in both lists, such as {both[0]}")
    chosen: list[tuple[str, int, int, Path]] = []
    for path in folder.iterdir():
        if not _NAME.fullmatch(path.name):
            continue
        label = DOG if path.name.lower().startswith("dog") else CAT
        tone = BRIGHT if path.name in bright else DARK if path.name in dark else IGNORE_INDEX
        # Of dark cats and bright dogs the two numbers are equal.
        belongs = "test" if tone < 0 else "TB1" if label == tone else "TB2"
        if belongs == split:
            chosen.append((path.name, label, tone, path))
    if not chosen:
        raise ValueError(f"{folder}: no image belongs to split {split}")
    chosen.sort()  # folders have no order of their own
    return PetFiles(
        [path for *_, path in chosen],
        torch.tensor([label for _, label, _, _ in chosen]),
        torch.tensor([tone for *_, tone, _ in chosen]),
    )


def _read_list(root: Path, name: str) -> set[str]:
    path = root / name
    if not path.is_file():
        path = root / "train" / name
    if not path.is_file():
        raise FileNotFoundError(f"{root / name}: no such file; it is one of the authors' lists")
    names = path.read_text(encoding="utf-8").split()
    wrong = [entry for entry in names if not _NAME.fullmatch(entry)]
    if wrong:
        raise ValueError(
            f"{path}: {len(wrong)} of {len(names)} entries are not file names such as cat.0.jpg, "
            f"the first is {wrong[0]!r}"
        )
    return set(names)


def color_map(images: Tensor, step: int = SUBSAMPLING) -> Tensor:
    """Return the paper's bias target: the colour bins of every ``step``-th pixel.

    Parameters
    ----------
    images
        ``(N, 3, H, W)`` uint8, H and W multiples of ``step``.
    step
        Pixels from one target to the next. The middle of a cell is taken, as PIL's
        nearest-neighbour resize does.

    Returns
    -------
    Tensor
        ``(N, 3, H / step, W / step)`` int64 in 0..7; no pixel is ignored.

    Raises
    ------
    ValueError
        The shape or dtype is another.
    """
    if images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(
            f"images is {images.dtype} of shape {tuple(images.shape)}, "
            "expected uint8 of shape (N, 3, H, W)"
        )
    if images.shape[2] % step or images.shape[3] % step:
        raise ValueError(
            f"images has height and width {tuple(images.shape[2:])}, expected multiples of {step}"
        )
    middle = images[:, :, step // 2 :: step, step // 2 :: step]
    return torch.div(middle, 256 // COLOR_BINS, rounding_mode="floor").long()
