"""IDX files: what is read, and which damage is named."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from lnl_ext.data import read_idx, read_mnist_split

IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


def idx_bytes(array: np.ndarray, code: int = 0x08) -> bytes:
    """Write ``array`` (big-endian) in the IDX format."""
    header = struct.pack(">HBB", 0, code, array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_split(folder: Path, count: int = 7, *, compress: bool = False) -> np.ndarray:
    """Write a small training split and return its images."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    for name, array in ((IMAGES, images), (LABELS, labels)):
        content = idx_bytes(array)
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return images


@pytest.mark.parametrize(
    ("code", "dtype"),
    [(0x08, ">u1"), (0x09, ">i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8")],
)
def test_every_type_of_the_format_is_read(tmp_path, code, dtype):
    array = np.arange(-6, 6).reshape(3, 4).astype(dtype)
    path = tmp_path / "file"
    path.write_bytes(idx_bytes(array, code))
    read = read_idx(path)
    assert read.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("layout", [".", "MNIST/raw", "raw"])
def test_a_split_is_found_in_every_layout(tmp_path, layout, compress):
    images = write_split(tmp_path / layout, compress=compress)
    read, labels = read_mnist_split(tmp_path, "train")
    np.testing.assert_array_equal(read, images)
    np.testing.assert_array_equal(labels, np.arange(7))


def test_missing_folder_and_missing_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        read_mnist_split(tmp_path / "nowhere", "train")
    write_split(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte or .*\.gz: not found in"):
        read_mnist_split(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match="absent: no such file"):
        read_idx(tmp_path / "absent")


GOOD = idx_bytes(np.zeros((2, 3, 3), np.uint8))
ZIPPED = gzip.compress(bytes(range(256)) * 64, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few"),
        (GOOD[:2], "2 bytes are too few"),
        (b"\x89PNG" + GOOD[4:], "not an IDX file .magic number 0x89504e47"),
        (b"\0\0\x07\x01" + GOOD[4:], "not an IDX file"),
        (b"\0\0\x08\x00" + GOOD[4:], "not an IDX file"),
        (GOOD[:9], "truncated in its header: 9 bytes, 16 are needed for 3 dimensions"),
        (GOOD[:-1], r"truncated: the header states shape \(2, 3, 3\), 18 bytes.*but 17 follow"),
        (GOOD + b"\0", "too long: .*but 19 follow"),
        # The product of these sizes is 2^64: it must not wrap around to 0.
        (struct.pack(">HBB2I", 0, 8, 3, 1 << 31, 1 << 31) + struct.pack(">I", 4), "truncated: "),
        (ZIPPED[: len(ZIPPED) // 2], "the gzip stream is truncated"),
        (ZIPPED[:30] + b"\xff\xff\xff\xff" + ZIPPED[34:], "the gzip stream is corrupt"),
        (b"\x1f\x8b" + b"\xff" * 30, "the gzip stream is corrupt"),
        (gzip.compress(GOOD[:-1], mtime=0), "truncated: "),
    ],
)
def test_damage_is_named_with_the_file(tmp_path, content, message):
    path = tmp_path / "damaged-idx3"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"damaged-idx3: {message}"):
        read_idx(path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (IMAGES, np.zeros((7, 27, 28), np.uint8), r"expected uint8 of shape \(N, 28, 28\)"),
        (LABELS, np.zeros((7, 1), np.uint8), r"expected uint8 of shape \(N,\)"),
        (LABELS, np.zeros(6, np.uint8), "6 labels, but .* has 7 images"),
        (LABELS, np.array([0, 1, 2, 11, 4, 5, 6], np.uint8), "label 11 at position 3"),
    ],
)
def test_files_that_are_not_mnist_are_refused(tmp_path, name, array, message):
    write_split(tmp_path)
    (tmp_path / name).write_bytes(idx_bytes(array))
    with pytest.raises(ValueError, match=message):
        read_mnist_split(tmp_path, "train")
