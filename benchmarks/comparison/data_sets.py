"""The data sets: a biased training part, a part to choose settings on, and a test part."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import re
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lnl_ext.paper.colored_mnist import MEAN_COLORS, ColoredMNIST
from lnl_ext.paper.dogs_and_cats import BRIGHT, DARK, DOG

SIDE = 48  # pixels of a photograph
_FACE = re.compile(r"(\d+)_([01])_")  # age and gender of UTKFace's names
_SHIFT = 2  # pixels by which images move in training

# Images of a group in the test and the validation part, and of an aligned one in the training part.
_FACES = (150, 100, 500)
_PETS = (300, 150, 700)
_DIGITS = (60, 40)
_TRAIN_DIGITS = 20_000


@dataclasses.dataclass(frozen=True)
class Part:
    """Samples with label and bias, both numbered so that the usual bias of a label is its own."""

    inputs: Tensor
    """(N, 3, H, W) uint8 images or (N, D) float32 rows of a table."""
    labels: Tensor
    """(N,) int64."""
    bias: Tensor
    """(N,) int64."""

    @property
    def aligned(self) -> Tensor:
        """(N,) bool: where the bias is that which the training part suggests."""
        return self.labels == self.bias

    def __getitem__(self, rows: Tensor) -> Part:
        """Return some samples."""
        return Part(self.inputs[rows], self.labels[rows], self.bias[rows])

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Data:
    """The three parts, no sample of which is in two."""

    name: str
    train: Part
    validation: Part
    test: Part
    mirror: bool = False
    """Whether a mirrored image is as good as the image."""

    @property
    def is_table(self) -> bool:
        """Whether the inputs are rows of a table."""
        return self.train.inputs.dim() == 2

    @property
    def alignment(self) -> float:
        """Share of the training samples with the usual bias of their label."""
        return self.train.aligned.double().mean().item()

    @property
    def classes(self) -> int:
        """Number of label classes."""
        return int(self.train.labels.max()) + 1

    def prepare(self, inputs: Tensor) -> Tensor:
        """Turn a batch of inputs into what the network takes."""
        return inputs if self.is_table else inputs.float() / 127.5 - 1

    def augment(self, inputs: Tensor) -> Tensor:
        """Do the same in training: images are moved, and mirrored half the time."""
        images = self.prepare(inputs)
        if self.is_table:
            return images
        if self.mirror and torch.rand(()) < 0.5:
            images = images.flip(3)
        height, width = images.shape[2:]
        top, left = torch.randint(2 * _SHIFT + 1, (2,)).tolist()
        padded = F.pad(images, [_SHIFT] * 4, mode="replicate")
        return padded[:, :, top : top + height, left : left + width]


def face(name: str) -> tuple[int, int] | None:
    """Return gender (1: female) and age group (1: young) of a file of UTKFace, None for others."""
    if (match := _FACE.match(name)) is None:
        return None
    years, gender = int(match[1]), int(match[2])
    return None if not (15 <= years <= 29 or years >= 40) else (gender, int(years < 30))


def faces(tar: Path, alignment: float = 0.95) -> Data:
    """Read UTKFace: the gender, biased by the age group (15 to 29, 40 and older).

    Parameters
    ----------
    tar
        Files named ``[age]_[gender]_...jpg``.
    alignment
        Share of young women and old men among the training images.
    """
    return _biased("faces", _photographs(tar, face), alignment, *_FACES)


def pets(tar: Path, alignment: float = 0.95) -> Data:
    """Read cats and dogs: the species, biased by the tone (dark or bright).

    Parameters
    ----------
    tar
        ``cat.N.jpg`` and ``dog.N.jpg`` with the lists of the paper's authors, ``list_bright.txt``
        and ``list_dark.txt``.
    alignment
        Share of dark cats and bright dogs among the training images.
    """
    with tarfile.open(tar) as archive:
        tones: dict[str, int] = {}
        for member in archive:
            for name, tone in (("list_bright.txt", BRIGHT), ("list_dark.txt", DARK)):
                if member.name.endswith(name):
                    tones |= dict.fromkeys(_content(archive, member).decode().split(), tone)

    def of(name: str) -> tuple[int, int] | None:
        return (int(name.startswith("dog")) * DOG, tones[name]) if name in tones else None

    return _biased("pets", _photographs(tar, of), alignment, *_PETS)


def colored_mnist(root: Path, variance: float = 0.02) -> Data:
    """Colour the digits; the bias is the digit whose mean colour is nearest to the own colour.

    Parameters
    ----------
    root
        A folder with MNIST's files.
    variance
        Of the colours, the paper's sigma^2.
    """
    keep = range(_TRAIN_DIGITS)
    train = _digits(ColoredMNIST(root, variance=variance, indices=keep))
    others = range(_TRAIN_DIGITS, 60_000)
    validation = _digits(ColoredMNIST(root, variance=variance, indices=others, biased=False))
    test = _digits(ColoredMNIST(root, split="test", variance=variance))
    return Data(
        "colored_mnist",
        train,
        validation[_of_each(_groups(validation), 0, _DIGITS[1], _DIGITS[1])],
        test[_of_each(_groups(test), 0, _DIGITS[0], _DIGITS[0])],
    )


def adult(path: Path) -> Data:
    """Read UCI's Adult: whether the income is above 50,000 dollars, biased by the sex.

    A random third is the test part, a sixth the validation part, as they come. The inputs are all
    other columns, numbers standardised, names one-hot.
    """
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, skipinitialspace=True))
    labels = torch.tensor([row.pop("classification") == ">50K" for row in rows]).long()
    sex = torch.tensor([row.pop("sex") == "Male" for row in rows]).long()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    third, sixth = len(rows) // 3, len(rows) // 6
    test, validation, train = torch.tensor_split(order, (third, third + sixth))
    everything = Part(_numbers(rows, train), labels, sex)
    return Data("adult", everything[train], everything[validation], everything[test])


READERS = {"faces": faces, "pets": pets, "adult": adult, "colored_mnist": colored_mnist}


def load(name: str, file: Path) -> Data:
    """Read the data set called ``name``."""
    data: Data = READERS[name](file)  # type: ignore[operator]
    return data


def _photographs(tar: Path, of: Callable[[str], tuple[int, int] | None]) -> Part:
    """Decode the images of which ``of`` says label and bias by their names."""
    from PIL import Image

    images, pairs = [], []
    with tarfile.open(tar) as archive:
        for member in archive:
            if (pair := of(member.name.rpartition("/")[2])) is not None:
                image = Image.open(io.BytesIO(_content(archive, member))).convert("RGB")
                images.append(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
                pairs.append(pair)
    if not images:
        raise ValueError(f"{tar} has no image whose name tells label and bias")
    labels, bias = torch.tensor(pairs).T
    return Part(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels, bias)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None
    return stream.read()


def _biased(
    name: str, images: Part, alignment: float, test: int, validation: int, aligned: int
) -> Data:
    """Divide images so that the training part is biased and the others have equal groups."""
    groups = _groups(images)
    conflicting = round(aligned * (1 - alignment) / alignment)
    train = _of_each(groups, test + validation, aligned, conflicting)
    middle = _of_each(groups, test, validation, validation)
    return Data(
        name, images[train], images[middle], images[_of_each(groups, 0, test, test)], mirror=True
    )


def _groups(part: Part) -> dict[tuple[int, int], Tensor]:
    """Return the rows of every group of label and bias in random order, always the same."""
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for label, bias in torch.unique(torch.stack([part.labels, part.bias], 1), dim=0).tolist():
        own = ((part.labels == label) & (part.bias == bias)).nonzero().squeeze(1)
        rows[label, bias] = own[torch.randperm(len(own), generator=generator)]
    return rows


def _of_each(
    groups: Mapping[tuple[int, int], Tensor], first: int, aligned: int, conflicting: int
) -> Tensor:
    """Return so many rows of every aligned and every conflicting group, from ``first`` on."""
    parts = []
    for (label, bias), rows in groups.items():
        count = aligned if label == bias else conflicting
        if len(rows) < first + count:
            raise ValueError(
                f"label {label} with bias {bias} has {len(rows)} samples, {first + count} are "
                "needed"
            )
        parts.append(rows[first : first + count])
    return torch.cat(parts)


def _digits(digits: ColoredMNIST) -> Part:
    """Give every digit as bias the digit whose mean colour is nearest to the brightest colour."""
    brightest = digits.colored.amax((2, 3)).float()
    distance = torch.cdist(brightest, torch.tensor(MEAN_COLORS).float())
    return Part(digits.colored, digits.labels, distance.argmin(1))


def _numbers(rows: list[dict[str, str]], train: Tensor) -> Tensor:
    """Return the columns as numbers: standardised by the training rows, or one-hot."""
    columns = []
    for name in rows[0]:
        values = [row[name] for row in rows]
        if all(value.lstrip("-").isdigit() for value in values):
            column = torch.tensor([float(value) for value in values])
            columns.append(((column - column[train].mean()) / column[train].std())[:, None])
        else:
            numbers = torch.from_numpy(np.unique(values, return_inverse=True)[1])
            columns.append(F.one_hot(numbers).float())
    return torch.cat(columns, 1)
