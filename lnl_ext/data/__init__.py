"""Datasets with a known, labelled bias: batches of ``(images, labels, {name: bias_target})``."""

from __future__ import annotations

from lnl_ext.paper.colored_mnist import ColoredMNIST
from lnl_ext.paper.idx import read_idx, read_mnist_split
from lnl_ext.paper.safe_npy import UnsafePickleError, load_npy

__all__ = ["ColoredMNIST", "UnsafePickleError", "load_npy", "read_idx", "read_mnist_split"]
