"""The IDX files of MNIST (raw or gzipped), read with every claim of their headers checked."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["read_idx", "read_mnist_split"]

# Type codes of the third byte of the magic number (http://yann.lecun.com/exdb/mnist/), big-endian.
_DTYPES: dict[int, np.dtype[Any]] = {
    0x08: np.dtype(">u1"),
    0x09: np.dtype(">i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
_STEMS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# Where the files lie below the folder a user names: as they are, or as torchvision stores them.
_LAYOUTS = (Path(), Path("MNIST/raw"), Path("raw"))


def read_idx(path: str | os.PathLike[str]) -> npt.NDArray[np.generic]:
    """Read one IDX file.

    Parameters
    ----------
    path
        A raw IDX file, or a gzipped one (told by its first two bytes, not by its name).

    Returns
    -------
    numpy.ndarray
        The array with the shape and dtype that the header states, in native byte order.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        The file is not IDX, or is truncated, corrupt or longer than its header says; the message
        names the file and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except EOFError as error:
            raise ValueError(f"{path}: the gzip stream is truncated") from error
        except (OSError, zlib.error) as error:
            raise ValueError(f"{path}: the gzip stream is corrupt ({error})") from error
    if len(raw) < 4:
        raise ValueError(f"{path}: {len(raw)} bytes are too few for an IDX header")
    if raw[:2] != b"\0\0" or raw[2] not in _DTYPES or raw[3] == 0:
        raise ValueError(f"{path}: not an IDX file (magic number 0x{raw[:4].hex()})")
    dtype, dimensions = _DTYPES[raw[2]], raw[3]
    start = 4 + 4 * dimensions
    if len(raw) < start:
        raise ValueError(
            f"{path}: truncated in its header: {len(raw)} bytes, "
            f"{start} are needed for {dimensions} dimensions"
        )
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", dimensions, 4))
    # Python integers: the product of hostile sizes must not wrap around.
    wanted = dtype.itemsize
    for size in shape:
        wanted *= size
    if len(raw) - start != wanted:
        wrong = "truncated" if len(raw) - start < wanted else "too long"
        raise ValueError(
            f"{path}: {wrong}: the header states shape {shape}, {wanted} bytes of data, "
            f"but {len(raw) - start} follow it"
        )
    data = np.frombuffer(raw, dtype, offset=start).reshape(shape)
    native: npt.NDArray[np.generic] = data.astype(dtype.newbyteorder("="))
    return native


def _find(root: Path, stem: str) -> Path | None:
    for layout in _LAYOUTS:
        for name in (stem, stem + ".gz"):
            path = root / layout / name
            if path.is_file():
                return path
    return None


def read_mnist_split(
    root: str | os.PathLike[str], split: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Read the grey digits of one split of MNIST.

    Parameters
    ----------
    root
        A folder with the four IDX files under their original names, gzipped or raw, or one in
        torchvision's layout (``MNIST/raw/``).
    split
        ``"train"`` or ``"test"``.

    Returns
    -------
    images : numpy.ndarray
        ``(N, 28, 28)`` uint8.
    labels : numpy.ndarray
        ``(N,)`` uint8, 0 to 9.

    Raises
    ------
    FileNotFoundError
        The folder or one of the two files is missing; the message lists where it was looked for.
    ValueError
        A file is damaged, or the two do not belong together.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder (wanted: one with MNIST's IDX files)")
    arrays = []
    for stem in _STEMS[split]:
        path = _find(root, stem)
        if path is None:
            looked = ", ".join(str(root / layout) for layout in _LAYOUTS)
            raise FileNotFoundError(f"{stem} or {stem}.gz: not found in any of {looked}")
        arrays.append((path, read_idx(path)))
    (image_path, images), (label_path, labels) = arrays
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28):
        raise ValueError(
            f"{image_path}: holds {images.dtype} of shape {images.shape}, "
            "expected uint8 of shape (N, 28, 28)"
        )
    if labels.dtype != np.uint8 or labels.ndim != 1:
        raise ValueError(
            f"{label_path}: holds {labels.dtype} of shape {labels.shape}, "
            "expected uint8 of shape (N,)"
        )
    if len(images) != len(labels):
        raise ValueError(
            f"{label_path}: {len(labels)} labels, but {image_path} has {len(images)} images"
        )
    if len(labels) and labels.max() > 9:
        position = int(labels.argmax())
        raise ValueError(
            f"{label_path}: label {labels[position]} at position {position}, expected 0 to 9"
        )
    return images.astype(np.uint8), labels.astype(np.uint8)
