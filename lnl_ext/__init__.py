"""Learning Not to Learn (Kim et al., CVPR 2019) in PyTorch: unlearn a known, labelled bias."""

from __future__ import annotations

from ._version import __version__
from .build import build_info

__all__ = ["__version__", "build_info"]
