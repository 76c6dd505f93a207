"""Learning Not to Learn (Kim et al., CVPR 2019) in PyTorch: unlearn a known, labelled bias."""

from __future__ import annotations

from . import reference
from ._version import __version__
from .build import build_info
from .functional import fused_bias_loss
from .types import BiasLoss

__all__ = ["BiasLoss", "__version__", "build_info", "fused_bias_loss", "reference"]
