"""A user's images and tables, and lazily the readers of the paper's data.

Those stand in `lnl_ext.paper` and are imported at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lnl_ext.paper.colored_mnist import ColoredMNIST
    from lnl_ext.paper.idx import read_idx, read_mnist_split
    from lnl_ext.paper.safe_npy import UnsafePickleError, load_npy

__all__ = ["ColoredMNIST", "UnsafePickleError", "load_npy", "read_idx", "read_mnist_split"]

_MODULES = {
    "ColoredMNIST": "colored_mnist",
    "UnsafePickleError": "safe_npy",
    "load_npy": "safe_npy",
    "read_idx": "idx",
    "read_mnist_split": "idx",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"lnl_ext.paper.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
